"""One pass over a dataset: opens batches ahead of the consumer, delivers them in order.

A signal handler may raise at any instruction here. A batch is therefore handed out by assignments alone, after
everything that could raise. If an exception interrupts anything before that, the next call discards the workers and
their memory and makes the batches that were not handed out again. They are the same, since a task is a pure function.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from loaders.batch.rows import RowWriter
from loaders.dataloader.auto_workers import Tuner
from loaders.dataloader.checkpoint import Position
from loaders.dataloader.cursor import SamplerCursor
from loaders.dataloader.delivery import Delivery, overflow_count
from loaders.dataloader.dispatch import Dispatch, OpenBatch, Received, new_ticket
from loaders.dataloader.engines import Engines, EngineSetup
from loaders.dataloader.epochs import EpochLog, Epochs
from loaders.dataloader.on_error import LeftOut, Substituting, skip_failed
from loaders.dataloader.opening import Opener
from loaders.dataloader.plan import Options, Plan
from loaders.errors import BufferMemoryError, WorkerLostError, WorkerTimeoutError
from loaders.report.statistics import EpochStatistics
from loaders.system.interrupts import is_interrupt
from loaders.workers.engine import describe_work
from loaders.workers.messages import warn_of


class _Made(NamedTuple):
    """What the next call hands out, a batch or an error, and the loader's position after it."""

    batch: Any
    error: BaseException | None
    position: Position
    overflow_count: int
    is_last: bool = False


class _Work:
    """The workers and open batches of an epoch. Its finalizer ends them, and must not refer to the epoch itself."""

    def __init__(self, opener: Opener) -> None:
        self.dispatches: list[Dispatch] = []  # one, or none
        self.opener = opener


class _RefusedError(Exception):
    """Too many samples failed in a row while the failed samples of a batch were being substituted."""

    def __init__(self, batch: OpenBatch, error: BaseException) -> None:
        super().__init__()
        self.batch = batch
        self.error = error


