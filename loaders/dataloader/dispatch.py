"""Open batches: between the order that asks for a batch and its delivery."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loaders.batch.rows import Beside
from loaders.errors import BufferMemoryError, WorkerLostError
from loaders.memory.blocks import Block
from loaders.report.statistics import Measures
from loaders.timing import events
from loaders.workers.engine import Engine
from loaders.workers.messages import Failure, Order, Outcome, Parcel

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
        order: what was asked for.
        slot: its blocks; fields without memory of their own have none.
        first: which of this rank's keys is the first in it, counted from the start of the epoch.
        rows: of the batch. For a stream known only once it is done; 0 then says that the stream has ended.
        asked: rows that were asked for while the spec was unknown.
        replaced: rows that hold substitutes.
        unreported: rows of runs that are not reported yet; None before the first run was submitted.
        measures: of the epoch it belongs to.
        opened_ns, completed_ns: for a trace.
    """

    order: Order
    slot: list[Block]
    rows: int
    first: int = 0
    lane: int = 0
    asked: int = 0
    unreported: int | None = None
    beside: Beside = field(default_factory=Beside)
    failures: dict[int, Failure] = field(default_factory=dict)
    broken: Failure | None = None
    parcel: Parcel | None = None
    result: Any = None
    outcome_spec: Any = None
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
    """A ticket for one more order."""
    return next(_tickets)


class Dispatch:
    """Sends orders to one engine and gives each outcome to the open batch it belongs to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cost_s = 0.0  # of one row, moving average; 0 while unknown
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
                self.engine.submit(batch.order, runs, batch.lane)
        except BufferMemoryError as error:  # no room even for the order: told when it is this batch's turn
            batch.broken, runs = Failure.of(error, "ordering"), ()
            # The frames behind its traceback know the iterator, which `weakref.finalize` must be able to outlive.
            error.__traceback__ = None
        self._open[batch.order.ticket] = batch
        batch.unreported = (batch.unreported or 0) + sum(_weight(start, stop) for start, stop in runs)

    def collect(self, timeout_s: float | None) -> bool:
        """Take in the outcomes that are there. Returns whether there was one.

        Raises:
            WorkerLostError: the workers cannot be kept alive, or an iterator that shared them has stopped them.
        """
        if self._closed:
            raise WorkerLostError(
                "the workers were stopped by an error in another iterator of this loader.\n  Iterate the loader anew."
            )
        outcomes = self.engine.collect(timeout_s)
        for outcome in outcomes:
            self._accept(outcome)
        return bool(outcomes)

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
                self.engine.cancel(batch.order)
                if batch.complete:
                    del self._open[ticket]

    def close(self, batches: Sequence[OpenBatch]) -> None:
        """Stop the engine; after that nobody writes into the slots of `batches`."""
        self._closed = True
        self.engine.close()
        for batch in (*batches, *(each for each in self._open.values() if each.abandoned)):
            # A thread cannot be killed: the slot that it may still write into is not used again before it is done.
            self.engine.pool.discard_after(partial(self._is_read, batch.order.ticket), batch.slot)
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
        self._open.pop(batch.order.ticket, None)

    def _accept(self, outcome: Outcome) -> None:
        batch = self._open.get(outcome.ticket)
        if batch is None or batch.unreported is None:
            return
        # Rows are counted, not runs: the run of a worker that was lost may come back in pieces.
        batch.unreported -= _weight(outcome.start, outcome.stop)
        if batch.measures is not None:
            batch.measures.take(outcome, batch.order)
            if events.traces and batch.complete:
                batch.completed_ns = time.perf_counter_ns()
        done = outcome.stop - outcome.start
        # The first sample of all tells nothing of those behind it: it pays for imports, and for memory touched first.
        if not (outcome.cancelled or outcome.failures or outcome.spec) and done > 0:
            cost_s = outcome.elapsed_s / done
            self.cost_s = cost_s if self.cost_s == 0.0 else 0.8 * self.cost_s + 0.2 * cost_s
        if batch.abandoned:
            if batch.complete:
                self.engine.pool.discard(batch.slot)
                del self._open[outcome.ticket]
            return
        batch.beside.merge(outcome.beside)
        for failure in outcome.failures:
            failure.worker = outcome.worker
            if failure.row is None:
                batch.broken = failure
            else:
                batch.failures[failure.row] = failure
        if outcome.rows is not None:
            batch.rows = outcome.rows
        if outcome.stream_state is not None:
            batch.stream_state = outcome.stream_state
        if outcome.spec is not None:
            batch.outcome_spec = outcome.spec
        if outcome.parcel is not None:
            batch.parcel = outcome.parcel
        if outcome.result is not None:
            batch.result = outcome.result


def _weight(start: int, stop: int) -> int:
    """Rows of a run; the order for an empty batch is something to wait for, too."""
    return max(1, stop - start)
