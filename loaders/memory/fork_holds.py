"""Batches that a forked child inherited stay held until the child and all its own forks have ended.

A child shares the memory of every batch that its parent held at the fork. The parent cannot know which of them the
child reads.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from loaders.memory.blocks import Block

_MAP_FAILED = ctypes.c_void_p(-1).value


class _Sign(Protocol):
    """A sign of life: made before a fork, dropped by one side, and observed by the other."""

    def keep_in_parent(self) -> None: ...

    def keep_in_child(self) -> None: ...

    def is_alive(self) -> bool: ...

    def close(self) -> None: ...


class _MappedPage:
    """A page that the child has mapped. Closing descriptors does not unmap it; exec and every kind of end do.

    A memory file cannot be sealed against writing while a process has it mapped writable, so trying to seal it shows
    whether the child, or one of its own forks, is alive. The page is never touched, so the file can stay empty.
    """

    def __init__(self) -> None:
        self._libc = _libc()
        self._pid = os.getpid()
        self._fd = os.memfd_create("loaders-fork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Not an `mmap.mmap`, which has a descriptor of its own: if that were closed in the child and its number reused,
        # the object would eventually close somebody else's descriptor.
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._page = self._libc.mmap(None, mmap.PAGESIZE, access, mmap.MAP_SHARED, self._fd, 0)
        if self._page == _MAP_FAILED:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "a page cannot be mapped")

    def keep_in_parent(self) -> None:
        self.close()

    def keep_in_child(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def is_alive(self) -> bool:
        import fcntl  # not available on every system

        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        except OSError:
            return True
        os.close(self._fd)
        self._fd = -1
        return False

    def close(self) -> None:
        self._libc.munmap(self._page, mmap.PAGESIZE)

    def __del__(self, getpid: Callable[[], int] = os.getpid, close: Callable[[int], None] = os.close) -> None:
        # Of a pool that is gone while its child lives on. In a child the number may be another file's by now.
        if getattr(self, "_fd", -1) >= 0 and self._pid == getpid():
            close(self._fd)


class _OpenPipe:
    """Where pages cannot be sealed: a pipe whose end the child keeps open. It must not close what it inherited."""

    def __init__(self) -> None:
        self._parents, self._childs = multiprocessing.Pipe(duplex=False)

    def keep_in_parent(self) -> None:
        self._childs.close()

    def keep_in_child(self) -> None:
        self._parents.close()

    def is_alive(self) -> bool:
        return not self._parents.poll()

    def close(self) -> None:
        self._childs.close()


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.munmap.restype = ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


@functools.cache
def _kind_of_sign() -> type[_MappedPage] | type[_OpenPipe]:
    """`_MappedPage` if this system refuses to seal a page that is mapped, else `_OpenPipe`."""
    try:
        page = _MappedPage()
    except (AttributeError, TypeError, OSError):
        return _OpenPipe
    is_told = page.is_alive()
    page.close()
    return _MappedPage if is_told and not page.is_alive() else _OpenPipe


# In a forked child: the signs that show its parent that it is alive.
_inherited: list[_Sign] = []


class ForkHolds:
    """Which blocks of a pool forked children hold. The pool calls it under its lock."""

    def __init__(self) -> None:
        self._living: list[tuple[_Sign | None, frozenset[Block]]] = []
        self._waiting: list[Block] = []  # held by children only
        self._forking: tuple[_Sign, frozenset[Block]] | None = None

    def before_fork(self, leased: Iterable[Block]) -> None:
        """A child is about to inherit the blocks that are `leased`."""
        blocks, self._forking = frozenset(leased), None
        if blocks:
            try:
                self._forking = _kind_of_sign()(), blocks
            except OSError:  # no descriptor is left: the child is assumed to live forever
                self._living.append((None, blocks))

    def after_fork_in_parent(self) -> None:
        """The blocks are held until the child has ended."""
        if self._forking is not None:
            sign, blocks = self._forking
            self._forking = None
            sign.keep_in_parent()
            self._living.append((sign, blocks))

    def after_fork_in_child(self) -> None:
        """This process holds the blocks until it ends."""
        if self._forking is not None:
            sign, _ = self._forking
            self._forking = None
            sign.keep_in_child()
            _inherited.append(sign)

    @property
    def are_any(self) -> bool:
        """Whether any child may hold blocks."""
        return bool(self._living)

    def claim(self, block: Block) -> bool:
        """Whether a living child holds this block; if so, `ended` returns it later."""
        claimed = any(block in blocks for _, blocks in self._living)
        if claimed:
            self._waiting.append(block)
        return claimed

    def ended(self) -> list[Block]:
        """The blocks that waited for children that have now ended. Other children may still hold some of them."""
        living = [(sign, blocks) for sign, blocks in self._living if sign is None or sign.is_alive()]
        if len(living) == len(self._living):
            return []
        self._living, waiting = living, self._waiting
        self._waiting = []
        return waiting


def release_inherited() -> None:
    """Declare that this process reads none of the batches it inherited."""
    while _inherited:
        _inherited.pop().close()
