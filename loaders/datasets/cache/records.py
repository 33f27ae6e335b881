"""Samples in memory that processes share: written once each, read by all, and nobody ever waits for the dead.

The memory is an anonymous file or one with a path: a header, a table with one word per sample, and records, one behind
the other. A record's place is claimed first, its bytes follow, and at last its offset is stored into the table, which
is what makes it present. A process that is killed before that leaves a gap that nobody reads.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import struct
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np

from loaders.datasets.cache.file import (
    COUNTERS,
    LINE,
    LOOKED_AT,
    PROCESSES,
    REFUSED_AT,
    TABLE,
    TAIL_AT,
    first_record,
    lay_out,
    open_file,
    whole_lines,
)
from loaders.errors import DatasetError

if sys.platform != "win32":  # where other datasets can be used
    import fcntl
    from multiprocessing.reduction import DupFd

    from loaders.system.limits import available_nbytes

ABSENT: Any = object()

# Words of a record. The pieces follow, each on a line of its own: a pickle, and the arrays' bytes it left out.
_INDEX, _NBYTES, _CHECKSUM, _PIECES, _SIZES = range(5)

# Memory is looked for so many bytes ahead.
_GROWTH = 16 << 20
# As the arena of the batches does, this much is left to the rest of the machine.
_HEADROOM = 64 << 20
# A place is claimed in a few microseconds. Who cannot have the lock for so long finds it orphaned: a process was
# killed in those microseconds while a child of it, forked in them, lives.
_PATIENCE_S = 5.0
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)
_PARTS_AT_ONCE = 1000  # Linux takes 1024

ROOM_LEFT, FULL, MACHINE_FULL = range(3)


class SharedRecords:
    """Room for `length` samples in at most `nbytes` bytes, in this process and in all that it is passed to.

    Args:
        length: number of samples.
        nbytes: of the whole; taken as it fills.
        path: a file that outlives the processes; None for memory that is gone with the last of them.
        fingerprint: 32 bytes that tell one dataset from another; a file with others is refused.

    Raises:
        DatasetError: `nbytes` holds not even the table, or the file at `path` is of something else.
        OSError: the file cannot be made or opened.
    """

    def __init__(
        self, length: int, nbytes: int, path: str | os.PathLike[str] | None = None, fingerprint: bytes = bytes(32)
    ) -> None:
        self.length = length
        self.nbytes = nbytes // mmap.PAGESIZE * mmap.PAGESIZE
        self.path = None if path is None else os.path.abspath(path)
        self._fingerprint = fingerprint
        self._first = first_record(length)
        least = self._first + mmap.PAGESIZE
        if self.nbytes < least:
            raise DatasetError(f"nbytes={nbytes:,} is too little: the table of {length:,} samples takes {least:,}.")
        if not os.path.exists("/proc/self/fd") or not hasattr(os, "memfd_create"):
            raise DatasetError("DecodedCache needs Linux: locks that end with their process, memory without a name.")
        if self.path is not None:
            self._start(open_file(self.path, length, self.nbytes, fingerprint))
        else:
            fd = os.memfd_create("loaders-cache", os.MFD_CLOEXEC)
            lay_out(fd, length, self.nbytes, fingerprint)
            self._start(fd)

    def _start(self, fd: int) -> None:
        self._fd = fd
        self._identity = _identity(fd)
        self._patience_s = _PATIENCE_S
        # Each mapping duplicates the descriptor, unless it is told not to.
        options: Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        memory = mmap.mmap(fd, self.nbytes, **options)
        weakref.finalize(self, os.close, fd)
        self._words = np.frombuffer(memory, np.int64)
        self._bytes: Any = np.frombuffer(memory, np.uint8)  # typed NumPy knows no buffers before Python 3.12
        self._table = self._words[TABLE : TABLE + self.length]
        # What a file holds may have been cut off by a power failure: looked at when it is first read.
        self._trusted = np.zeros(self.length, np.bool_) if self.path is not None else None
        if self.path is not None:
            self._find_tail()
        self._before = self._counted()

    def _find_tail(self) -> None:
        # After a power failure the words of the header may be older than those of the table.
        with self._descriptor() as fd:
            last = int(self._table.max(initial=0))
            if last and self._lock(fd):
                self._words[TAIL_AT] = max(int(self._words[TAIL_AT]), last + int(self._words[last // 8 + _NBYTES]))
                fcntl.flock(fd, fcntl.LOCK_UN)
            self._words[REFUSED_AT] = ROOM_LEFT

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return SharedRecords, (self.length, self.nbytes, self.path, self._fingerprint)
        if get_spawning_popen() is None:
            raise DatasetError(
                "a DecodedCache without a path is memory of these processes: it is passed to worker processes as they "
                "are started, and cannot be pickled otherwise.\n  Give it a path=: then a copy opens the same file."
            )
        return _attach, (self.length, self.nbytes, DupFd(self._fd))

    def __deepcopy__(self, memo: Any) -> SharedRecords:
        return self

    # -- reading

    def get(self, index: int) -> Any:
        """The sample, with arrays of its own, or ABSENT."""
        return self._read(index, copied=True)

    def view(self, index: int) -> Any:
        """The sample with read-only arrays over the shared memory, or ABSENT."""
        return self._read(index, copied=False)

    def _read(self, index: int, *, copied: bool) -> Any:
        # The addresses of all other words depend on this one, so no processor reads them before it.
        offset = int(self._table[index])
        if not offset or not self._is_whole(index, offset):
            return ABSENT
        pickled, *arrays = self._pieces(offset)
        buffers = [array.copy() if copied else memoryview(array).toreadonly() for array in arrays]
        return pickle.loads(pickled, buffers=buffers)

    def _pieces(self, offset: int) -> Iterator[Any]:
        at = offset // 8 + _SIZES
        sizes = self._words[at : at + int(self._words[at - _SIZES + _PIECES])].tolist()
        start = _behind(offset, len(sizes))
        for size in sizes:
            yield self._bytes[start : start + size]
            start = whole_lines(start + size)

    def _is_whole(self, index: int, offset: int) -> bool:
        if self._trusted is None or self._trusted[index]:
            return True
        record = self._words[offset // 8 : offset // 8 + _SIZES]
        whole = (
            self._first <= offset <= self.nbytes - _SIZES * 8
            and record[_INDEX] == index
            and 0 < record[_NBYTES] <= self.nbytes - offset
            and record[_CHECKSUM] == zlib.crc32(self._bytes[offset + _PIECES * 8 : offset + int(record[_NBYTES])])
        )
        self._trusted[index] = whole
        return bool(whole)

    # -- writing

    def put(self, index: int, sample: Any) -> bool:
        """Keep the sample if there is room for it.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: it cannot be pickled.
        """
        nbytes, parts = self._record(index, sample)
        words = self._words
        if self._patience_s == 0 or words[REFUSED_AT] == MACHINE_FULL:
            return False
        if words[TAIL_AT] + nbytes > self.nbytes:
            words[REFUSED_AT] = FULL
            return False
        try:
            with self._descriptor() as fd:
                offset = self._claim(fd, nbytes)
                # Through the descriptor: on a full machine a write is refused, a store into the mapping a bus error.
                if offset is None or not _write(fd, parts, offset):
                    return False
        except OSError as error:  # also if no descriptor is left, or somebody closed ours: no reason to fail a read
            if error.errno in _NO_ROOM:
                words[REFUSED_AT] = MACHINE_FULL
            return False
        # Processors other than x86 may show stores in another order. Between letting go of a lock and taking one none
        # passes.
        fence = threading.Lock()
        for _ in range(2):
            with fence:
                pass
        self._table[index] = offset
        return True

    def _record(self, index: int, sample: Any) -> tuple[int, list[Any]]:
        """The bytes of a record, in parts, and how many these are."""
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Packer(stream, protocol=5, buffer_callback=buffers.append).dump(sample)
        pieces = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
        nbytes = _behind(0, len(pieces))
        head = struct.pack(f"{1 + len(pieces)}q", len(pieces), *(piece.nbytes for piece in pieces))
        parts: list[Any] = [head.ljust(nbytes - _PIECES * 8, b"\0")]
        for piece in pieces:
            parts += piece, bytes(whole_lines(piece.nbytes) - piece.nbytes)
            nbytes += whole_lines(piece.nbytes)
        checksum = 0
        if self._trusted is not None:
            for part in parts:
                checksum = zlib.crc32(part, checksum)
        return nbytes, [struct.pack("3q", index, nbytes, checksum), *parts]

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """An open file of this call alone: a lock on one that is inherited or shared is shared, too."""
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if _identity(fd) != self._identity:
                raise OSError(errno.EBADF, "the descriptor of the cache is that of another file")
            yield fd
        finally:
            os.close(fd)

    def _claim(self, fd: int, nbytes: int) -> int | None:
        """The offset of `nbytes` that are this record's alone; None if there are none."""
        words = self._words
        if not self._lock(fd):
            return None
        try:
            offset = int(words[TAIL_AT])
            end = offset + nbytes
            if end > self.nbytes:
                return None
            if end > words[LOOKED_AT]:
                target = min(self.nbytes, end + _GROWTH)
                if self.path is None and target - offset > available_nbytes() - _HEADROOM:
                    words[REFUSED_AT] = MACHINE_FULL
                    return None
                words[LOOKED_AT] = target
            words[TAIL_AT] = end
            return offset
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def _lock(self, fd: int) -> bool:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._patience_s = 0.0
                    return False
                time.sleep(2e-5)

    # -- what is told

    def count_read(self, served: bool) -> None:
        """One more read, in a counter of this process; threads, and processes 64 numbers apart, may miss some."""
        at = COUNTERS + os.getpid() % PROCESSES * LINE
        self._words[at] += 1
        if served:
            self._words[at + 1] += 1

    def _counted(self) -> np.ndarray[Any, Any]:
        """All reads so far, and those of them that were served."""
        lines = self._words[COUNTERS : COUNTERS + PROCESSES * LINE].reshape(PROCESSES, LINE)
        counts: np.ndarray[Any, Any] = lines[:, :2].sum(axis=0)
        return counts

    @property
    def hit_rate(self) -> float:
        """Reads served / all reads by all processes since this process made or opened the records; nan if none."""
        reads, served = (self._counted() - self._before).tolist()
        return served / reads if reads else float("nan")

    @property
    def count(self) -> int:
        """Number of samples present."""
        return int(np.count_nonzero(self._table))

    @property
    def used_nbytes(self) -> int:
        """Bytes taken, table included."""
        return int(self._words[TAIL_AT])

    @property
    def refused(self) -> int:
        """ROOM_LEFT; FULL if a sample did not fit; MACHINE_FULL if memory, or the disk, had no more."""
        return int(self._words[REFUSED_AT])


class _Packer(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # Only contiguous arrays leave their bytes to the caller in every NumPy, and read-only ones come back read-only.
        if type(obj) is np.ndarray and not (obj.flags.forc and obj.flags.writeable) and not obj.dtype.hasobject:
            return obj.copy().__reduce_ex__(5)
        return NotImplemented


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _write(fd: int, parts: list[Any], offset: int) -> bool:
    """Whether all of the parts could be written."""
    for first in range(0, len(parts), _PARTS_AT_ONCE):
        some = parts[first : first + _PARTS_AT_ONCE]
        nbytes = sum(memoryview(part).nbytes for part in some)
        if os.pwritev(fd, some, offset) != nbytes:
            return False
        offset += nbytes
    return True


def _behind(offset: int, pieces: int) -> int:
    """Where the first of so many pieces of the record at `offset` begins."""
    return whole_lines(offset + (_SIZES + pieces) * 8)


def _attach(length: int, nbytes: int, descriptor: Any) -> SharedRecords:
    """The same records in a process that was passed their descriptor."""
    records = SharedRecords.__new__(SharedRecords)
    records.length, records.nbytes, records.path = length, nbytes, None
    records._first = first_record(length)
    records._start(descriptor.detach())
    return records