class Epoch(Iterator[Any]):
    """The iterator of a `DataLoader`. Several threads may share it: each batch goes to one of them.

    Args:
        epochs: the loader's.
        log: this epoch's; its position is where to begin.
        engines, setup: where workers come from, and of what kind.
        plan, options: the loader's.
        delivery: makes what the caller gets.
        cursor_of: makes the sampler's cursor at a position; None for streams.
        length: returns the loader's length.
        tuner: finds the number of workers, which `on_workers` receives; None where the number is fixed.
    """

    def __init__(
        self,
        epochs: Epochs,
        log: EpochLog,
        engines: Engines,
        setup: EngineSetup,
        plan: Plan,
        options: Options,
        delivery: Delivery,
        cursor_of: Callable[[Position], SamplerCursor] | None,
        length: Callable[[], int],
        tuner: Tuner | None,
        on_workers: Callable[[int], None],
    ) -> None:
        self._epochs = epochs
        self._log = log
        self._engines = engines
        self._setup = setup
        self._plan = plan
        self._options = options
        self._delivery = delivery
        self._cursor_of = cursor_of
        self._length = length
        self._tuner = tuner
        self._on_workers = on_workers
        self._pid = os.getpid()
        self._turn = threading.RLock()  # one thread at a time makes a batch
        self._is_inside = False
        self._made: _Made | None = None
        self._is_over = False
        self._foresees_none = False  # the keys of the next epoch cannot be known now
        self._substituting = Substituting(options.dataset, by_spans=plan.by_spans)
        self._start = log.position.batches
        self._work = _Work(self._opener_at(log.position))
        self._begin_at(log.position)
        self._stop = weakref.finalize(self, _stop, self._pid, engines, self._work, plan, log)
        if options.num_workers > 0:
            try:
                with self._turn:
                    self._is_inside = True
                    self._recover()
                    dispatch = self._dispatch
                    dispatch.intact = False
                    self._top_up()
                    dispatch.intact = True
                    self._is_inside = False
            except BaseException:  # usually a worker that cannot be started: stop the others
                self._stop()
                raise

    def __next__(self) -> Any:
        log, epochs = self._log, self._epochs
        while True:
            with self._turn:
                if self._made is None and not self._is_over:
                    self._make()
            # Assignments alone from here on: neither a signal handler nor another thread runs between them.
            made = self._made
            if made is not None:
                self._made = None
                log.position = made.position
                epochs.overflow_count = made.overflow_count
                if made.error is None:
                    return made.batch
                error, made = made.error, None
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
            if self._is_over:
                raise StopIteration

    def __len__(self) -> int:
        return self._length()

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError("an iterator of a DataLoader cannot be pickled; pickle the loader.")

    @property
    def statistics(self) -> EpochStatistics:
        """The measurements of this iteration."""
        return self._log.statistics

    def uses(self, dispatch: Dispatch) -> bool:
        """Whether this iterator still uses these workers."""
        return dispatch in self._work.dispatches

    def give_up_workers(self) -> bool:
        """Give up the workers; if it continues, it opens others. Returns False while it is busy."""
        taken: list[bool] = []
        try:
            taken.extend(map(self._turn.acquire, (False,)))
            if not taken[0] or self._is_inside:
                return False
            work, dispatch = self._work, self._dispatch
            batches = work.opener.take()
            if dispatch.is_usable():
                dispatch.intact = False
                dispatch.abandon(batches)
                dispatch.intact = True
            work.dispatches = []
            self._setup = self._setup._replace(persistent=False)
            return True
        finally:
            if taken and taken[0]:
                self._turn.release()

    # -- making the next batch

    @property
    def _dispatch(self) -> Dispatch:
        return self._work.dispatches[-1]

    def _make(self) -> None:
        """Make what is handed out next. After an interruption at any point, it can simply be called again."""
        if self._is_inside:
            raise RuntimeError("this iterator is in the middle of making a batch: a signal handler cannot ask for one.")
        if self._options.num_workers > 0 and self._pid != os.getpid():
            raise WorkerLostError(
                f"the workers of this iterator belong to process {self._pid}, from which this one was forked.\n"
                "  Iterate the loader itself: it starts workers of its own here."
            )
        self._is_inside = True
        try:
            self._epochs.begin(self._log)
            if not (self._work.dispatches and self._dispatch.is_usable()):
                self._recover()
            dispatch = self._dispatch
            dispatch.intact = False
            made = self._next_made()
            # Assignments alone: what was made is either kept or made again.
            self._made = made
            if made is None or made.is_last:
                self._is_over = True
            dispatch.intact = True
            warn_of(dispatch.notes, self._epochs.told, stacklevel=3)
        finally:
            self._is_inside = False
        if self._is_over:
            self._stop()

    def _recover(self) -> None:
        """Get new workers, and restart after the last batch that was handed out."""
        work = self._work
        for dispatch in work.dispatches:
            self._engines.throw_away(dispatch)
        work.dispatches = []
        self._begin_at(self._log.position)
        self._engines.open(self._setup, self, work.dispatches)
        self._take_what_is_ahead()

    def _opener_at(self, position: Position) -> Opener:
        cursor = self._cursor_of(position) if self._cursor_of is not None else None
        if cursor is None and not position.lanes:
            workers = max(1, self._options.num_workers)
            self._log.position = position._replace(lanes=(0,) * workers, streams=(None,) * workers)
        assert self._epochs.seed is not None
        position, seed, in_order = self._log.position, self._epochs.seed, self._options.in_order
        return Opener(self._plan, cursor, position, seed, self._log.statistics, in_order=in_order)

    def _begin_at(self, position: Position) -> None:
        """Continue at a position of this epoch."""
        self._at = position  # the position handed out, advanced by what was left out or has ended since
        self._opener.begin_at(position)
        self._pending: OpenBatch | None = None  # complete; delivered after the error of one of its samples
        self._left_out = LeftOut(self._options.max_errors, apart=self._options.num_workers > 0)

    def _take_what_is_ahead(self) -> None:
        """Take over the first batches of this epoch if persistent workers make them already; or tell them not to."""
        dispatch, work = self._dispatch, self._work
        if dispatch.ahead is None:
            return
        dispatch.intact = False
        if self._opener.is_foreseen(dispatch.ahead):
            opener = self._opener.take_over(dispatch.ahead)
            # Assignments alone.
            work.opener = opener
            self._log.statistics = opener.statistics
            dispatch.ahead = None
        else:
            dispatch.drop_ahead()
        dispatch.intact = True

    def _next_made(self) -> _Made | None:
        """The next batch, or the next error; None at the end."""
        statistics, options = self._log.statistics, self._options
        statistics.ask()
        self._at = self._log.position
        if (cursor := self._opener.cursor) is not None:
            cursor.forget(self._at.keys)
        while True:
            try:
                batch = self._pending or self._next_complete()
            except (WorkerLostError, WorkerTimeoutError) as error:  # these workers deliver no more
                self._engines.throw_away(self._dispatch, self._opener.take())
                self._work.dispatches = []
                return self._error(error, self._at)._replace(is_last=True)
            except _RefusedError as refused:
                self._drop(refused.batch)
                return self._error(refused.error, self._delivery.after(refused.batch, self._at))
            except (BufferMemoryError, Warning) as error:  # a warning that a filter has turned into an error
                return self._error(error, self._at)
            if batch is None:
                if (raised := self._opener.sampler_error) is not None:
                    self._opener.sampler_error, self._opener.exhausted = None, False
                    return self._error(raised, self._at)
                if self._turns_over():
                    continue
                self._log.position = self._at
                self._log.ended = True
                statistics.end()
                return None
            if options.on_error == "skip" and batch.received.failures and batch.received.broken is None:
                made = self._skip(batch)
                if made is not None:
                    return made
                if self._pending is not batch:
                    continue
                self._pending = None
            return self._deliver(batch)

    def _deliver(self, batch: OpenBatch) -> _Made:
        pool, statistics = self._dispatch.pool, self._log.statistics
        left_out, after = len(batch.left_out), None
        try:
            made = self._delivery.make(batch, pool, self._at.batches)
            # Only now: `make` may have left out samples that did not fit.
            after = self._delivery.after(batch, self._at, handed_out=True)
            finished = self._delivery.finish(made, batch, after)
        except Exception as error:
            if is_interrupt(error):
                raise
            if after is None:
                del batch.left_out[left_out:]
                after = self._delivery.after(batch, self._at)
            return self._error(error, after)
        statistics.give(batch.rows - len(batch.received.failures), pool.waited_ns)
        if self._opener.is_short:
            statistics.short, self._opener.is_short = statistics.short + 1, False
        if self._tuner is not None:
            workers = self._tuner.look(statistics, self._dispatch.engine)
            self._setup = self._setup._replace(num_workers=workers)
            self._on_workers(workers)
        return _Made(finished, None, after, self._epochs.overflow_count + overflow_count(batch))

    def _error(self, error: BaseException, position: Position) -> _Made:
        return _Made(None, error, position, self._epochs.overflow_count)

    def _skip(self, batch: OpenBatch) -> _Made | None:
        """List a batch's failed samples. Leaves it pending, to be delivered shorter, or drops it if none is left."""
        received = batch.received
        if self._pending is batch:
            return None
        if not self._plan.by_rows and len(received.overflow.samples) + len(received.failures) < batch.rows:
            self._reopen(batch)  # already collated, or lost with a worker: request the samples themselves
            return None
        error = skip_failed(batch, self._left_out)
        if len(received.failures) == batch.rows:
            self._dispatch.pool.discard(batch.slot)
            self._at = self._delivery.after(batch, self._at)
            return self._error(error, self._at) if error is not None else None
        self._pending = batch
        return self._error(error, self._at._replace(failed=(*self._at.failed, *batch.left_out))) if error else None

    def _turns_over(self) -> bool:
        """Move to the next epoch if this one was resumed after its last batch. Returns whether it did."""
        if not self._start or self._at.batches != self._start:
            return False
        following = Position.start(self._at.epoch + 1)
        self._start = 0
        self._log.statistics.epoch = following.epoch
        self._epochs.turn_over(self._log, following)
        self._work.opener = self._opener_at(following)
        self._begin_at(following)
        self._take_what_is_ahead()
        return True

    # -- opening batches

    @property
    def _opener(self) -> Opener:
        return self._work.opener

    def _top_up(self, *, needed: bool = False) -> None:
        """Open batches up to the depth of the plan: of this epoch, and for persistent processes also of the next one.

        Raises:
            BufferMemoryError: there is no memory for even one batch, and one is `needed` now.
        """
        dispatch, opener = self._dispatch, self._opener
        # Without workers nobody makes the batches that are open.
        depth = self._plan.depth(dispatch.engine.num_workers) if self._options.num_workers > 0 else 1
        opener.top_up(dispatch, depth, needed=needed)
        # Not for threads: they share the dataset with the caller, who may change it between two epochs.
        if opener.exhausted and self._setup.persistent and self._setup.method == "process":
            if dispatch.ahead is None and opener.sampler_error is None and not self._foresees_none:
                dispatch.ahead = opener.following()
                self._foresees_none = dispatch.ahead is None
            if dispatch.ahead is not None:
                dispatch.ahead.top_up(dispatch, depth - len(opener.batches))

    # -- waiting

    def _next_complete(self) -> OpenBatch | None:
        """Wait for the batch to deliver next, and return it once it is complete; None at the end."""
        dispatch, timeout_s, has_workers = self._dispatch, self._options.timeout_s, self._options.num_workers > 0
        if has_workers:
            dispatch.collect()
        deadline = time.monotonic() + timeout_s if timeout_s > 0 else None
        opened = -1
        while True:
            had_spec = self._plan.spec is not None
            if self._plan.by_spans:
                self._begin_those_that_can()
            batches = self._opener.batches
            if len(batches) != opened or not had_spec:  # else nothing has changed since the last time
                self._top_up(needed=True)
                opened = len(batches)
            batch = self._choose(batches)
            if batch is None and not batches:
                return None
            if batch is not None:
                if self._is_whole(batch):
                    batches.remove(batch)
                    dispatch.forget(batch)
                    self._plan.learn(batch.received.overflow.needs, batch.received.parcel)
                    if has_workers:
                        self._top_up()
                    return batch
                continue
            self._wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not dispatch.collect() and deadline is not None and time.monotonic() >= deadline:
                self._time_out()

    def _wait(self, timeout_s: float | None) -> None:
        """Wait until there is something to collect. With workers, a handler that raises here interrupts no change."""
        dispatch, since_ns = self._dispatch, time.perf_counter_ns()
        if self._options.num_workers == 0:
            dispatch.engine.wait(timeout_s)
            self._log.statistics.waited(since_ns, all_had_work=True)
            return
        all_had_work, nap_s = self._is_work_for_all(), 0.0
        if self._plan.by_spans and self._options.in_order:
            nap_s = dispatch.nap_s(self._opener.batches[0])
        dispatch.intact = True
        if nap_s > 0.0 and (timeout_s is None or nap_s < timeout_s):
            time.sleep(nap_s)
        else:
            dispatch.engine.wait(timeout_s)
        dispatch.intact = False
        self._log.statistics.waited(since_ns, all_had_work=all_had_work)

    def _is_work_for_all(self) -> bool:
        """Whether there is unfinished work for every worker."""
        batches = self._opener.batches
        if self._plan.by_spans:
            left = sum(batch.unreported or 0 for batch in batches)
        else:
            left = sum(not batch.complete for batch in batches)
        return left >= self._dispatch.engine.num_workers

    def _choose(self, batches: Iterable[OpenBatch]) -> OpenBatch | None:
        """The first open batch if it is complete; without `in_order` the first that is complete."""
        for batch in batches:
            if batch.complete:
                return batch
            if self._options.in_order:
                return None
        return None

    def _is_whole(self, batch: OpenBatch) -> bool:
        """Whether a complete batch can be delivered. If not, requests what is missing, or drops an ended stream's."""
        received, dispatch = batch.received, self._dispatch
        if self._opener.cursor is None and batch.rows == 0:
            lanes = list(self._at.lanes)
            lanes[batch.lane] = self._opener.lanes[batch.lane] = -1
            self._at = self._at._replace(lanes=tuple(lanes))
            self._drop(batch)
            return False
        if self._plan.by_rows and batch.task.spec is None and (received.spec or self._plan.spec) and batch.rows:
            self._begin_rows(batch)
            self._top_up()
            if not batch.complete:
                return False
        if batch.asked < batch.rows and received.broken is None and self._options.on_error != "raise":
            # The samples that should have determined the spec failed: request the next one.
            dispatch.submit(batch, [(batch.asked, batch.asked + 1)])
            batch.asked += 1
            return False
        if batch.is_early:
            self._place_early(batch)
        if self._options.on_error == "substitute":
            error = self._substituting.replace_failed(dispatch, batch, self._left_out)
            if error is not None:
                raise _RefusedError(batch, error)
            return batch.complete
        return True

    def _begin_rows(self, batch: OpenBatch) -> None:
        """The spec is known: give this batch a slot, and request its remaining rows."""
        if self._plan.spec is None:
            self._plan.spec = batch.received.spec
        full = self._opener.new_batch(self._dispatch, batch.task.keys, batch.task.position, batch.rows)
        full.task.attempt, full.task.resume = batch.task.attempt, batch.task.resume
        batch.task, batch.slot, batch.is_early = full.task, full.slot, True
        start, batch.asked = batch.asked, batch.rows
        self._dispatch.submit(batch, self._dispatch.spans(start, batch.rows) if start < batch.rows else ())

    def _begin_those_that_can(self) -> None:
        """Give slots to the batches that were opened before the spec was known, once it is."""
        for batch in [each for each in self._opener.batches if each.task.spec is None]:
            if self._plan.spec is not None or (batch.received.spec is not None and batch.received.spec_row == 0):
                self._begin_rows(batch)

    def _place_early(self, batch: OpenBatch) -> None:
        """Write the samples that were read before the batch had a slot."""
        received, task = batch.received, batch.task
        early, received.overflow.samples, batch.is_early = received.overflow.samples, [], False
        assert task.spec is not None
        offsets = [offset for offset, _ in task.blocks]
        writer = RowWriter(task.spec, self._dispatch.pool.arena.buffer, offsets, batch.rows)
        for row, sample in early:
            writer.write(row, sample, received.overflow)

    def _drop(self, batch: OpenBatch) -> None:
        self._opener.batches.remove(batch)
        self._dispatch.forget(batch)
        self._dispatch.pool.discard(batch.slot)

    def _reopen(self, batch: OpenBatch) -> None:
        """Request the samples of a complete batch one by one, except those that failed; it becomes the first again."""
        self._dispatch.pool.discard(batch.slot)
        failures = batch.received.failures
        task = replace(batch.task, ticket=new_ticket(), spec=None, blocks=(), raw=True)
        again = OpenBatch(task, [], batch.rows, batch.first, asked=batch.rows, received=Received(failures=failures))
        again.statistics = self._log.statistics
        self._dispatch.submit(again, [(row, row + 1) for row in range(batch.rows) if row not in failures])
        self._opener.batches.appendleft(again)

    def _time_out(self) -> NoReturn:
        dataset, timeout_s = self._options.dataset, self._options.timeout_s
        tasks = {batch.task.ticket: batch.task for batch in self._opener.batches}
        busy = [
            f"{describe_work(dataset, self._plan.fetch, task, reading.row)[-1]} for {reading.since_s:.1f} s"
            for reading in self._dispatch.engine.reading()
            if (task := tasks.get(reading.ticket)) is not None
        ]
        raise WorkerTimeoutError(
            f"DataLoader timed out after {timeout_s} seconds; being read: {'; '.join(busy[:4]) or 'nothing'}.\n"
            "  Read that sample by itself, or raise timeout=."
        )


def _stop(pid: int, engines: Engines, work: _Work, plan: Plan, log: EpochLog) -> None:
    # Runs when an epoch is exhausted, dropped or collected: it must not refer to the epoch itself.
    if pid != os.getpid():
        return  # in a forked child: workers and slots are the parent's
    log.statistics.leave()
    batches = work.opener.take()
    for dispatch in work.dispatches:
        # Keeps the memory the next epoch needs: for the open batches, the one being delivered, and the one before it.
        engines.release(dispatch, batches, plan.sizes() * (plan.depth(dispatch.engine.num_workers) + 2))
    work.dispatches = []
