"""Open batches: between the order that asks for a batch and its delivery."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders.batching.rows import Beside
from loaders.batching.slots import Block
from loaders.engines.protocol import Engine
from loaders.engines.work import Failure, Order, Outcome, Parcel

# Tickets are unique in this process, so that iterators can share an engine.
_tickets = itertools.count()


@dataclass
class OpenBatch:
    """A batch that is being made.

    Attributes:
        order: what was asked for.
        slot: its blocks; fields without memory of their own have none.
        rows: of the batch. For a stream known only once it is done; 0 then says that the stream has ended.
        asked: rows that were asked for while the spec was unknown.
        runs_left: runs that are not reported yet; None before the first was submitted.
    """

    order: Order
    slot: list[Block]
    rows: int
    lane: int = 0
    asked: int = 0
    runs_left: int | None = None
    beside: Beside = field(default_factory=Beside)
    failures: dict[int, Failure] = field(default_factory=dict)
    broken: Failure | None = None
    parcel: Parcel | None = None
    result: Any = None
    outcome_spec: Any = None
    worker: int = 0
    abandoned: bool = False

    @property
    def complete(self) -> bool:
        """True once every run is reported."""
        return self.runs_left == 0


def new_order(
    keys: Sequence[Any], position: int, epoch: int, seed: int, spec: Any, blocks: Sequence[tuple[int, int]]
) -> Order:
    """An order with a ticket of its own."""
    return Order(next(_tickets), keys, position, epoch, seed, spec, tuple(blocks))


class Dispatch:
    """Sends orders to one engine and gives each outcome to the open batch it belongs to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cost_s = 0.0  # of one row, moving average; 0 while unknown
        self._open: dict[int, OpenBatch] = {}

    def submit(self, batch: OpenBatch, runs: Sequence[tuple[int, int]]) -> None:
        """Queue runs of the batch."""
        self._open[batch.order.ticket] = batch
        batch.runs_left = (batch.runs_left or 0) + len(runs)
        if runs:
            self.engine.submit(batch.order, runs, batch.lane)

    def collect(self, timeout_s: float | None) -> bool:
        """Take in the outcomes that are there. Returns whether there was one."""
        outcomes = self.engine.collect(timeout_s)
        for outcome in outcomes:
            self._accept(outcome)
        return bool(outcomes)

    def abandon(self, batches: Sequence[OpenBatch]) -> None:
        """Nobody wants these batches any more. Their slots are taken back when the last worker is done with them."""
        pool = self.engine.pool
        for batch in batches:
            if batch.complete or batch.runs_left is None:
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
        self.engine.close()
        for batch in (*batches, *(each for each in self._open.values() if each.abandoned)):
            if batch.slot:
                self.engine.pool.discard(batch.slot)
                batch.slot = []
        self._open.clear()

    def forget(self, batch: OpenBatch) -> None:
        """The batch is delivered."""
        self._open.pop(batch.order.ticket, None)

    def _accept(self, outcome: Outcome) -> None:
        batch = self._open.get(outcome.ticket)
        if batch is None or batch.runs_left is None:
            return
        batch.runs_left -= 1
        batch.worker = outcome.worker
        done = outcome.stop - outcome.start
        if not (outcome.cancelled or outcome.failures) and done > 0:
            cost_s = outcome.elapsed_s / done
            self.cost_s = cost_s if self.cost_s == 0.0 else 0.8 * self.cost_s + 0.2 * cost_s
        if batch.abandoned:
            if batch.complete:
                self.engine.pool.discard(batch.slot)
                del self._open[outcome.ticket]
            return
        batch.beside.merge(outcome.beside)
        for failure in outcome.failures:
            if failure.row is None:
                batch.broken = failure
            else:
                batch.failures[failure.row] = failure
        if outcome.rows is not None:
            batch.rows = outcome.rows
        if outcome.spec is not None:
            batch.outcome_spec = outcome.spec
        if outcome.parcel is not None:
            batch.parcel = outcome.parcel
        if outcome.result is not None:
            batch.result = outcome.result
