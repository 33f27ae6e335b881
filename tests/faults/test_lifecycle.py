"""Iterators that are abandoned, shared, nested, kept for long or collected anywhere: no hang, no orphan, no leak."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import saboteurs
from support.saboteurs import Carries, Numbers, eight_megabytes, hang, unlucky
from support.waiting import (
    assert_no_workers,
    assert_nothing_is_held,
    batches_and_errors,
    is_gone,
    wait_until,
    worker_pids,
    worker_threads,
)
from torch.utils.data import IterableDataset

import loaders.memory.slots as slots
from loaders.dataloader.loader import DataLoader
from loaders.errors import WorkerTimeoutError
from loaders.workers import supervisor, threads

ENGINES: dict[str, dict[str, Any]] = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
    "kept threads": {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
    "kept processes": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}
KEPT = ["kept threads", "kept processes"]
WORKERS = ["thread", "process", *KEPT]
WANT = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.fixture(autouse=True)
def _no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.5)
    monkeypatch.setattr(threads, "_GRACE_S", 0.3)
    yield
    assert_no_workers()


def make(engine: str, dataset: Any = None, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(20) if dataset is None else dataset, batch_size=4, **ENGINES[engine], **arguments)


def rest_of(iterator: Any) -> list[list[int]]:
    return [batch["i"].tolist() for batch in iterator]


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_iterator_that_is_abandoned_half_way_leaves_nothing(engine: str, taken: int) -> None:
    loader = make(engine)
    for _ in range(3):
        iterator = iter(loader)
        assert [next(iterator)["i"].tolist() for _ in range(taken)] == WANT[:taken]
        del iterator
        assert_nothing_is_held(loader)
    if engine not in KEPT:
        assert_no_workers()
    assert rest_of(loader) == WANT


@pytest.mark.parametrize("engine", ENGINES)
def test_two_iterators_at_once_do_not_disturb_each_other(engine: str) -> None:
    loader = make(engine)
    pairs = zip(loader, loader, strict=True)
    for (one, other), want in zip(pairs, WANT, strict=True):
        assert one["i"].tolist() == other["i"].tolist() == want
        assert one["x"].data_ptr() != other["x"].data_ptr()
    del one, other, pairs
    first, second = iter(loader), iter(loader)
    next(first)
    del first
    assert rest_of(second) == WANT
    del second
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", WORKERS)
def test_two_iterators_over_one_stream_do_not_disturb_each_other(engine: str) -> None:
    loader = make(engine, Stream(16))
    want = sorted(2 * list(range(16)))
    first, second = iter(loader), iter(loader)
    both = [batch["i"].tolist() for pair in zip(first, second, strict=True) for batch in pair]
    assert both[::2] == both[1::2]
    assert sorted(i for batch in both[::2] for i in batch) == want
    del first, second
    assert_nothing_is_held(loader)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Each worker reads all of it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return ({"i": i} for i in range(self.length))


@pytest.mark.parametrize("engine", ENGINES)
def test_iterator_inside_the_loop_over_the_same_loader(engine: str) -> None:
    loader = make(engine, Numbers(8))
    assert [rest_of(loader) for _ in loader] == [WANT[:2], WANT[:2]]
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", ENGINES)
def test_iterator_outlives_its_loader(engine: str) -> None:
    iterator = iter(make(engine))
    first = next(iterator)
    gc.collect()
    assert [first["i"].tolist(), *rest_of(iterator)] == WANT


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_outlive_loader_and_iterator(engine: str) -> None:
    batches = list(make(engine))
    assert_no_workers()
    assert [batch["i"].tolist() for batch in batches] == WANT
    for batch in batches:
        assert torch.equal(batch["x"], batch["i"].float()[:, None].expand(-1, 3))


@pytest.mark.parametrize("state", ["new", "begun", "in the middle", "failed", "exhausted"])
@pytest.mark.parametrize("engine", ENGINES)
def test_loader_can_be_deleted_in_any_state(engine: str, state: str) -> None:
    loader = make(engine, Numbers(20, unlucky, at={0} if state == "failed" else ()))
    iterator = None if state == "new" else iter(loader)
    if state == "in the middle":
        next(iterator)
    if state == "failed":
        with pytest.raises(saboteurs.Unlucky):
            next(iterator)
    if state == "exhausted":
        assert rest_of(iterator) == WANT
    del loader
    del iterator


@pytest.mark.parametrize("engine", ENGINES)
def test_exhausted_iterator_stays_exhausted(engine: str) -> None:
    loader = make(engine)
    iterator = iter(loader)
    assert rest_of(iterator) == WANT
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)
    assert rest_of(loader) == WANT


@pytest.mark.parametrize("engine", ENGINES)
def test_loop_goes_on_after_an_exception_and_so_does_the_next_epoch(engine: str) -> None:
    loader = make(engine, Numbers(20, unlucky, at={0, 9}))
    for _ in range(2):
        found = batches_and_errors(loader)
        assert [isinstance(each, saboteurs.Unlucky) for each in found] == [True, False, True, False, False]
        assert [each["i"].tolist() for each in found if isinstance(each, dict)] == [WANT[1], WANT[3], WANT[4]]
    del found
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", KEPT)
def test_persistent_workers_are_the_same_in_every_epoch(engine: str) -> None:
    loader = make(engine, Numbers(20, unlucky, at={9}))

    def workers() -> set[Any]:
        return set(worker_threads()) if engine == "kept threads" else set(worker_pids())

    batches_and_errors(loader)
    before = workers()
    assert len(before) == 2
    batches_and_errors(loader)
    next(iter(loader))
    assert len(batches_and_errors(loader)) == 5
    assert workers() == before


@pytest.mark.parametrize("engine", ["thread", "process", *KEPT])
def test_loader_goes_on_after_a_timeout(engine: str, request: pytest.FixtureRequest) -> None:
    event = threading.Event()
    request.addfinalizer(event.set)
    dataset = Numbers(20, lambda index: event.wait() if engine in ("thread", "kept threads") else hang(index), at={5})
    loader = make(engine, dataset, timeout=0.25)
    iterator = iter(loader)
    assert next(iterator)["i"].tolist() == WANT[0]
    with pytest.raises(WorkerTimeoutError, match="sample 5"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    dataset.at = frozenset()
    assert rest_of(loader) == WANT
    event.set()
    del iterator
    wait_until(lambda: len(worker_threads()) <= 2, "the stuck thread has ended")
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", KEPT)
def test_iterator_that_timed_out_stops_no_workers_of_another(engine: str, request: pytest.FixtureRequest) -> None:
    event = threading.Event()
    request.addfinalizer(event.set)
    loader = make(engine, Numbers(20, lambda index: event.wait(), at={5}), timeout=0.25)
    other, iterator = iter(loader), iter(loader)
    next(iterator)
    with pytest.raises(WorkerTimeoutError):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    event.set()
    # It has workers of its own.
    assert [batch["i"].tolist() for batch in other] == [list(range(start, start + 4)) for start in range(0, 20, 4)]
    del other, iterator
    assert_nothing_is_held(loader)


def test_late_thread_writes_into_no_batch_of_a_later_epoch() -> None:
    """The thread that was given up writes its row late; until then no other batch may get its slot."""
    stuck, released = threading.Event(), threading.Event()
    dataset = Late(stuck, released)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, worker_method="thread", fields=None)
    iterator = iter(loader)
    next(iterator)
    assert stuck.wait(20)
    del iterator
    gc.collect()
    dataset.late = False
    batches = list(loader)
    released.set()
    wait_until(lambda: not worker_threads(), "the late thread has ended")
    for number, batch in enumerate(batches):
        assert batch["x"].unique().tolist() == [float(i) for i in WANT[number]]
    del batches, batch
    assert_nothing_is_held(loader)


class Late(Numbers):
    """Sample 6 waits in the middle of writing its row, if it is `late`."""

    def __init__(self, stuck: threading.Event, released: threading.Event) -> None:
        super().__init__(20)
        self.stuck, self.released, self.late = stuck, released, True

    def __getitem__(self, index: int) -> Any:
        return {"x": np.full(1000, index, np.float32)}

    def read_into(self, index: int, out: Any) -> None:
        late = self.late and index == 6
        if late:
            self.stuck.set()
            self.released.wait()
        out["x"][:] = -1 if late else index


@pytest.mark.parametrize("engine", ["inline", "thread", "process", *KEPT])
def test_iterator_is_collected_on_another_thread(engine: str) -> None:
    loader = make(engine)
    held = [iter(loader)]
    next(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert_nothing_is_held(loader)
    assert rest_of(loader) == WANT


@pytest.mark.parametrize("engine", ["inline", "thread", "process", *KEPT])
def test_iterator_in_a_cycle_is_collected_while_another_one_works(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection can run anywhere, also while this very thread holds the pool's lock."""
    loader = make(engine)
    iterator = iter(loader)
    next(iterator)
    grow = slots.SlotPool._take

    def take_and_collect(*arguments: Any) -> Any:
        cycle: list[Any] = [iter_once()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        return grow(*arguments)

    spare = [iter(loader) for _ in range(4)]
    for each in spare:
        next(each)

    def iter_once() -> Any:
        return spare.pop() if spare else None

    monkeypatch.setattr(slots.SlotPool, "_take", take_and_collect)
    assert rest_of(iterator) == WANT[1:]
    assert rest_of(loader) == WANT
    assert not spare
    monkeypatch.undo()
    del iterator, each
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", WORKERS)
def test_iterator_is_abandoned_while_its_workers_are_busy(engine: str) -> None:
    for dataset in (Carries(20, eight_megabytes, at=range(1, 20)), Numbers(20, prints_much, at=range(20))):
        loader = make(engine, dataset)
        iterator = iter(loader)
        next(iterator)
        del iterator
        assert_nothing_is_held(loader)
        if engine not in KEPT:
            assert_no_workers()
        assert rest_of(loader) == WANT


def prints_much(index: int) -> None:
    sum(range(20_000))


def test_worker_in_a_long_sample_is_killed_and_nothing_waits_for_it() -> None:
    loader = make("process", Numbers(20, hang, at={4, 5}))
    iterator = iter(loader)
    next(iterator)
    pids = worker_pids()
    assert len(pids) == 2
    del iterator
    assert_no_workers()
    assert_nothing_is_held(loader)


def test_loader_with_processes_inside_a_dataset_is_refused_as_torchs_is() -> None:
    loader = DataLoader(
        Nested(DataLoader, num_workers=1), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(AssertionError, match="daemonic processes are not allowed to have children"):
        list(loader)


@pytest.mark.parametrize("inner", [{}, {"num_workers": 2, "worker_method": "thread"}], ids=["inline", "thread"])
@pytest.mark.parametrize("engine", ENGINES)
def test_loader_inside_a_dataset_works_without_processes(engine: str, inner: dict[str, Any]) -> None:
    loader = DataLoader(Nested(DataLoader, **inner), batch_size=None, **ENGINES[engine])
    assert [sample.tolist() for sample in loader] == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]


class Nested:
    """Every sample is the batch of a new loader."""

    def __init__(self, kind: Any, **arguments: Any) -> None:
        self.kind = kind
        self.arguments = arguments

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index >= 3:
            raise IndexError(index)
        [batch] = self.kind(range(3), batch_size=3, **self.arguments)
        return batch


def test_loader_is_iterated_in_several_threads_at_once() -> None:
    loaders = [make(engine) for engine in ENGINES for _ in range(2)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=number, each=each: found.__setitem__(n, rest_of(each)))
        for number, each in enumerate(loaders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found.get(number) for number in range(len(loaders))] == [WANT] * len(loaders)


EXITS = """
import multiprocessing, sys, threading
from support.saboteurs import Carries, Numbers, eight_megabytes, hang
from loaders.dataloader.loader import DataLoader
from loaders.workers import supervisor
supervisor._GRACE_S = 0.5
how, engine = sys.argv[1:]
more = {"worker_method": "thread"} if engine == "thread" else {"multiprocessing_context": engine}
kept = DataLoader(Numbers(20), 4, num_workers=2, persistent_workers=True, **more)
iterators = [iter(kept), iter(DataLoader(Carries(20, eight_megabytes, at=range(4, 20)), 4, num_workers=2, **more))]
if engine != "thread":
    iterators.append(iter(DataLoader(Numbers(20, hang, at={9}), 4, num_workers=2, **more)))
batches = [next(each) for each in iterators]
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if how == "raise":
    raise SystemExit(3)
if how == "thread":
    threading.Thread(target=lambda: batches.append(next(iterators[0]))).start()
"""


@pytest.mark.parametrize(("engine", "how"), [("fork", "end"), ("fork", "raise"), ("fork", "thread"), ("thread", "end")])
def test_interpreter_ends_with_iterators_and_batches_alive(engine: str, how: str) -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXITS, how, engine],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (3 if how == "raise" else 0, "")
    for pid in map(int, done.stdout.split()):
        assert is_gone(pid)


@pytest.mark.parametrize("failing", [1, 2])
def test_where_a_process_cannot_be_started_the_others_are_stopped(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    start = multiprocessing.process.BaseProcess.start

    def refuse(process: Any) -> None:
        started.append(1)
        if len(started) == failing:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)

    loader = make("process")
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    try:
        iter(loader)
    except BlockingIOError:  # its traceback keeps the iterator alive here
        assert_no_workers()
        assert_nothing_is_held(loader)
        assert rest_of(loader) == WANT
    assert len(started) == failing + 2


def test_replacement_that_cannot_be_started_is_reported_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make("kept processes", Numbers(20, saboteurs.sigkill, at={5}))
    iterator = iter(loader)
    next(iterator)

    def refuse(process: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        for _ in range(2):  # each call tries again
            with pytest.raises(BlockingIOError):
                list(iterator)
    del iterator
    loader.dataset.at = frozenset()
    assert rest_of(loader) == WANT
    assert_nothing_is_held(loader)
