"""The slot pools of this process: for whoever looks for a lease, and for a fork, which all of them take part in."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Protocol

from loaders.memory.leases import Lease


class Pool(Protocol):
    """A `SlotPool`, as far as others of the process have to do with it."""

    def before_fork(self) -> None:
        """This process is about to be forked."""

    def after_fork(self, *, in_child: bool) -> None:
        """It was."""

    def settle(self) -> None:
        """Take back what can be taken back now."""

    def lease_at(self, address: int) -> Lease | None:
        """The lease of the block that this byte lies in."""


Pools = weakref.WeakValueDictionary[int, Pool]

shared: Pools = weakref.WeakValueDictionary()  # whose memory a child would share
locked: Pools = weakref.WeakValueDictionary()  # that a device may read where it lies
unsettled: set[Pool] = set()  # with memory that has to be unlocked, which just then was forbidden


def alive(pools: Pools) -> list[Pool]:
    """Those that there are at this moment."""
    # The dictionary's own iterators fail where another thread makes a pool meanwhile; this list is made at one blow.
    return [pool for ref in pools.valuerefs() if (pool := ref()) is not None]


def lease_at(address: int) -> Lease | None:
    """The lease of page-locked memory that this byte lies in, whichever pool's it is."""
    found = (pool.lease_at(address) for pool in alive(locked))
    return next((lease for lease in found if lease is not None), None)


_forking = threading.local()


def _before_fork() -> None:
    _forking.pools = alive(shared)
    with contextlib.ExitStack() as each:  # all of them, also where one raises
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
