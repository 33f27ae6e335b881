"""Whatever a dataset does to its worker, the consumer is told what happened to which sample."""

from __future__ import annotations

import multiprocessing
import os
import re
import select
import signal
from typing import Any

import numpy as np
import pytest
import torch
from support import inside, saboteurs
from support.saboteurs import Carries, Numbers
from support.waiting import assert_no_workers, assert_nothing_is_held, batches_and_errors, wait_until, worker_pids

from loaders.dataloader.loader import DataLoader
from loaders.errors import SampleError, UserCodeError, WorkerLostError, WorkerTimeoutError
from loaders.workers import supervisor, threads

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Any:
    yield
    assert_no_workers()


def indices(batch: Any) -> list[int]:
    return [int(i) for i in batch["i"]]


NAMED = r'sample 5 \("numbers/5.png"\)'
LOST = rf"worker \d was lost 3 times on {NAMED}, the last time by "
TABLE = [
    ("sigkill", WorkerLostError, LOST + r"SIGKILL\.\n  Likely out of memory"),
    ("sigterm", WorkerLostError, LOST + "SIGTERM"),
    ("segfault", WorkerLostError, LOST + r"SIGSEGV\.\n  Likely a crash in native code"),
    ("abort", WorkerLostError, LOST + "SIGABRT"),
    (
        "exit_quietly",
        WorkerLostError,
        LOST + r"exit with status 0\.\n  Likely something in the dataset ends the process",
    ),
    ("exit_with_status", WorkerLostError, LOST + "exit with status 3"),
    ("sys_exit", WorkerLostError, LOST + "exit with status 4"),
    ("exit_in_gc", WorkerLostError, LOST + "exit with status 9"),
    ("keyboard_interrupt", WorkerLostError, LOST + "exit with status 1"),
    # The worker notices only when it reports; spans have one row here, so the right sample is blamed even so.
    ("close_descriptors", WorkerLostError, LOST + "exit with status 1"),
    ("memory_error", MemoryError, rf"no room for sample\n  while reading {NAMED} in worker \d"),
    ("recursion_error", RecursionError, rf"maximum recursion depth exceeded.*\n  while reading {NAMED}"),
    ("unlucky", saboteurs.Unlucky, rf"bad luck with 5\n  while reading {NAMED}"),
    ("stop_iteration", UserCodeError, rf"StopIteration: out of samples\n  while reading {NAMED}"),
    ("takes_two", UserCodeError, rf"\S+\.TakesTwo: bad luck \(7\)\n  while reading {NAMED}"),
    ("unpicklable", saboteurs.Unpicklable, rf"bad luck\n  while reading {NAMED}"),
    ("rebuilt_only_at_home", UserCodeError, rf"\S+\.RebuiltOnlyAtHome: bad luck\n  while reading {NAMED}"),
]


