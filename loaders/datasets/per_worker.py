"""A file, database or other handle that each worker opens for itself."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing import util
from typing import Any, Generic, TypeVar

_Handle = TypeVar("_Handle")

# Every open handle by serial number. Those that a fork inherited stay here for good: dropping the last reference would
# close them, and write or unlock what belongs to the parent.
_held: dict[int, Any] = {}
_serials = itertools.count()
_once: weakref.WeakSet[PerWorker[Any]] = weakref.WeakSet()


class _Opening:
    """The lock under which handles of a process are opened."""

    lock = threading.RLock()


class _Opened(Generic[_Handle]):
    """A handle, and the process that opened it; its end closes the handle."""

    def __init__(self, handle: _Handle, close: Callable[[_Handle], Any] | None) -> None:
        self.handle, self.pid = handle, os.getpid()
        serial = next(_serials)
        _held[serial] = handle
        # Not `weakref.finalize` or `atexit`: a worker process ends by `os._exit`, which runs only these finalizers.
        ends = (serial, close, self.pid, threading.get_ident())
        self.end = util.Finalize(self, _end, ends, exitpriority=10)


def _end(serial: int, close: Callable[[Any], Any] | None, pid: int, opener: int) -> None:
    if pid != os.getpid():
        return
    if util.is_exiting() and opener in {each.ident for each in threading.enumerate()} - {threading.get_ident()}:
        return  # another thread, which may be using it
    handle = _held.pop(serial)
    if close is not None:
        close(handle)
    elif hasattr(handle, "close"):
        handle.close()


class PerWorker(Generic[_Handle]):
    """A handle that each worker opens for itself, on first use: `PerWorker(h5py.File, "images.h5")`, then `handle()`.

    For what a fork must not share, and what cannot be pickled: HDF5 and Zip files, databases, connections. A dataset
    makes one in `__init__`, which opens nothing, and calls it in `__getitem__`. Pickling it, or copying it, gives one
    that opens anew. What a forked process has inherited it neither uses nor closes.

    A handle is closed when its worker ends, or when this object is gone. A worker that is killed closes nothing.

    Args:
        open: opens the handle; for spawned workers a function that can be pickled.
        args: its arguments; `functools.partial` passes others.
        close: closes the handle. None calls its `close()`, if there is one.
        once_per_process: for libraries that refuse to open in a process what is open there, as LMDB does: threads share
            the handle, and it is closed before the process forks; its next use opens it again. By default each thread
            opens its own, and closes it when it ends. No thread may be using it while the process forks: do not combine
            a threaded loader over such a dataset with loaders that fork; use `forkserver` or `spawn` for those.
    """

    def __init__(
        self,
        open: Callable[..., _Handle],
        *args: Any,
        close: Callable[[_Handle], Any] | None = None,
        once_per_process: bool = False,
    ) -> None:
        self._open, self._args, self._close = open, args, close
        self._local = threading.local()
        self._shared: _Opened[_Handle] | None = None
        self._once_per_process = once_per_process
        if once_per_process:
            _once.add(self)

    def __call__(self) -> _Handle:
        """This worker's handle: opened by the first call, the same one afterwards."""
        opened: _Opened[_Handle] | None
        opened = self._shared if self._once_per_process else getattr(self._local, "opened", None)
        if opened is None or opened.pid != os.getpid():
            opened = self._opened()
        return opened.handle

    def _opened(self) -> _Opened[_Handle]:
        if not self._once_per_process:
            opened = self._local.opened = _Opened(self._open(*self._args), self._close)
            return opened
        with _Opening.lock:
            if self._shared is None or self._shared.pid != os.getpid():
                self._shared = _Opened(self._open(*self._args), self._close)
            return self._shared

    def _close_before_fork(self) -> None:
        opened, self._shared = self._shared, None
        if opened is not None:
            opened.end()

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._open, self._args, self._close, self._once_per_process)

    def __repr__(self) -> str:
        opener = getattr(self._open, "__qualname__", None) or repr(self._open)
        return f"PerWorker({', '.join([opener, *map(repr, self._args)])})"


def _again(
    open: Callable[..., _Handle], args: tuple[Any, ...], close: Callable[[_Handle], Any] | None, once: bool
) -> PerWorker[_Handle]:
    return PerWorker(open, *args, close=close, once_per_process=once)


def _before_fork() -> None:
    _Opening.lock.acquire()  # so that no other thread opens one until the process has forked
    for each in list(_once):
        each._close_before_fork()


def _after_fork_in_parent() -> None:
    _Opening.lock.release()


def _after_fork_in_child() -> None:
    _Opening.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
