"""Signal handlers that raise at any moment while the consumer communicates with its worker processes."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections import deque
from typing import Any

import pytest
from engine_contract import Bench, EngineContract, job_of
from support.numpy_datasets import PATIENCE_S, Gate, Numbers
from support.waiting import assert_no_workers

from loaders.errors import WorkerLostError
from loaders.memory.slots import SlotPool
from loaders.workers.processes import ProcessEngine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
SPEC = EngineContract.SPEC
FORK = multiprocessing.get_context("fork")
ROWS = 12
SPANS = [(0, 5), (5, 6), (6, 12)]


class TimeLimitError(Exception):
    """Raised by a signal handler, as for a time limit."""


@pytest.fixture
def _alarm_raises() -> Any:
    def handler(number: int, frame: object) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Storm:
    """An engine that gets task after task and is interrupted. It is replaced when it is not intact."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bench = Bench(self.new_engine, job_of(Numbers(10_000)), shared=True)
        self.engine: ProcessEngine | None = self.bench.engine
        self.slots = [self.bench.pool.acquire([size for size in SPEC.sizes(ROWS) if size]) for _ in range(3)]
        self.free = deque(self.slots)
        self.open: dict[int, Any] = {}  # ticket → (task, slot, spans left)
        self.checked = self.interrupts = self.engines = 0

    @staticmethod
    def new_engine(job: Any, pool: SlotPool) -> ProcessEngine:
        return ProcessEngine(job, pool, FORK)

    def go(self, within_s: float) -> None:
        """Submit and collect until interrupted, or until three tasks are done."""
        if self.engine is None:
            self.engine = self.new_engine(job_of(Numbers(10_000)), self.bench.pool)
            self.engines += 1
            if self.rng.random() < 0.9:
                within_s = PATIENCE_S  # else no engine would ever get its workers started
        engine = self.engine
        task = None
        if self.free:
            task = self.task(self.free[0])
        sent: list[Any] = []
        inbox: list[Any] = []
        try:
            signal.setitimer(signal.ITIMER_REAL, within_s)
            if task is not None:
                # Noted in C as it returns: handlers run between instructions of Python, not in the middle of C code.
                sent.extend(zip((task,), map(engine.submit, (task,), (SPANS,)), strict=True))
            while not inbox:
                inbox.extend(itertools.chain.from_iterable(map(engine.collect, (None,))))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeLimitError:
            self.interrupts += 1
        if sent:
            self.open[task.ticket] = [task, self.free.popleft(), set(SPANS)]
        for result in inbox:
            self.take(result)
        if not engine.intact:
            engine.close(force=True)
            self.engine = None
            self.free, self.open = deque(self.slots), {}  # overwritten at once

    def task(self, slot: Any) -> Any:
        at = iter(slot)
        blocks = [((b := next(at)).offset, b.nbytes) if size else (0, 0) for size in SPEC.sizes(ROWS)]
        for offset, nbytes in blocks:
            self.bench.pool.arena.buffer[offset : offset + nbytes] = b"\xee" * nbytes
        first = self.rng.randrange(9000)
        task = self.bench.task(range(first, first + ROWS))
        task.spec, task.blocks = SPEC, tuple(blocks)
        return task

    def take(self, result: Any) -> None:
        assert not result.failures
        task, slot, left = self.open[result.ticket]
        left.remove((result.start, result.stop))
        if not left:
            assert self.bench.rows(task, "label") == list(task.keys)
            assert [row[0][0] for row in self.bench.rows(task, "x")] == [key % 256 for key in task.keys]
            self.free.append(slot)
            del self.open[result.ticket]
            self.checked += 1

    def end(self) -> None:
        while self.open and self.engine is not None:
            self.go(PATIENCE_S)
        if self.engine is not None:
            self.engine.close()
        self.bench.pool.discard(itertools.chain.from_iterable(self.slots))
        self.bench.pool.reclaim()


def survive(interrupts: int, seed: int) -> Storm:
    before = descriptors()
    storm = Storm(seed)
    try:
        while storm.interrupts < interrupts:
            storm.go(10 ** storm.rng.uniform(-5.3, -2.3))
    finally:
        storm.end()
    assert_no_workers()
    assert sum(storm.bench.pool._in_use.values()) <= storm.engines  # blocks just being taken
    storm.bench.pool.close()
    del storm.bench.pool.arena.buffer
    assert descriptors() == before
    return storm


# A file that was being opened when the interrupt came is closed by its finalizer, of which Python warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("_alarm_raises")
def test_interrupts_at_any_moment_lose_no_span_and_corrupt_no_row() -> None:
    storm = survive(300, seed=1)
    assert storm.checked > 100
    assert storm.engines > 5


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("_alarm_raises")
def test_five_thousand_interrupts_at_any_moment() -> None:
    survive(5000, seed=2)


@pytest.fixture
def bench() -> Any:
    made = []

    def make(dataset: Any) -> Bench:
        made.append(Bench(Storm.new_engine, job_of(dataset), shared=True))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


def test_an_engine_whose_call_was_cut_short_can_only_be_closed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench(Numbers())
    engine, task = bench.engine, bench.task(range(4), SPEC)

    def cut_short() -> None:
        raise TimeLimitError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_flush", cut_short)
        with pytest.raises(TimeLimitError):
            engine.submit(task, [(0, 4)])
    assert not engine.intact
    for call in (lambda: engine.collect(0), lambda: engine.submit(task, [(0, 4)]), lambda: engine.resize(1)):
        with pytest.raises(WorkerLostError, match="a call was interrupted"):
            call()
    engine.close()
    bench.pool.trim()
    assert bench.pool.arena.reserved_nbytes == sum(nbytes for _, nbytes in task.blocks)


@pytest.mark.usefixtures("_alarm_raises")
def test_an_interrupt_while_collect_waits_leaves_the_engine_intact(bench: Any) -> None:
    gate = Gate()
    gate.hold(0)
    bench = bench(Numbers(gate=gate))
    task = bench.task(range(2), SPEC)
    bench.engine.submit(task, [(0, 2)])
    assert gate.entered(1) == [0]
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(TimeLimitError):
        bench.engine.collect(None)
    assert bench.engine.intact
    gate.open()
    assert len(bench.collect(1)) == 1
    assert bench.rows(task, "label") == [0, 1]
    gate.close()


class UnpicklableKey:
    def __reduce__(self) -> Any:
        raise TimeLimitError


@pytest.mark.usefixtures("_alarm_raises")
@pytest.mark.parametrize("is_handlers", [True, False])
def test_what_a_handler_raises_is_not_mistaken_for_an_error_of_a_key(
    bench: Any, is_handlers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench(Numbers())
    task = bench.task([UnpicklableKey()])
    if is_handlers:
        task.keys = [5]

        def raise_once(self: object, *args: object) -> None:
            signal.raise_signal(signal.SIGALRM)

        monkeypatch.setattr("loaders.workers.task_memory.TaskMemory._spec_ref", raise_once)
        with pytest.raises(TimeLimitError):
            bench.engine.submit(task, [(0, 1)])
    else:
        bench.engine.submit(task, [(0, 1)])
        [result] = bench.collect(1)
        assert result.failures[0].doing == "sending"
