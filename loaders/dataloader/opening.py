"""Opens the batches of one epoch before the consumer asks for them: draws keys, takes slots, sends tasks.

Persistent processes need not wait for the next epoch to begin: while the consumer uses the last batches of an epoch,
an opener of the next one has its first batches made, and the next iteration takes it over if it is the one foreseen.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from loaders.dataloader.checkpoint import Position
from loaders.dataloader.cursor import SamplerCursor
from loaders.dataloader.dispatch import Dispatch, OpenBatch, new_ticket
from loaders.dataloader.orders import world_of
from loaders.dataloader.plan import Plan
from loaders.errors import BufferMemoryError
from loaders.randomness.ranks import drawing_rank
from loaders.report.statistics import EpochStatistics
from loaders.system.interrupts import is_interrupt
from loaders.timing import events
from loaders.workers.messages import Task


class Opener:
    """The open batches of one epoch, and what is needed to open more.

    Args:
        plan: the loader's; `in_order` as well.
        cursor: draws the keys; None for streams.
        position: where to begin.
        seed: of the samples' randomness.
        statistics: of the epoch.

    Attributes:
        batches: open, in the order of their delivery.
        lanes: streams: serial of the next batch per worker; -1 if ended.
        exhausted: whether all batches were opened.
        sampler_error: to be raised after the batches that came before it.
        is_short: whether a batch could not be opened, for lack of memory.
    """

    def __init__(
        self,
        plan: Plan,
        cursor: SamplerCursor | None,
        position: Position,
        seed: int,
        statistics: EpochStatistics,
        *,
        in_order: bool,
    ) -> None:
        self.cursor = cursor
        self.statistics = statistics
        self._plan = plan
        self._in_order = in_order
        self._seed = seed
        self._rank, self._ranks = drawing_rank(*(world_of(cursor.sampler) if cursor is not None else (0, 1)))
        self.begin_at(position)

    def begin_at(self, position: Position) -> None:
        """Open the batches from a position of the epoch on. Those that are open are forgotten."""
        if self.cursor is not None:
            self.cursor.forget(position.keys)
            self.cursor.rewind()
        self.batches: deque[OpenBatch] = deque()
        self.epoch = position.epoch
        self.lanes = list(position.lanes)
        self.exhausted = False
        self.sampler_error: Exception | None = None
        self.is_short = False
        self._bases = list(zip(position.lanes, position.streams, strict=True))
        self._lane = position.lane
        self._drawn: list[Any] = []  # the keys of a batch that is not open yet, for lack of memory

    def following(self) -> Opener | None:
        """An opener of the next epoch, if the keys of that epoch can be computed in advance."""
        cursor = self.cursor.following() if self.cursor is not None else None
        if cursor is None:
            return None
        position = Position.start(self.epoch + 1)
        statistics = EpochStatistics(position.epoch)
        return Opener(self._plan, cursor, position, self._seed, statistics, in_order=self._in_order)

    def is_foreseen(self, ahead: Opener) -> bool:
        """Whether the batches of `ahead` are those that this opener, which has opened none, would open."""
        return (
            (ahead._plan, ahead._seed, ahead.epoch) == (self._plan, self._seed, self.epoch)
            and (ahead._rank, ahead._ranks) == (self._rank, self._ranks)
            and ahead.cursor is not None
            and self.cursor is not None
            and self.cursor.is_foreseen(ahead.cursor)
        )

    def take_over(self, ahead: Opener) -> Opener:
        """`ahead`, in the place of this opener."""
        assert self.cursor is not None
        assert ahead.cursor is not None
        ahead.cursor.replace(self.cursor)
        return ahead

    def take(self) -> deque[OpenBatch]:
        """The open batches, which are the caller's from now on."""
        batches, self.batches = self.batches, deque()
        return batches

    def top_up(self, dispatch: Dispatch, depth: int, *, needed: bool = False) -> None:
        """Open batches until `depth` are open, while there are keys.

        Raises:
            BufferMemoryError: there is no memory for even one batch, and one is `needed` now.
        """
        batches, num_workers = self.batches, dispatch.engine.num_workers
        while not self.exhausted and len(batches) < depth:
            # The first samples determine the spec; until it is known, there is at most one span for each worker.
            if self._plan.by_rows and self._plan.spec is None and self._asked() >= num_workers:
                return
            if self.cursor is not None and not self._drawn:
                try:
                    self._drawn.append(self.cursor.next_batch())
                except StopIteration:
                    self.exhausted = True
                    return
                except Exception as error:
                    if is_interrupt(error):
                        raise
                    self.sampler_error, self.exhausted = error, True
                    return
            try:
                if self.cursor is None:
                    self.exhausted = not self._open_stream(dispatch)
                else:
                    self._open_keys(dispatch, self.cursor)
            except BufferMemoryError:
                if needed and not batches:
                    raise
                self.is_short = True
                return  # fewer must do until the consumer releases some

    def new_batch(self, dispatch: Dispatch, keys: Sequence[Any], position: int, rows: int) -> OpenBatch:
        """A batch with a slot and a task that is not sent yet.

        Raises:
            BufferMemoryError: there is no memory for it.
        """
        spec, sizes, room = self._plan.layout()
        slot = dispatch.pool.acquire([size for size in sizes if size > 0])
        at = iter(slot)
        blocks = [
            (block.offset, block.nbytes) if (block := next(at) if size > 0 else None) else (0, 0) for size in sizes
        ]
        places = tuple(blocks) if spec is None else spec.spread(blocks, room)
        task = Task(new_ticket(), keys, position, self.epoch, self._seed, spec, places, self._ranks)
        opened_ns = time.perf_counter_ns() if events.traces else 0
        return OpenBatch(task, slot, rows, statistics=self.statistics, opened_ns=opened_ns)

    def _asked(self) -> int:
        # Rows where workers share a batch; else batches, each made by one worker.
        return sum(batch.asked if self._plan.by_spans else 1 for batch in self.batches)

    def _open_keys(self, dispatch: Dispatch, cursor: SamplerCursor) -> None:
        keys = self._drawn[0]
        rows, first = len(keys), cursor.position - len(keys)
        self._plan.room = max(self._plan.room, rows)
        batch = self.new_batch(dispatch, keys, self._rank + first * self._ranks, rows)
        batch.first = first
        self._drawn = []
        self._submit(dispatch, batch)

    def _open_stream(self, dispatch: Dispatch) -> bool:
        """Open a batch of a worker whose stream has not ended; False if all have."""
        lanes = self.lanes
        following = (*range(self._lane, len(lanes)), *range(self._lane))
        running = [lane for lane in following if lanes[lane] >= 0]
        if not running:
            return False
        lane = running[0]
        if not self._in_order:
            # The batches of a slow worker must not take the places of all others.
            opened = Counter(batch.lane for batch in self.batches)
            lane = min(running, key=opened.__getitem__)
        serial, rows = lanes[lane], self._plan.room
        # Each worker has its own stream, and its samples their own positions, which key their randomness.
        batch = self.new_batch(dispatch, [serial], self._rank + ((lane << 40) + serial * rows) * self._ranks, rows)
        batch.lane, batch.task.resume = lane, self._bases[lane]
        lanes[lane] += 1
        self._lane = (lane + 1) % len(lanes)
        self._submit(dispatch, batch)
        return True

    def _submit(self, dispatch: Dispatch, batch: OpenBatch) -> None:
        batch.asked = batch.rows
        if not self._plan.by_spans:
            spans = [(0, len(batch.task.keys))]
        elif batch.task.spec is None:
            # One sample per worker, so that none has to wait for another.
            batch.asked = min(max(1, dispatch.engine.num_workers - self._asked()), batch.rows)
            spans = [(row, row + 1) for row in range(batch.asked)]
        else:
            spans = dispatch.spans(0, batch.rows, sum(each.unreported or 0 for each in self.batches))
        dispatch.submit(batch, spans)
        self.batches.append(batch)
