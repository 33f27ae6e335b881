"""The slot pools of this process: to look up a lease in, and to prepare all of them for a fork."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Protocol

from loaders.memory.leases import Lease


class Pool(Protocol):
    """The part of `SlotPool` that the rest of the process uses."""

    def before_fork(self) -> None:
        """This process is about to be forked."""

    def after_fork(self, *, in_child: bool) -> None:
        """This process was forked."""

    def settle(self) -> None:
        """Take back what can be taken back now."""

    def lease_at(self, address: int) -> Lease | None:
        """The lease of the block that this byte lies in."""


Pools = weakref.WeakValueDictionary[int, Pool]

shared: Pools = weakref.WeakValueDictionary()  # whose memory a child would share
locked: Pools = weakref.WeakValueDictionary()  # that a device may read in place
unsettled: set[Pool] = set()  # with memory to be unlocked, which was not allowed at the time


def alive(pools: Pools) -> list[Pool]:
    """The pools that exist at this moment."""
    # The dictionary's own iterators fail if another thread makes a pool meanwhile; this list is made in one step.
    return [pool for ref in pools.valuerefs() if (pool := ref()) is not None]


def lease_at(address: int) -> Lease | None:
    """The lease of page-locked memory that this byte lies in, whichever pool's it is."""
    found = (pool.lease_at(address) for pool in alive(locked))
    return next((lease for lease in found if lease is not None), None)


_forking = threading.local()


def _before_fork() -> None:
    _forking.pools = alive(shared)
    with contextlib.ExitStack() as each:  # all of them, even if one raises
        for pool in _forking.pools:
            each.callback(pool.before_fork)


def _after_fork(*, in_child: bool) -> None:
    for pool in _forking.__dict__.pop("pools", ()):
        pool.after_fork(in_child=in_child)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(in_child=False),
        after_in_child=lambda: _after_fork(in_child=True),
    )
