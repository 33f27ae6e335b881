"""Open batches, from the submission of their task to their delivery."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loaders.batch.rows import Overflow
from loaders.errors import BufferMemoryError, WorkerLostError
from loaders.memory.blocks import Block
from loaders.memory.slots import SlotPool
from loaders.report.statistics import EpochStatistics
from loaders.timing import events
from loaders.workers.engine import Engine
from loaders.workers.messages import NOTHING, Failure, Parcel, Result, Task

# A span is sized to take about this long: long enough that its round trip costs little, short enough to balance the
# load. Each result wakes the consumer, which takes a core from a worker if there are no more cores than workers.
_SPAN_S, _FAR_SPAN_S = 0.01, 0.05
# How many spans per worker a batch is cut into while the cost of a sample is unknown.
_FIRST_SPANS = 4

# Shorter, a nap saves no waking up; longer, a lost worker would be noticed late.
_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.0005, 0.02
# How much later than necessary a batch may be seen to be complete while the consumer waits for it.
_DELAY_S = 0.002

# Unique in this process, so that one engine's results are never taken for another's.
_tickets = itertools.count()


@dataclass
class Received:
    """The merged results of one batch.

    Attributes:
        spec: from the first sample that could be read; `spec_row` is that sample's row.
        broken: a failure that is not the fault of a single sample.
        rows: of a stream, where only the worker knows the number; else None.
    """

    overflow: Overflow = field(default_factory=Overflow)
    failures: dict[int, Failure] = field(default_factory=dict)
    broken: Failure | None = None
    rows: int | None = None
    spec: Any = None
    spec_row: int = 0
    parcel: Parcel | None = None
    value: Any = None
    stream_state: Any = None

    def add(self, result: Result) -> None:
        """Merge one more result."""
        if result.overflow is NOTHING:
            return
        self.overflow.merge(result.overflow)
        for failure in result.failures:
            failure.worker = result.worker
            if failure.row is None:
                self.broken = failure
            else:
                self.failures[failure.row] = failure
        if result.spec is not None and (self.spec is None or result.start < self.spec_row):
            self.spec, self.spec_row = result.spec, result.start
        self.rows = self.rows if result.rows is None else result.rows
        self.parcel = self.parcel or result.parcel
        self.value = self.value if result.value is None else result.value
        self.stream_state = self.stream_state if result.stream_state is None else result.stream_state


@dataclass
class OpenBatch:
    """A batch that is being made. The epoch sets the task, the dispatch adds the results.

    Attributes:
        task: what the workers execute.
        slot: its blocks; fields without memory of their own have none.
        rows: of the batch. For a stream known only once it is complete; 0 then means that the stream has ended.
        first: the position of its first key among this rank's keys of the epoch.
        asked: rows requested; fewer than all while the spec is unknown.
        unreported: rows of spans not yet reported; None before the first span is submitted.
        tickets: those that its results may carry; the current task's is the last.
        is_early: some samples were requested before it had a slot; they are written once all spans are reported.
        abandoned: it will not be delivered.
        replaced: rows that hold substitutes.
        left_out: failures that `on_error` tolerated: (position, index, source, error).
        opened_ns, completed_ns: for a trace.
    """

    task: Task
    slot: list[Block]
    rows: int
    first: int = 0
    lane: int = 0
    asked: int = 0
    unreported: int | None = None
    received: Received = field(default_factory=Received)
    tickets: list[int] = field(default_factory=list)
    is_early: bool = False
    abandoned: bool = False
    replaced: list[int] = field(default_factory=list)
    left_out: list[tuple[int, Any, str | None, str]] = field(default_factory=list)
    statistics: EpochStatistics | None = None
    opened_ns: int = 0
    completed_ns: int = 0

    @property
    def complete(self) -> bool:
        """True once every span is reported."""
        return self.unreported == 0


def new_ticket() -> int:
    """A ticket that no other task has."""
    return next(_tickets)


class Dispatch:
    """Sends tasks to one engine and gives each result to the open batch it belongs to. One iterator at a time uses it.

    Attributes:
        engine: used by this dispatch alone, as is its pool.
        intact: False during a change. It stays False if an exception interrupts the change; the engine, its workers and
            their memory are then not used again.
        cost_s: seconds per row, a moving average; 0 while unknown.
        ahead: the `Opener` of the next epoch, if workers are making batches of it; else None.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.intact = True
        self.notes: list[str] = []  # from workers: what to warn the caller about
        self.cost_s = 0.0
        self.ahead: Any = None
        self._open: dict[int, OpenBatch] = {}
        self._closed = False

    @property
    def pool(self) -> SlotPool:
        """The memory that the engine's workers write to."""
        return self.engine.pool

    def is_usable(self) -> bool:
        """Whether it is open and no change was interrupted, here or in the pool."""
        return self.intact and not self._closed and self.pool.is_intact()

    def spans(self, start: int, rows: int, rows_before: int = 0) -> list[tuple[int, int]]:
        """Rows `start` to `rows`, cut so that every worker gets a share and a span takes about ten milliseconds.

        Spans of a batch that is far from delivery, with `rows_before` it, may take half of the time until then, but no
        more than fifty: at the end of an epoch workers wait for the one that has the last span.
        A single worker gets all rows in one span, since each span costs a check of the process's random generators.
        """
        workers = self.engine.num_workers
        if workers == 1:
            return [(start, rows)] if start < rows else []
        share = math.ceil((rows - start) / workers)
        if self.cost_s == 0.0:
            length = math.ceil(share / _FIRST_SPANS)
        else:
            far = min(int(rows_before / workers / 2), int(_FAR_SPAN_S / self.cost_s)) + 1
            length = max(min(share, int(_SPAN_S / self.cost_s) + 1), far)
        return [(row, min(row + length, rows)) for row in range(start, rows, max(1, length))]

    def nap_s(self, batch: OpenBatch) -> float:
        """The time that a batch still takes, 0 if that is short: results that come meanwhile wait for others.

        Each result that wakes the consumer takes a core from a worker, or the consumer's own time where there are many.
        """
        row_s = self.cost_s / self.engine.num_workers
        # Its last spans take longer than their share: look only so often that this delays it little.
        least_s = min(_DELAY_S, batch.rows * row_s / 8)
        nap_s = min(_LONGEST_NAP_S, max(least_s, (batch.unreported or 0) * row_s))
        return nap_s if nap_s > _SHORTEST_NAP_S else 0.0

    def submit(self, batch: OpenBatch, spans: Sequence[tuple[int, int]]) -> None:
        """Queue spans of the batch. If the engine raises, nothing has changed; a lack of memory fails the batch."""
        try:
            if spans:
                self.engine.submit(batch.task, spans, batch.lane)
        except BufferMemoryError as error:  # no room even for the task: raised when it is this batch's turn
            batch.received.broken, spans = Failure.of(error, "sending"), ()
            # Frames in its traceback refer to the iterator, which must be collectable for `weakref.finalize` to run.
            error.__traceback__ = None
        self._open[batch.task.ticket] = batch
        batch.tickets.append(batch.task.ticket)
        batch.unreported = (batch.unreported or 0) + sum(_weight(start, stop) for start, stop in spans)

    def collect(self) -> bool:
        """Merge the results that are available. Returns whether there were any.

        Raises:
            WorkerLostError: the workers cannot be kept alive, or another iterator's error has stopped them.
        """
        if self._closed:
            raise WorkerLostError(
                "the workers were stopped by an error in another iterator of this loader.\n  Start a new iteration."
            )
        results = self.engine.collect(0)
        for result in results:
            self._accept(result)
        return bool(results)

    def abandon(self, batches: Iterable[OpenBatch]) -> None:
        """Give up these batches. Their slots are taken back once no worker can write to them any more."""
        for batch in batches:
            if batch.complete or batch.unreported is None:
                self.pool.discard(batch.slot)
                self.forget(batch)
            else:
                self.pool.abandon(batch.slot)
                batch.abandoned = True
                self.engine.cancel(batch.task)

    def drop_ahead(self) -> None:
        """Give up the batches of the next epoch."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            self.abandon(ahead.take())

    def close(self, batches: Iterable[OpenBatch] = (), *, force: bool = False) -> None:
        """Stop the engine and take back the slots of its batches. May be called again after an error."""
        self._closed = True
        self.engine.close(force=force)
        ahead = self.ahead.batches if self.ahead is not None else ()
        abandoned = {id(batch): batch for batch in self._open.values() if batch.abandoned}
        for batch in (*batches, *ahead, *abandoned.values()):
            # A thread cannot be killed: a slot that it may still write to is not reused before the thread is done.
            slot, batch.slot = batch.slot, []
            self.pool.discard_after(partial(self._is_read, batch.task.ticket), slot)
        self._open.clear()

    def forget(self, batch: OpenBatch) -> None:
        """Ignore further results for this batch's tickets."""
        while batch.tickets:
            self._open.pop(batch.tickets.pop(), None)

    def _is_read(self, ticket: int) -> bool:
        return any(reading.ticket == ticket for reading in self.engine.reading())

    def _accept(self, result: Result) -> None:
        if result.notes:
            self.notes += result.notes
        batch = self._open.get(result.ticket)
        if batch is None or batch.unreported is None:
            return
        # Rows are counted, not spans: the span of a lost worker may be reported in pieces.
        batch.unreported -= _weight(result.start, result.stop)
        if batch.statistics is not None:
            batch.statistics.take(result, batch.task)
            if events.traces and batch.complete:
                batch.completed_ns = time.perf_counter_ns()
        done = result.stop - result.start
        # The very first sample says nothing about later ones: it also pays for imports and for first touching memory.
        if not (result.cancelled or result.failures or result.spec) and done > 0:
            cost_s = result.elapsed_s / done
            self.cost_s = cost_s if self.cost_s == 0.0 else 0.8 * self.cost_s + 0.2 * cost_s
        if not batch.abandoned:
            batch.received.add(result)
            if batch.received.rows is not None:
                batch.rows = batch.received.rows
        elif batch.complete:
            self.pool.discard(batch.slot)
            self.forget(batch)


def _weight(start: int, stop: int) -> int:
    """Rows of a span, at least 1: the span of an empty batch has to be waited for as well."""
    return max(1, stop - start)
