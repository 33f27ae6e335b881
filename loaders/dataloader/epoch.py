"""One pass over a dataset: opens batches ahead of the consumer, delivers them in order."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from loaders.batch.rows import RowWriter
from loaders.dataloader.checkpoint import Progress
from loaders.dataloader.cursor import KeyStream, inner_sampler, world_of
from loaders.dataloader.delivery import Delivery
from loaders.dataloader.dispatch import Dispatch, OpenBatch, new_ticket
from loaders.dataloader.on_error import Skipping, Substituting
from loaders.dataloader.plan import Plan
from loaders.errors import BufferMemoryError, WorkerLostError, WorkerTimeoutError
from loaders.randomness.ranks import drawing_rank
from loaders.report.statistics import Measures
from loaders.timing import events
from loaders.workers.engine import describe_work
from loaders.workers.messages import Task, warn_of

if TYPE_CHECKING:
    from loaders.dataloader.loader import DataLoader


class Epoch(Iterator[Any]):
    """The iterator of a `DataLoader`.

    Args:
        loader: whose batches these are.
        dispatch: the engine's open batches.
        keys: what the sampler gives; None for streams.
        progress: where to begin; kept up to date with what is delivered.
        seed: of the samples' randomness.
        owns_engine: True where the workers end with this epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        dispatch: Dispatch,
        keys: KeyStream | None,
        progress: Progress,
        seed: int,
        *,
        owns_engine: bool,
    ) -> None:
        self._loader = loader
        self._dispatch = dispatch
        self._plan = loader._plan
        self._keys = keys
        self.progress = progress
        self._seed = seed
        self._rank, self._ranks = drawing_rank(*(world_of(inner_sampler(loader)) if keys is not None else (0, 1)))
        self._first = progress.keys
        if keys is None and not progress.lanes:
            progress.lanes, progress.streams = [0] * dispatch.engine.num_workers, [None] * dispatch.engine.num_workers
        self._bases = list(zip(progress.lanes, progress.streams, strict=True))
        self._lanes = list(progress.lanes)  # streams: serial of the next batch per worker; -1 if ended
        self._lane = progress.lane
        self._open: deque[OpenBatch] = deque()
        self._error: Exception | None = None  # of the sampler: raised behind the batches that came before it
        self._exhausted = False
        self._skipping = Skipping(loader, progress) if loader.on_error == "skip" else None
        self._substituting = Substituting(loader, progress) if loader.on_error == "substitute" else None
        self.delivery = Delivery(loader, dispatch.engine.pool, progress)
        self.measures = Measures(progress.epoch)
        self._is_short = False  # a batch could not be opened: there was no memory
        self._drawn: list[list[Any]] = []  # the keys of a batch that there was no memory for yet
        self._pid = os.getpid()
        self._stop = weakref.finalize(
            self, _stop, self._pid, dispatch, self._open, self._plan, owns_engine, self.measures
        )
        if loader.num_workers > 0:
            try:
                self._top_up()
            except BaseException:  # a worker that cannot be started, usually: the others have nothing to do here
                self._stop()
                loader._forget_engine()
                raise

    def __next__(self) -> Any:
        if not self._stop.alive:
            raise StopIteration
        self._loader._has_begun(self.progress, self.measures)
        if self._loader.num_workers > 0 and self._pid != os.getpid():
            raise WorkerLostError(
                f"the workers of this iterator belong to process {self._pid}, from which this one was forked.\n"
                "  Iterate the loader itself: it starts workers of its own here."
            )
        self.measures.ask()
        batch = self.next_complete()
        skipping = self._skipping
        if skipping is not None and (skipping.has_more if batch is None else skipping.concerns(self, batch)):
            delivered = skipping.deliver(self, batch)
            if delivered is None:
                self._end()
            made, keys = delivered
            rows = len(keys)
            self.progress.first, self.progress.keys = self.progress.keys, skipping.delivered
        elif batch is None:
            self._end()
        else:
            made, keys, rows = self.delivery.make(batch), list(batch.task.keys), batch.rows
        if skipping is not None:
            self.progress.sizes, self.progress.sized = list(skipping.sizes), skipping.sized
        finished = self.delivery.finish(made, keys)
        self.measures.give(rows, self._dispatch.engine.pool.waited_ns)
        if self._is_short:
            self.measures.short, self._is_short = self.measures.short + 1, False
        if (tuner := self._loader._tuner) is not None:
            self._loader.num_workers = tuner.look(self.measures, self._dispatch.engine)
        return finished

    def __len__(self) -> int:
        return len(self._loader)

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError("an iterator of a DataLoader cannot be pickled; pickle the loader.")

    @property
    def is_last(self) -> bool:
        """Whether nothing comes behind the batch that was complete last."""
        self._top_up()
        return self._exhausted and not self._open

    def _end(self) -> NoReturn:
        if self._error is not None:
            # A sampler that goes on behind its error is followed.
            error, self._error, self._exhausted = self._error, None, False
            try:
                raise error
            finally:
                del error  # whose traceback holds this frame
        self.measures.end()
        self._stop()
        self._loader._has_ended(self.progress)
        raise StopIteration

    # -- opening batches

    def _top_up(self, *, needed: bool = False) -> None:
        """Keep as many batches open as the plan says, as long as there are keys.

        Raises:
            BufferMemoryError: there is no memory for a single one, and one is `needed` now.
        """
        while not self._exhausted and len(self._open) < self._plan.depth(self._dispatch.engine.num_workers):
            # The first sample tells what a batch looks like; only then can more of them be opened.
            if self._plan.by_rows and self._plan.spec is None and self._open:
                return
            if self._keys is not None and not self._drawn:
                try:
                    self._drawn.append(self._next_keys(self._keys))
                except StopIteration:
                    self._exhausted = True
                    return
                except Exception as error:
                    self._error, self._exhausted = error, True
                    return
            try:
                if self._keys is None:
                    self._exhausted = not self._open_stream()
                else:
                    self._open_keys()
            except BufferMemoryError:
                if needed and not self._open:
                    raise
                self._is_short = True
                return  # fewer will do until the consumer lets go of some

    def _next_keys(self, keys: KeyStream) -> list[Any]:
        if self._skipping is not None and (size := self._skipping.batch_size):
            # A shorter batch makes up for samples that were moved up into those before it.
            taken = len(self._skipping.carried) + sum(batch.rows for batch in self._open)
            keys.size = size - taken % size
        return next(keys)

    def _open_keys(self) -> None:
        keys = self._drawn[0]
        self._plan.room = max(self._plan.room, len(keys))
        batch = self._new_batch(keys, self._rank + self._first * self._ranks, len(keys))
        batch.first = self._first
        self._drawn.clear()
        self._first += len(keys)
        self._start(batch)

    def _open_stream(self) -> bool:
        """Open the next batch of the next worker whose stream has not ended; False if all have."""
        if all(serial < 0 for serial in self._lanes):
            return False
        while self._lanes[self._lane] < 0:
            self._lane = (self._lane + 1) % len(self._lanes)
        serial, lane = self._lanes[self._lane], self._lane
        rows = self._plan.room
        # Each worker has a stream of its own: so has the randomness of its samples.
        batch = self._new_batch([serial], self._rank + ((lane << 40) + serial * rows) * self._ranks, rows)
        batch.lane, batch.task.resume = lane, self._bases[lane]
        self._lanes[lane] += 1
        self._lane = (lane + 1) % len(self._lanes)
        self._start(batch)
        return True

    def _new_batch(self, keys: Sequence[Any], position: int, rows: int) -> OpenBatch:
        spec, sizes = self._plan.layout()
        slot = self._dispatch.engine.pool.acquire([size for size in sizes if size > 0])
        at = iter(slot)
        blocks = [
            (block.offset, block.nbytes) if (block := next(at) if size > 0 else None) else (0, 0) for size in sizes
        ]
        task = Task(new_ticket(), keys, position, self.progress.epoch, self._seed, spec, tuple(blocks), self._ranks)
        opened_ns = time.perf_counter_ns() if events.traces else 0
        return OpenBatch(task, slot, rows, measures=self.measures, opened_ns=opened_ns)

    def _start(self, batch: OpenBatch) -> None:
        batch.asked = batch.rows
        if not self._plan.by_runs:
            runs = [(0, len(batch.task.keys))]
        elif batch.task.spec is None:
            batch.asked = min(1, batch.rows)
            runs = [(0, 1)] if batch.rows else []
        else:
            runs = self._dispatch.runs(0, batch.rows)
        try:
            self._dispatch.submit(batch, runs)
        except BaseException:
            self.delivery.discard(batch)
            raise
        self._open.append(batch)

    # -- waiting

    def next_complete(self) -> OpenBatch | None:
        """The batch to deliver next, once it is complete; None at the end."""
        self._collect(0)
        deadline = time.monotonic() + self._loader.timeout if self._loader.timeout > 0 else None
        while True:
            self._top_up(needed=True)
            batch = self._choose()
            if batch is None and not self._open:
                return None
            if batch is not None and self._is_whole(batch):
                warn_of(self._dispatch.notes, self._loader._told, stacklevel=3)
                self._open.remove(batch)
                self._dispatch.forget(batch)
                self._plan.learn(batch.overflow.needs, batch.parcel)
                if self._loader.num_workers > 0:
                    self._top_up()
                return batch
            if (
                batch is None
                and not self._collect(None if deadline is None else max(0.0, deadline - time.monotonic()))
                and deadline is not None
                and time.monotonic() >= deadline
            ):
                self._time_out()

    def _collect(self, timeout_s: float | None) -> bool:
        try:
            if timeout_s == 0:
                return self._dispatch.collect(0)
            since_ns, all_had_work = time.perf_counter_ns(), self._is_work_for_all()
            try:
                return self._dispatch.collect(timeout_s)
            finally:
                self.measures.waited(since_ns, all_had_work=all_had_work)
        except Exception:  # workers cannot be kept alive: there is nobody left to wait for
            self._stop()
            if self._loader._dispatch is self._dispatch:
                self._loader._forget_engine()
            raise

    def _is_work_for_all(self) -> bool:
        """Whether every worker has a run, or one waits for it."""
        if self._plan.by_runs:
            left = sum(batch.unreported or 0 for batch in self._open)
        else:
            left = sum(not batch.complete for batch in self._open)
        return left >= self._dispatch.engine.num_workers

    def _choose(self) -> OpenBatch | None:
        """The first open batch if it is complete; without `in_order` the first that is."""
        for batch in self._open:
            if batch.complete:
                return batch
            if self._loader.in_order:
                return None
        return None

    def _is_whole(self, batch: OpenBatch) -> bool:
        """Whether a batch whose runs are all reported can be delivered; else it goes on."""
        if self._keys is None and batch.rows == 0:
            self._lanes[batch.lane] = self.progress.lanes[batch.lane] = -1
            self._drop(batch)
            return False
        if batch.found_spec is not None and batch.task.spec is None:
            self._begin_rows(batch)
            if not batch.complete:
                return False
        if batch.asked < batch.rows and batch.broken is None and self._loader.on_error != "raise":
            # The sample that was to show the spec failed: ask the next one.
            self._dispatch.submit(batch, [(batch.asked, batch.asked + 1)])
            batch.asked += 1
            return False
        if self._substituting is not None:
            try:
                return self._substituting.is_whole(self._dispatch, batch)
            except Exception:
                self._drop(batch)
                raise
        return True

    def _begin_rows(self, batch: OpenBatch) -> None:
        """The first sample is there: from now on every batch has a slot."""
        if self._plan.spec is None:
            self._plan.spec = batch.found_spec
        full = self._new_batch(batch.task.keys, batch.task.position, batch.rows)
        full.task.attempt, full.task.resume = batch.task.attempt, batch.task.resume
        self._dispatch.forget(batch)
        offsets = [offset for offset, _ in full.task.blocks]
        batch.task, batch.slot, seen = full.task, full.slot, batch.overflow.samples
        batch.overflow.samples = []
        writer = RowWriter(self._plan.spec, self._dispatch.engine.pool.arena.buffer, offsets, batch.rows)
        for row, sample in seen:
            writer.write(row, sample, batch.overflow)
        if batch.asked < batch.rows:
            start, batch.asked = batch.asked, batch.rows
            self._dispatch.submit(batch, self._dispatch.runs(start, batch.rows))
        self._top_up()

    def _drop(self, batch: OpenBatch) -> None:
        self._open.remove(batch)
        self._dispatch.forget(batch)
        self._dispatch.engine.pool.discard(batch.slot)

    def _time_out(self) -> None:
        dataset, timeout_s = self._loader.dataset, self._loader.timeout
        tasks = {batch.task.ticket: batch.task for batch in self._open}
        busy = [
            f"{describe_work(dataset, self._plan.fetch, task, reading.row)[-1]} for {reading.since_s:.1f} s"
            for reading in self._dispatch.engine.reading()
            if (task := tasks.get(reading.ticket)) is not None
        ]
        self._stop()
        self._loader._forget_engine()
        raise WorkerTimeoutError(
            f"DataLoader timed out after {timeout_s} seconds; being read: {'; '.join(busy[:4]) or 'nothing'}.\n"
            "  Read that sample by itself, or raise timeout=."
        )

    # -- for policies

    def reopen(self, batch: OpenBatch) -> None:
        """Ask for the samples of a complete batch themselves, but those that failed; it is the next to be complete."""
        self.delivery.discard(batch)
        task = replace(batch.task, ticket=new_ticket(), spec=None, blocks=(), raw=True)
        again = OpenBatch(task, [], batch.rows, batch.first, asked=batch.rows, failures=batch.failures)
        again.measures = self.measures
        self._dispatch.submit(again, [(row, row + 1) for row in range(batch.rows) if row not in batch.failures])
        self._open.appendleft(again)


def _stop(
    pid: int, dispatch: Dispatch, open_batches: deque[OpenBatch], plan: Plan, owns_engine: bool, measures: Measures
) -> None:
    # Runs when an epoch is exhausted, dropped or garbage: it must not know the epoch itself.
    if pid != os.getpid():
        return  # in a forked child: workers and slots are the parent's
    measures.leave()
    if owns_engine:
        dispatch.close(list(open_batches))
    else:
        dispatch.abandon(list(open_batches))
    open_batches.clear()
    # What the next epoch needs is kept: the open batches, the one being delivered, and the one before it.
    engine = dispatch.engine
    engine.pool.trim(plan.sizes() * (plan.depth(engine.num_workers) + 2))
