"""The clock of stages, on a clock of the test's own."""

import pickle

import albumentations as A
import cv2
import numpy as np
import pytest

import loaders
from loaders.timing import stages
from loaders.timing.stages import DECODE, READ, STAGES, WRITE, Clock, Times
from loaders.workers.wire import DONE, INLINE_NBYTES

US, MS = 1_000, 1_000_000


@pytest.fixture
def hands(monkeypatch):
    """`hands.now` is what every clock shows."""

    class Hands:
        now = cpu = waits = 0

        def perf_counter_ns(self):
            return self.now

    monkeypatch.setattr(stages, "time", hands := Hands())
    monkeypatch.setattr(stages, "_cpu", lambda: (hands.cpu, hands.waits))
    return hands


def span(clock, hands, rows, work, start=0):
    """One span of a worker: `work(row)` for each, timed where the clock says so. Returns (its times, rows timed)."""
    due, seen = clock.begin_run(start, start + rows), []
    for row in range(start, start + rows):
        if row == due:
            clock.begin_sample()
            seen.append(row)
        work(row)
        if row == due:
            due = clock.end_sample(row)
    return clock.end_run(start, start + rows), seen


def test_time_counts_for_the_innermost_stage(hands):
    def sample(row):
        hands.now += 5 * MS
        with READ:
            hands.now += 1 * MS
            with DECODE:
                hands.now += 2 * MS
            stages.count_read(70)
            hands.now += 3 * MS
        with WRITE:
            hands.now += 4 * MS

    (took_ns, times), seen = span(Clock(), hands, 3, sample)
    assert took_ns == 45 * MS
    assert seen == [0]  # how long a sample takes is not known in the first span
    assert dict(zip(STAGES, times.stages_ns, strict=True)) == {
        "read": 4 * MS,
        "decode": 2 * MS,
        "augment": 0,
        "collate": 0,
        "write": 4 * MS,
        "sample": 5 * MS,
    }
    assert (times.looked_at, times.read_nbytes, times.slowest_row, times.slowest_ns) == (1, 70, 0, 15 * MS)


@pytest.mark.parametrize(("waits", "cpu_ms"), [(1, 3), (0, 10)])
def test_a_thread_that_is_kept_from_its_core_does_not_wait_for_a_disk(hands, waits, cpu_ms):
    def sample(row):
        hands.now += 10 * MS
        hands.cpu += 3 * MS
        hands.waits += waits

    (_, times), _ = span(Clock(), hands, 1, sample)
    assert times.cpu_ns == cpu_ms * MS


def test_a_stage_ends_with_the_error_that_leaves_it(hands):
    def sample(row):
        try:
            with DECODE:
                hands.now += 1 * MS
                raise OSError
        except OSError:
            hands.now += 2 * MS

    (_, times), _ = span(Clock(), hands, 1, sample)
    assert (times.decode_ns, times.sample_ns) == (1 * MS, 2 * MS)


@pytest.mark.parametrize(("sample_ns", "share"), [(10 * MS, 1.0), (100 * US, 0.025), (4 * US, 0.001)])
def test_the_cheaper_samples_are_the_fewer_are_looked_at(hands, sample_ns, share):
    def sample(row):
        hands.now += sample_ns

    clock, looked_at, rows = Clock(), 0, 0
    for length in (7, 500, 1, 64, 130) * 60:
        (_, times), seen = span(clock, hands, length, sample, start=32)
        assert len(seen) == times.looked_at
        looked_at, rows = looked_at + times.looked_at, rows + length
    assert looked_at / rows == pytest.approx(share, rel=0.25)


def test_a_mark_does_nothing_where_nobody_looks(hands):
    with READ:
        hands.now += MS
    clock = Clock()
    clock.begin_run(0, 1)
    with READ:
        hands.now += MS
    assert clock.end_run(0, 1)[1].stages_ns == (0,) * len(STAGES)


@pytest.fixture
def photo(tmp_path):
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.zeros((40, 60, 3), np.uint8))
    return tmp_path / "photo.jpg"


def as_array_dataset(transform=None):
    return loaders.ArrayDataset({"image": np.zeros((3, 8, 8), np.uint8)}, transform)


def from_a_cache():
    cache = loaders.DecodedCache(as_array_dataset(), 1 << 20)
    cache[0]
    return lambda photo: cache[0]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (loaders.read_image, {"read", "decode"}),
        (lambda photo: loaders.CenterCrop(16).read(photo), {"read", "decode"}),
        (lambda photo: as_array_dataset(lambda sample: sample)[0], {"augment"}),
        (lambda photo: as_array_dataset()[0], set()),
        (
            lambda photo: loaders.Albumentations(A.HorizontalFlip())({"image": np.zeros((8, 8, 3), np.uint8)}),
            {"augment"},
        ),
        (lambda photo: loaders.ImageFiles([photo], normalize=([0] * 3, [1] * 3))[0], {"read", "decode", "augment"}),
        (from_a_cache(), {"read"}),
    ],
)
def test_the_packages_own_code_bears_marks(photo, work, expected):
    clock = Clock()
    clock.begin_run(0, 1)
    clock.begin_sample()
    work(photo)
    clock.end_sample(0)
    times = clock.end_run(0, 1)[1]
    assert {name for name, ns in zip(STAGES, times.stages_ns, strict=True) if ns} == expected | {"sample"}
    assert times.read_nbytes == (photo.stat().st_size if {"read", "decode"} <= expected else 0)


def test_a_record_with_its_times_is_written_at_once():
    assert DONE.size + INLINE_NBYTES <= 4096
    times = Times(*range(12))
    assert Times._make(DONE.unpack(DONE.pack(*range(8), *times))[8:]) == times
    assert pickle.loads(pickle.dumps(times)) == times


def test_a_stage_that_does_not_exist_is_an_error_that_names_those_that_do():
    with pytest.raises(ValueError, match="'decoding' is unknown; the stages are read, decode, augment, collate, write"):
        loaders.stage("decoding")
    with loaders.stage("decode"):
        pass
