"""The arithmetic of how much copying is hidden, and what is read from a profiler's trace."""

from __future__ import annotations

import random

import pytest

from benchmarks.trace import Activity, activity_of, common, hidden_share, length, union


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([(3, 4), (1, 2)], [(1, 2), (3, 4)]),
        ([(1, 3), (2, 5)], [(1, 5)]),
        ([(1, 2), (2, 3)], [(1, 3)]),
        ([(1, 9), (2, 3), (4, 5)], [(1, 9)]),
    ],
)
def test_a_union_is_in_order_and_apart(spans, expected):
    assert union(spans) == expected


@pytest.mark.parametrize("seed", range(20))
def test_unions_and_what_is_common_count_each_moment_as_it_is(seed):
    choose = random.Random(seed)
    ours, others = (
        [(begin := choose.randrange(100), begin + choose.randint(0, 9)) for _ in range(12)] for _ in range(2)
    )

    def moments(spans):
        return {moment for begin, end in spans for moment in range(begin, end)}

    assert length(union(ours)) == len(moments(ours))
    assert length(common(union(ours), union(others))) == len(moments(ours) & moments(others))


@pytest.mark.parametrize(
    ("copies", "kernels", "share"),
    [
        ({7: [(0, 10)]}, {0: [(0, 10)]}, 1.0),
        ({7: [(0, 10)]}, {0: [(5, 20)]}, 0.5),
        ({7: [(0, 10)]}, {0: [(0, 4)], 3: [(2, 6)]}, 0.6),
        ({0: [(0, 10)]}, {0: [(10, 20)]}, 0.0),
        # A copy in the stream of the kernels is not hidden by those, but by others it is.
        ({0: [(0, 10)]}, {0: [(0, 10)], 3: [(0, 1)]}, 0.1),
        ({7: [(0, 10)], 8: [(20, 30)]}, {0: [(0, 10), (20, 25)]}, 0.75),
        # Of two copies at once in one stream each moment counts once.
        ({7: [(0, 10), (5, 15)]}, {0: [(0, 3)]}, 0.2),
    ],
)
def test_hidden_is_what_kernels_of_other_streams_cover(copies, kernels, share):
    assert hidden_share(Activity(copies, kernels)) == pytest.approx(share)


def test_copies_of_the_lead_in_are_not_counted():
    activity = Activity({7: [(0, 10), (60, 70)]}, {0: [(0, 1), (60, 100)]})
    assert hidden_share(activity) == pytest.approx(11 / 20)
    assert hidden_share(activity, lead_in=0.25) == 1.0
    with pytest.raises(ValueError, match="no copy from the host"):
        hidden_share(activity, lead_in=0.9)


def test_a_trace_without_kernels_tells_nothing():
    with pytest.raises(ValueError, match="no kernel"):
        hidden_share(Activity({7: [(0, 10)]}, {}))


def test_of_a_trace_kernels_and_copies_from_the_host_are_read():
    def copy(kind):
        return {"ph": "X", "cat": "gpu_memcpy", "name": f"Memcpy {kind}", "ts": 1, "dur": 2, "args": {"stream": 9}}

    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10.5, "dur": 4, "args": {"stream": 7}},
        *map(copy, ["HtoD (Pinned -> Device)", "DtoH (Device -> Pinned)", "DtoD (Device -> Device)"]),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 1, "dur": 2, "args": {"stream": 7}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 2, "args": {}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 1, "id": 3},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    assert activity_of(events) == ({9: [(1.0, 3.0)]}, {7: [(10.5, 14.5)]})
