"""The workers of one loader and the memory they write to: opened, kept from epoch to epoch, discarded."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple, Protocol

import torch

from loaders.dataloader.dispatch import Dispatch, OpenBatch
from loaders.memory.arena import Arena
from loaders.memory.device_reads import PageLocker
from loaders.memory.slots import SlotPool
from loaders.system.interrupts import undisturbed
from loaders.system.limits import available_nbytes
from loaders.workers.engine import Engine
from loaders.workers.inline import InlineEngine
from loaders.workers.messages import Job
from loaders.workers.processes import ProcessEngine
from loaders.workers.threads import ThreadEngine

# The share of the memory available at the first iteration that batch buffers may take.
_DEFAULT_SHARE = 0.5
# Bytes of address space per byte of that memory, so that blocks of changing sizes always find a free range.
_VIRTUAL_FACTOR = 4


class EngineSetup(NamedTuple):
    """What an engine is made from.

    Attributes:
        job: what its workers do.
        num_workers: the initial number; 0 for none.
        method: "process" or "thread".
        context: the multiprocessing context; None for torch's default.
        max_buffer_bytes: the most memory that batches may take; None for a share of what is available.
        persistent: whether workers are kept for the next epoch.
    """

    job: Job
    num_workers: int
    method: str
    context: BaseContext | None
    max_buffer_bytes: int | None
    persistent: bool


class User(Protocol):
    """An iterator whose workers the next one may take over."""

    def uses(self, dispatch: Dispatch) -> bool:
        """Whether these workers are its own."""

    def give_up_workers(self) -> bool:
        """Give up the workers; if it continues, it opens others. Returns False while it is busy."""


class Engines:
    """Gives each iterator of a loader an engine with its own memory, and takes both back.

    Memory is reused from epoch to epoch, and so are persistent workers: they go to the iterator that was begun last. An
    engine is discarded, workers and memory included, if a signal handler that raised interrupted a change. Its
    unfinished tasks are executed again: a task is a pure function.
    """

    def __init__(self) -> None:
        self._stock = _Stock()
        self._page_locker: PageLocker | None = None
        self._lock = threading.RLock()
        weakref.finalize(self, _Stock.close, self._stock)

    def page_lock_with(self, locker: PageLocker | None) -> None:
        """From the next iteration on, put batches in memory that this accelerator reads in place."""
        self._leave_what_is_the_parents()
        if locker is not None:
            self._page_locker = locker

    @property
    def page_locker(self) -> PageLocker | None:
        """The accelerator that reads batches in place, if any."""
        self._leave_what_is_the_parents()
        return self._page_locker

    @property
    def kept(self) -> Dispatch | None:
        """The persistent workers, if any."""
        return self._stock.kept

    @property
    def pool(self) -> SlotPool | None:
        """The newest pool, if any."""
        return self._stock.pools[-1] if self._stock.pools else None

    def open(self, setup: EngineSetup, user: User, found: list[Dispatch]) -> None:
        """Append workers with their memory for `user` to `found`."""
        self._leave_what_is_the_parents()
        stock = self._stock
        with self._lock:  # two threads must not get the same workers
            stock.retry()
            if setup.persistent and (kept := self._take_kept(setup)) is not None:
                stock.user = weakref.ref(user)
                found.append(kept)
                return
            with undisturbed():  # pipes and memory not yet recorded could not be closed
                pool = self._pool_for(setup)
                try:
                    dispatch = Dispatch(self._engine_for(setup, pool))
                except BaseException:
                    pool.close()
                    raise
                if self._page_locker is not None:
                    pool.page_lock(self._page_locker)
                stock.users[dispatch] = weakref.ref(user)
                found.append(dispatch)
                if setup.persistent and stock.kept is None:
                    stock.kept, stock.user = dispatch, weakref.ref(user)

    def release(self, dispatch: Dispatch, batches: Iterable[OpenBatch], keep: Iterable[int] = ()) -> None:
        """Take back an iterator's workers. `batches`: its open ones. `keep`: as in `SlotPool.trim`."""
        stock = self._stock
        if dispatch is stock.kept and dispatch.is_usable():
            dispatch.intact = False
            dispatch.abandon(batches)
            dispatch.pool.trim(keep)
            dispatch.intact = True
            return
        self.throw_away(dispatch, batches, keep)

    def throw_away(self, dispatch: Dispatch, batches: Iterable[OpenBatch] = (), keep: Iterable[int] = ()) -> None:
        """Stop these workers. Their memory is kept for the next ones unless a change was interrupted."""
        stock = self._stock
        if stock.kept is dispatch:
            stock.kept = None
        stock.end(dispatch, batches, keep)

    def drop_kept(self) -> None:
        """Start new workers in the next epoch. An iterator that still uses the old ones keeps them until it is done."""
        kept, self._stock.kept = self._stock.kept, None
        user = self._stock.user() if self._stock.user is not None else None
        if kept is not None and (user is None or not user.uses(kept)):
            self._stock.end(kept, (), ())

    def holders(self) -> str:
        """See `DataLoader.holders`."""
        self._leave_what_is_the_parents()
        found = []
        for pool in self._stock.pools:
            pool.reclaim()
            found.append(pool.holders())
        return "\n".join(filter(None, found))

    def leased(self) -> tuple[int, int, int]:
        """(blocks, bytes) that readers hold, and the most bytes that batches may take."""
        pools = self._stock.pools
        return (
            sum(pool.leased_count for pool in pools),
            sum(pool.leased_nbytes for pool in pools),
            pools[-1].ceiling_nbytes if pools else 0,
        )

    def _take_kept(self, setup: EngineSetup) -> Dispatch | None:
        stock = self._stock
        kept, user = stock.kept, stock.user() if stock.user is not None else None
        if kept is None:
            return None
        if self._page_locker is not None and not kept.pool.arena.shared:
            self.drop_kept()  # threads whose memory cannot be page-locked
            return None
        if user is not None and user.uses(kept) and not user.give_up_workers():
            return None  # busy on another thread, or interrupted by the signal handler that runs now
        if not kept.is_usable():
            self.throw_away(kept)
            return None
        if self._page_locker is not None:
            kept.pool.page_lock(self._page_locker)
        return kept

    def _pool_for(self, setup: EngineSetup) -> SlotPool:
        stock = self._stock
        processes = setup.num_workers > 0 and setup.method == "process"
        shared = processes or self._page_locker is not None
        travels = processes and _context_of(setup).get_start_method() != "fork"
        idle, stock.idle = stock.idle, None
        if idle is not None:
            fits = idle.arena.shared == shared and (idle.arena.travels or not travels)
            if fits and idle.is_intact() and idle.asked_nbytes == setup.max_buffer_bytes:
                return idle
            idle.close()
        ceiling = setup.max_buffer_bytes
        if ceiling is None:
            if stock.ceiling_nbytes is None:
                stock.ceiling_nbytes = int(available_nbytes() * _DEFAULT_SHARE)
            ceiling = stock.ceiling_nbytes
        arena = Arena(ceiling * _VIRTUAL_FACTOR + (1 << 24), shared=shared, travels=travels)
        pool = SlotPool(
            arena, ceiling_nbytes=ceiling, asked_nbytes=setup.max_buffer_bytes, others=weakref.WeakMethod(stock.others)
        )
        stock.add(pool)
        return pool

    def _engine_for(self, setup: EngineSetup, pool: SlotPool) -> Engine:
        if setup.num_workers == 0:
            return InlineEngine(setup.job, pool)
        if setup.method == "thread":
            return ThreadEngine(setup.job, pool, setup.num_workers)
        return ProcessEngine(setup.job, pool, _context_of(setup), setup.num_workers)

    def _leave_what_is_the_parents(self) -> None:
        # A forked child has none of the parent's workers, and must not touch its memory.
        if self._stock.pid != os.getpid():
            self._stock, self._page_locker, self._lock = _Stock(), None, threading.RLock()
            weakref.finalize(self, _Stock.close, self._stock)


