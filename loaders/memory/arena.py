"""One sparse range of memory, in which every byte is reserved before it is used.

The range is mapped once, at its full virtual size, by the consumer and by every worker: growing it later costs no
descriptor, no message and no second mapping. Only reserved pages count as memory.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from multiprocessing.reduction import DupFd
from typing import Any

from loaders.errors import BufferMemoryError
from loaders.system.limits import available_nbytes

PAGE = mmap.PAGESIZE
# Left to the rest of the machine: other processes, too, need the last free bytes.
_HEADROOM = 64 << 20
# A range smaller than this is of no use.
_LEAST = 1 << 24

_POPULATE_WRITE = 23  # of madvise, Linux 5.14 and later; Python has no name for it
_LIMITED = "Files may have {:,} bytes (RLIMIT_FSIZE): raise the limit (ulimit -f), or use the start method fork."
# The system must not refuse more address space than the machine has memory. Python names the flag since 3.13.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """`nbytes` rounded up to a whole number of units."""
    return -(-nbytes // unit) * unit


class Arena:
    """A mapped range of `capacity` bytes; `reserve` takes pieces of it and `release` gives them back.

    Args:
        capacity: virtual size in bytes; costs address space only.
        shared: True for memory that worker processes write into; False for ordinary private memory.
        travels: True where processes that are not forks of this one are to map it.

    A limit on the size of files (RLIMIT_FSIZE, `ulimit -f`) applies to memory files, too. Under such a limit, memory
    that does not travel uses no file; memory that does is no larger than the limit.
    """

    def __init__(self, capacity: int, *, shared: bool, travels: bool = True) -> None:
        self.capacity = round_up(capacity)
        self.shared = shared
        self.reserved_nbytes = 0
        self._pid = os.getpid()
        self._file_limit = _file_limit_nbytes()
        self._fd = -1
        if shared and self.capacity <= self._file_limit:
            self._fd = _anonymous_descriptor(self.capacity)
        elif shared and (travels or not hasattr(mmap, "MAP_SHARED")):
            self.capacity = int(self._file_limit) // PAGE * PAGE
            if self.capacity == 0:
                raise BufferMemoryError(_LIMITED.format(self._file_limit))
            self._fd = _anonymous_descriptor(self.capacity)
        self.buffer = self._mapped()
        self._free: list[tuple[int, int]] = [(0, self.capacity)]  # (offset, nbytes), sorted, never adjacent

    def _mapped(self) -> mmap.mmap:
        try:
            return _map(self._fd, self.capacity, shared=self.shared)
        except OSError as error:  # `ulimit -v`, or a machine that never promises more memory than it has
            if self.capacity <= _LEAST:
                raise BufferMemoryError(f"not even {self.capacity:,} bytes can be mapped: {error}.") from error
            self.capacity = round_up(self.capacity // 2)
            return self._mapped()

    def reserve(self, nbytes: int) -> int:
        """Take `nbytes` (a multiple of PAGE) and make sure that they are backed by memory. Returns their offset.

        Raises:
            BufferMemoryError: the machine or its cgroup does not have that much left. Nothing was taken.
        """
        left = available_nbytes()
        asked = (
            f"a batch buffer of {nbytes:,} bytes was asked for, {left:,} bytes of memory are available "
            f"and {self.reserved_nbytes:,} bytes are in use by this loader.\n"
            "  Use a smaller batch_size or prefetch_factor, or let go of batches that are kept."
        )
        if nbytes > left - _HEADROOM:
            raise BufferMemoryError(asked)
        position = next((number for number, (_, room) in enumerate(self._free) if room >= nbytes), None)
        if position is None:
            raise BufferMemoryError(
                f"no run of {nbytes:,} free bytes is left in a range of {self.capacity:,} bytes."
                + (f"\n  {_LIMITED.format(self._file_limit)}" if self.capacity + PAGE > self._file_limit else "")
            )
        offset, room = self._free[position]
        if self.shared:
            try:
                # Pages that exist cannot fail later: writing to a sparse page on a full machine is a bus error.
                self._populate(offset, nbytes)
            except OSError as error:
                raise BufferMemoryError(f"{error.strerror}: {asked}") from error
        self._free[position : position + 1] = [(offset + nbytes, room - nbytes)] if room > nbytes else []
        self.reserved_nbytes += nbytes
        return offset

    def _populate(self, offset: int, nbytes: int) -> None:
        if self._fd >= 0:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, offset, nbytes)
            return
        try:
            self.buffer.madvise(_POPULATE_WRITE, offset, nbytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            for at in range(offset, offset + nbytes, PAGE):  # a kernel before 5.14
                self.buffer[at] = 0

    @property
    def travels(self) -> bool:
        """Whether processes that are not forks of this one can map it."""
        return self._fd >= 0

    def release(self, offset: int, nbytes: int) -> None:
        """Give `nbytes` at `offset` back to the machine; their content is gone."""
        # REMOVE frees the pages of the shared file; DONTNEED those of private memory.
        advice = getattr(mmap, "MADV_REMOVE" if self.shared else "MADV_DONTNEED", None)
        if advice is not None:
            self.buffer.madvise(advice, offset, nbytes)
        self.reserved_nbytes -= nbytes
        self._free = _merge(sorted([*self._free, (offset, nbytes)]))

    def close(self) -> None:
        """Close the descriptor. The mapping itself lives until the last array over it is gone."""
        # In a forked child the number may belong to another file by now: the child may have closed all it inherited.
        if self._fd >= 0 and self._pid == os.getpid():
            os.close(self._fd)
        self._fd = -1

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker is sent the descriptor only; a forked one inherits the mapping itself.
        return {"capacity": self.capacity, "descriptor": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.capacity = state["capacity"]
        self.shared = True
        self._fd = -1
        self._pid = os.getpid()
        fd = state["descriptor"].detach()
        self.buffer = _map(fd, self.capacity, shared=True)
        os.close(fd)


def _map(fd: int, capacity: int, *, shared: bool) -> mmap.mmap:
    if fd >= 0:
        return mmap.mmap(fd, capacity)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, capacity)
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return mmap.mmap(-1, capacity, flags=kind | mmap.MAP_ANONYMOUS | _NORESERVE)


def _file_limit_nbytes() -> float:
    """The size in bytes that no file of this process may exceed; infinite without a limit."""
    try:
        import resource
    except ImportError:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _anonymous_descriptor(capacity: int) -> int:
    """A descriptor of `capacity` bytes of memory that has no name anywhere."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("loaders", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, capacity)
        except BaseException:
            os.close(fd)
            raise
        return fd
    from multiprocessing.shared_memory import SharedMemory

    segment = SharedMemory(create=True, size=capacity)
    fd = os.dup(segment._fd)  # type: ignore[attr-defined]  # the only way to keep it once its name is gone
    segment.close()
    segment.unlink()
    return fd


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged = ranges[:1]
    for offset, nbytes in ranges[1:]:
        last_offset, last_nbytes = merged[-1]
        if last_offset + last_nbytes == offset:
            merged[-1] = (last_offset, last_nbytes + nbytes)
        else:
            merged.append((offset, nbytes))
    return merged