@pytest.mark.parametrize(("saboteur", "expected", "message"), TABLE, ids=[row[0] for row in TABLE])
def test_saboteur_costs_its_own_batch_and_is_named(
    saboteur: str, expected: type[Exception], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = Numbers(10, getattr(saboteurs, saboteur), at={5})
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=FORK)

    first, second, error, *rest = batches_and_errors(loader)

    assert [indices(batch) for batch in (first, second, *rest)] == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert type(error) is expected
    assert re.match(message, str(error)), str(error)
    if isinstance(error, SampleError):
        assert (error.index, error.source) == (5, "numbers/5.png")
    del first, second, rest
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("saboteur", ["unlucky", "memory_error", "recursion_error", "stop_iteration", "takes_two"])
@pytest.mark.parametrize("engine", [{}, {"num_workers": 2, "worker_method": "thread"}], ids=["inline", "thread"])
def test_exceptions_cost_their_own_batch_without_processes_too(engine: dict[str, Any], saboteur: str) -> None:
    loader = DataLoader(Numbers(10, getattr(saboteurs, saboteur), at={5}), batch_size=2, **engine)

    first, second, error, *rest = batches_and_errors(loader)

    assert [indices(batch) for batch in (first, second, *rest)] == [[0, 1], [2, 3], [6, 7], [8, 9]]
    told = "\n".join([str(error), *getattr(error, "__notes__", [])])
    assert re.search(rf"while reading {NAMED}", told), told
    del first, second, rest
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", [{}, {"num_workers": 2, "worker_method": "thread"}], ids=["inline", "thread"])
@pytest.mark.parametrize(
    ("saboteur", "expected"), [("sys_exit", SystemExit), ("keyboard_interrupt", KeyboardInterrupt)]
)
def test_exits_pass_through_to_the_consumer_without_processes(
    engine: dict[str, Any], saboteur: str, expected: type[BaseException]
) -> None:
    loader = DataLoader(Numbers(10, getattr(saboteurs, saboteur), at={5}), batch_size=2, **engine)
    iterator = iter(loader)
    assert [indices(next(iterator)) for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(expected):
        next(iterator)


def test_interrupted_sample_is_read_again_when_the_inline_iterator_is_asked_again(tmp_path: Any) -> None:
    loader = DataLoader(Numbers(6, saboteurs.keyboard_interrupt, at={2}, once=tmp_path), batch_size=2)
    iterator = iter(loader)
    assert indices(next(iterator)) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert [indices(batch) for batch in iterator] == [[2, 3], [4, 5]]


@pytest.mark.parametrize("saboteur", ["sigkill", "segfault", "exit_quietly", "sys_exit", "close_descriptors"])
def test_worker_that_is_lost_once_changes_nothing(saboteur: str, tmp_path: Any, capfd: Any) -> None:
    dataset = Numbers(24, getattr(saboteurs, saboteur), at={0, 5, 23}, once=tmp_path)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=FORK)
    batches = list(loader)
    assert [i for batch in batches for i in indices(batch)] == list(range(24))
    for batch in batches:
        assert torch.equal(batch["x"], batch["i"].float()[:, None].expand(-1, 3))
    assert len(list(tmp_path.iterdir())) == 3
    del batches, batch
    assert_nothing_is_held(loader)


@pytest.fixture
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.2)
    monkeypatch.setattr(threads, "_GRACE_S", 0.2)