def _context_of(setup: EngineSetup) -> Any:
    return setup.context or torch.multiprocessing.get_context()


class _Stock:
    """The workers and pools that exist now, kept apart from `Engines` so that its finalizer can close them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.kept: Dispatch | None = None  # persistent workers
        self.user: weakref.ref[Any] | None = None  # the iterator that uses them
        self.idle: SlotPool | None = None  # memory for the next iterator
        self._pools: tuple[weakref.ref[SlotPool], ...] = ()  # the newest last
        self.users: dict[Dispatch, weakref.ref[Any]] = {}
        self.ceiling_nbytes: int | None = None  # where the user gave none; set once
        self._failed: tuple[Dispatch, ...] = ()  # those whose end was interrupted

    @property
    def pools(self) -> tuple[SlotPool, ...]:
        """The pools that are open or still read from, the newest last."""
        return tuple(pool for ref in self._pools if (pool := ref()) is not None and pool.is_alive())

    def add(self, pool: SlotPool) -> None:
        """Register a new pool."""
        self._pools = tuple(map(weakref.ref, (*self.pools, pool)))

    def others(self, pool: SlotPool) -> int:
        """Bytes that the other pools have reserved."""
        return sum(each.arena.reserved_nbytes for each in self.pools if each is not pool)

    def end(self, dispatch: Dispatch, batches: Iterable[OpenBatch], keep: Iterable[int]) -> None:
        """Stop workers. If an exception interrupts this, the next `retry` completes it."""
        usable = dispatch.is_usable()
        dispatch.intact = False
        pool = dispatch.pool
        with undisturbed():
            try:
                dispatch.close(batches, force=not usable)
                if usable and self.idle is None and self.kept is None:
                    pool.trim(keep)
                    self.idle = pool
                else:
                    pool.close()
            except BaseException:
                self._failed = (*self._failed, dispatch)
                raise
            self.users.pop(dispatch, None)

    def retry(self) -> None:
        """Stop the workers whose end was interrupted, and those whose iterator no longer exists."""
        for dispatch, user in list(self.users.items()):
            if user() is None and dispatch is not self.kept:
                self.end(dispatch, (), ())
        while self._failed:
            dispatch, *rest = self._failed
            dispatch.close(force=True)
            dispatch.pool.close()
            self.users.pop(dispatch, None)
            self._failed = tuple(rest)

    def close(self) -> None:
        """Stop all workers and close all pools. Batches that were handed out stay valid."""
        if self.pid != os.getpid():
            return
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.close(force=not kept.is_usable())
            self.users.pop(kept, None)
        self.retry()
        for pool in self.pools:
            # Batches that outlive the loader keep the mapping alive; everything else is released here.
            pool.close()
