"""Open batches: between the task that asks for a batch and its delivery."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loaders.batch.rows import Overflow
from loaders.errors import BufferMemoryError, WorkerLostError
from loaders.memory.blocks import Block
from loaders.report.statistics import Measures
from loaders.timing import events
from loaders.workers.engine import Engine
from loaders.workers.messages import Failure, Parcel, Result, Task

# A run is sized to take about this long: long enough that its round trip costs nothing, short enough to share. Each
# wakes the consumer, who takes a core from a worker where there are no more cores than workers.
_RUN_S = 0.01
# How many runs the first batches are cut into, per worker, while the cost of a sample is not known.
_FIRST_RUNS = 4

# Tickets are unique in this process, so that iterators can share an engine.
_tickets = itertools.count()


@dataclass
class OpenBatch:
    """A batch that is being made.

    Attributes:
        task: what was asked for.
        slot: its blocks; fields without memory of their own have none.
        first: which of this rank's keys is the first in it, counted from the start of the epoch.
        rows: of the batch. For a stream known only once it is done; 0 then says that the stream has ended.
        asked: rows that were asked for while the spec was unknown.
        replaced: rows that hold substitutes.
        unreported: rows of runs that are not reported yet; None before the first run was submitted.
        measures: of the epoch it belongs to.
        opened_ns, completed_ns: for a trace.
    """

    task: Task
    slot: list[Block]
    rows: int
    first: int = 0
    lane: int = 0
    asked: int = 0
    unreported: int | None = None
    overflow: Overflow = field(default_factory=Overflow)
    failures: dict[int, Failure] = field(default_factory=dict)
    broken: Failure | None = None
    parcel: Parcel | None = None
    value: Any = None
    found_spec: Any = None
    stream_state: Any = None
    replaced: list[int] = field(default_factory=list)
    abandoned: bool = False
    measures: Measures | None = None
    opened_ns: int = 0
    completed_ns: int = 0

    @property
    def complete(self) -> bool:
        """True once every run is reported."""
        return self.unreported == 0


def new_ticket() -> int:
    """A ticket for one more task."""
    return next(_tickets)


class Dispatch:
    """Sends tasks to one engine and gives each result to the open batch it belongs to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cost_s = 0.0  # of one row, moving average; 0 while unknown
        self.notes: list[str] = []  # of workers, to warn the caller of
        self._open: dict[int, OpenBatch] = {}
        self._closed = False

    def runs(self, start: int, rows: int) -> list[tuple[int, int]]:
        """Rows `start` to `rows`, cut so that every worker has a share and a run takes about ten milliseconds.

        A single worker shares with nobody: it gets them all, since each run costs a look at the process's generators.
        """
        if self.engine.num_workers == 1:
            return [(start, rows)] if start < rows else []
        share = math.ceil((rows - start) / self.engine.num_workers)
        length = math.ceil(share / _FIRST_RUNS) if self.cost_s == 0.0 else min(share, int(_RUN_S / self.cost_s) + 1)
        return [(row, min(row + length, rows)) for row in range(start, rows, max(1, length))]

    def submit(self, batch: OpenBatch, runs: Sequence[tuple[int, int]]) -> None:
        """Queue runs of the batch. If the engine refuses them, nothing has changed."""
        try:
            if runs:
                self.engine.submit(batch.task, runs, batch.lane)
        except BufferMemoryError as error:  # no room even for the task: told when it is this batch's turn
            batch.broken, runs = Failure.of(error, "ordering"), ()
            # The frames behind its traceback know the iterator, which `weakref.finalize` must be able to outlive.
            error.__traceback__ = None
        self._open[batch.task.ticket] = batch
        batch.unreported = (batch.unreported or 0) + sum(_weight(start, stop) for start, stop in runs)

    def collect(self, timeout_s: float | None) -> bool:
        """Take in the results that are there. Returns whether there was one.

        Raises:
            WorkerLostError: the workers cannot be kept alive, or an iterator that shared them has stopped them.
        """
        if self._closed:
            raise WorkerLostError(
                "the workers were stopped by an error in another iterator of this loader.\n  Iterate the loader anew."
            )
        results = self.engine.collect(timeout_s)
        for result in results:
            self._accept(result)
        return bool(results)

    def abandon(self, batches: Sequence[OpenBatch]) -> None:
        """Nobody wants these batches any more. Their slots are taken back when the last worker is done with them."""
        if self._closed:
            self.close(batches)
            return
        pool = self.engine.pool
        for batch in batches:
            if batch.complete or batch.unreported is None:
                pool.discard(batch.slot)
            else:
                batch.abandoned = True
                pool.abandon(batch.slot)
        wanted = {id(batch) for batch in batches}
        for ticket, batch in list(self._open.items()):
            if id(batch) in wanted:
                self.engine.cancel(batch.task)
                if batch.complete:
                    del self._open[ticket]

    def close(self, batches: Sequence[OpenBatch]) -> None:
        """Stop the engine; after that nobody writes into the slots of `batches`."""
        self._closed = True
        self.engine.close()
        for batch in (*batches, *(each for each in self._open.values() if each.abandoned)):
            # A thread cannot be killed: the slot that it may still write into is not used again before it is done.
            self.engine.pool.discard_after(partial(self._is_read, batch.task.ticket), batch.slot)
            batch.slot = []
        self._open.clear()

    def _is_read(self, ticket: int) -> bool:
        return any(reading.ticket == ticket for reading in self.engine.reading())

    @property
    def is_wanted(self) -> bool:
        """Whether an iterator waits for a batch."""
        return any(not batch.abandoned for batch in self._open.values())

    def forget(self, batch: OpenBatch) -> None:
        """The batch is delivered."""
        self._open.pop(batch.task.ticket, None)

    def _accept(self, result: Result) -> None:
        self.notes += result.notes
        batch = self._open.get(result.ticket)
        if batch is None or batch.unreported is None:
            return
        # Rows are counted, not runs: the run of a worker that was lost may come back in pieces.
        batch.unreported -= _weight(result.start, result.stop)
        if batch.measures is not None:
            batch.measures.take(result, batch.task)
            if events.traces and batch.complete:
                batch.completed_ns = time.perf_counter_ns()
        done = result.stop - result.start
        # The first sample of all tells nothing of those behind it: it pays for imports, and for memory touched first.
        if not (result.cancelled or result.failures or result.spec) and done > 0:
            cost_s = result.elapsed_s / done
            self.cost_s = cost_s if self.cost_s == 0.0 else 0.8 * self.cost_s + 0.2 * cost_s
        if batch.abandoned:
            if batch.complete:
                self.engine.pool.discard(batch.slot)
                del self._open[result.ticket]
            return
        batch.overflow.merge(result.overflow)
        for failure in result.failures:
            failure.worker = result.worker
            if failure.row is None:
                batch.broken = failure
            else:
                batch.failures[failure.row] = failure
        if result.rows is not None:
            batch.rows = result.rows
        if result.stream_state is not None:
            batch.stream_state = result.stream_state
        if result.spec is not None:
            batch.found_spec = result.spec
        if result.parcel is not None:
            batch.parcel = result.parcel
        if result.value is not None:
            batch.value = result.value


def _weight(start: int, stop: int) -> int:
    """Rows of a run; the task for an empty batch is something to wait for, too."""
    return max(1, stop - start)