@pytest.mark.usefixtures("_short_grace")
@pytest.mark.parametrize("engine", ["process", "thread"])
@pytest.mark.parametrize("saboteur", ["hang", "sigstop"])
def test_hung_sample_hits_the_timeout_and_is_named(engine: str, saboteur: str, request: Any) -> None:
    if (engine, saboteur) == ("thread", "sigstop"):
        pytest.skip("would stop the tests themselves")
    dataset = Numbers(10, getattr(saboteurs, saboteur), at={5})
    if engine == "thread":
        stuck = multiprocessing.Event()  # a thread cannot be killed: release it in the end
        dataset.fault = lambda index: stuck.wait()
        request.addfinalizer(stuck.set)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, worker_method=engine, timeout=0.5)
    iterator = iter(loader)
    assert [indices(next(iterator)) for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(WorkerTimeoutError, match=NAMED + r" for 0\.\d s"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    if engine == "thread":
        stuck.set()
    del iterator
    assert_nothing_is_held(loader)


@pytest.mark.usefixtures("_short_grace")
def test_timeout_in_a_collate_fn_blames_no_sample() -> None:
    loader = DataLoader(Numbers(10), batch_size=2, num_workers=1, timeout=0.5, collate_fn=saboteurs.collate_hangs)
    iterator = iter(loader)
    assert [indices(next(iterator)) for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(WorkerTimeoutError, match=r"collate_fn of samples 4, 5 for 0\.\d s"):
        next(iterator)


def test_crash_in_a_collate_fn_blames_no_sample() -> None:
    loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, collate_fn=saboteurs.collate_dies)
    first, second, error, last = batches_and_errors(loader)
    assert [indices(batch) for batch in (first, second, last)] == [[0, 1], [2, 3], [6, 7]]
    assert isinstance(error, WorkerLostError)
    assert re.match(r"worker \d was lost 3 times on collate_fn of samples 4, 5, the last time by SIGSEGV", str(error))
    assert error.index is None
    del first, second, last
    assert_nothing_is_held(loader)


def test_dataset_that_reads_whole_batches_is_blamed_by_batch() -> None:
    loader = DataLoader(saboteurs.ReadAtOnce(8, saboteurs.segfault, at={5}), batch_size=2, num_workers=2)
    first, second, error, last = batches_and_errors(loader)
    assert [indices(batch) for batch in (first, second, last)] == [[0, 1], [2, 3], [6, 7]]
    assert re.match(r"worker \d was lost 3 times on samples 4, 5, the last time by SIGSEGV", str(error))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_sample_that_cannot_be_pickled_is_named(batch_size: int) -> None:
    loader = DataLoader(Carries(8, saboteurs.a_lambda, at={5}), batch_size=batch_size, num_workers=2)
    found = batches_and_errors(loader)
    [error] = [each for each in found if isinstance(each, Exception)]
    assert re.search(rf"while sending back {NAMED} in worker \d", "\n".join([str(error), *error.__notes__]))
    assert len(found) == 8 // batch_size


def test_result_of_a_collate_fn_that_cannot_be_pickled_names_its_batch() -> None:
    loader = DataLoader(Numbers(4), batch_size=2, num_workers=1, collate_fn=lambda samples: lambda: samples)
    for error, name in zip(batches_and_errors(loader), ["samples 0, 1", "samples 2, 3"], strict=True):
        assert f"while sending back {name} in worker 0" in "\n".join([str(error), *getattr(error, "__notes__", [])])


def test_sample_that_cannot_be_unpickled_raises_its_own_error() -> None:
    loader = DataLoader(Carries(8, saboteurs.not_here, at={5}), batch_size=2, num_workers=2)
    first, second, error, last = batches_and_errors(loader)
    assert [indices(batch) for batch in (first, second, last)] == [[0, 1], [2, 3], [6, 7]]
    assert re.match("rebuilt in the wrong process\n  while receiving samples 5 in worker", str(error))


@pytest.mark.parametrize("saboteur", ["prints", "forks", "runs_a_program"])
def test_busy_datasets_do_no_harm(saboteur: str, capfd: Any) -> None:
    loader = DataLoader(Numbers(8, getattr(saboteurs, saboteur), at={1, 5}), batch_size=2, num_workers=2)
    assert [indices(batch) for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_death_is_noticed_although_a_child_of_the_worker_lives_on(tmp_path: Any) -> None:
    dataset = Numbers(8, saboteurs.leaves_a_child_and_dies, at={5}, once=tmp_path)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, timeout=20)
    assert [indices(batch) for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_overflow_of_a_hundred_megabytes_arrives() -> None:
    loader = DataLoader(Carries(3, saboteurs.hundred_megabytes, at={1}), batch_size=1, num_workers=2)
    plain, large, other = (batch["value"][0] for batch in loader)
    assert (plain, other) == ("plain 0", "plain 2")
    assert large == b"\x01" * 100_000_000


@pytest.mark.parametrize("value", [saboteurs.eight_megabytes, saboteurs.eight_megabytes_and_a_child])
@pytest.mark.parametrize("collate_fn", [None, list], ids=["rows", "own collate_fn"])
def test_worker_killed_in_the_middle_of_a_large_payload_changes_nothing(collate_fn: Any, value: Any) -> None:
    loader = DataLoader(Carries(6, value, at={0, 1, 4}), batch_size=1, num_workers=2, collate_fn=collate_fn, timeout=20)
    iterator = iter(loader)
    engine = inside.engine_of(iterator)
    # The header is announced before the payload, which is too large to be sent while nobody reads it.
    assert select.select([engine._done[0]], [], [], 20)[0]
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    batches = list(iterator)
    values = [(batch[0] if collate_fn else batch)["value"] for batch in batches]
    values = [value if isinstance(value, (str, bytes)) else value[0] for value in values]
    want = [bytes([i]) * 8_000_000 if i in (0, 1, 4) else f"plain {i}" for i in range(6)]
    assert values == want


@pytest.fixture
def _kills_are_unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FRUITLESS_KILLS", 1_000_000)


@pytest.mark.usefixtures("_kills_are_unlimited")
@pytest.mark.parametrize("dataset", [saboteurs.ExitsAtUnpickle, saboteurs.CrashesAtUnpickle])
def test_dataset_that_ends_its_worker_when_unpickled_is_given_up(dataset: type[Numbers], capfd: Any) -> None:
    loader = DataLoader(dataset(8), batch_size=2, num_workers=1, multiprocessing_context="forkserver")
    iterator = iter(loader)
    with pytest.raises(
        WorkerLostError, match=r"cannot be kept alive: the last one was lost by (exit with status 7|SIGSEGV)"
    ):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    del iterator
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_dataset_that_cannot_be_pickled_raises_its_own_error(context: str) -> None:
    loader = DataLoader(saboteurs.RaisesAtPickle(8), batch_size=2, num_workers=2, multiprocessing_context=context)
    with pytest.raises(saboteurs.Unlucky, match="bad luck at pickle"):
        iter(loader)
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", ["process", "thread"])
def test_exception_in_worker_init_fn_is_raised_at_the_first_batch(engine: str) -> None:
    loader = DataLoader(
        Numbers(8), batch_size=2, num_workers=2, worker_method=engine, worker_init_fn=saboteurs.init_raises
    )
    with pytest.raises(saboteurs.Unlucky, match=r"bad luck in worker_init_fn of \d\n  while starting in worker \d"):
        next(iter(loader))
    assert_nothing_is_held(loader)


@pytest.mark.usefixtures("_kills_are_unlimited")
@pytest.mark.parametrize(
    ("init", "how"), [(saboteurs.init_exits, "exit with status 5"), (saboteurs.init_crashes, "SIGSEGV")]
)
@pytest.mark.parametrize("persistent", [False, True])
def test_worker_init_fn_that_ends_its_worker_is_given_up(init: Any, how: str, persistent: bool) -> None:
    loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, worker_init_fn=init, persistent_workers=persistent)
    with pytest.raises(WorkerLostError, match=f"cannot be kept alive: the last one was lost by {how}"):
        next(iter(loader))
    loader.worker_init_fn = None
    assert [indices(batch) for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_key_that_ends_the_worker_is_given_up(capfd: Any) -> None:
    loader = DataLoader(Numbers(8), sampler=[Poison()], num_workers=1)
    with pytest.raises(WorkerLostError, match="cannot be kept alive: the last one was lost by exit with status 6"):
        next(iter(loader))


def test_key_that_cannot_be_pickled_costs_its_own_batch() -> None:
    loader = DataLoader(Numbers(8), sampler=[0, Stubborn(), 2], num_workers=2)
    first, error, last = batches_and_errors(loader)
    assert (indices(first), indices(last)) == ([0], [2])
    assert re.match(r"bad luck at pickle\n  while sending samples a stubborn key", str(error))


class Stubborn:
    def __reduce__(self) -> Any:
        raise saboteurs.Unlucky("bad luck at pickle")

    def __repr__(self) -> str:
        return "a stubborn key"


class Poison:
    """A key that ends the process that unpickles it, before it reads any sample."""

    def __reduce__(self) -> Any:
        return os._exit, (6,)


def test_many_overflowing_values_wait_while_the_consumer_is_away() -> None:
    dataset = Carries(64, saboteurs.eight_megabytes, at=set())
    loader = DataLoader(dataset, batch_size=16, num_workers=2)
    iterator = iter(loader)
    wait_until(lambda: select.select([inside.engine_of(iterator)._done[0]], [], [], 0)[0], "a worker has reported")
    values = [value for batch in iterator for value in batch["value"]]
    assert values == [f"plain {i}" for i in range(64)]
    assert np.array_equal(values, values)
