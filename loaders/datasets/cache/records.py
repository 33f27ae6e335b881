"""Samples in memory that processes share: each is written once and read by all; a killed process blocks no other.

The memory is an anonymous file or one with a path: a header, a table with one word per sample, and the records in
sequence. A writer claims the space of a record, writes its bytes, and then stores its offset in the table, which makes
it visible. A process that is killed before that leaves a gap that is never read.
"""

from __future__ import annotations

import errno
import mmap
import os
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

from loaders.batch.packing import pack, unpack
from loaders.datasets.cache import plain
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
from loaders.datasets.cache.storage import Bytes, File, Mapping, Words, close, identity
from loaders.errors import DatasetError

if sys.platform != "win32":  # on Windows this module can be imported, but no cache made
    import fcntl
    from multiprocessing.reduction import DupFd

    from loaders.system.limits import available_nbytes

ABSENT: Any = object()

# Words of a record. The pieces follow, each aligned to 64 bytes: the description of the sample, and its arrays' bytes.
# In memory the description is a pickle. In a file it is JSON, because a manipulated pickle could run any code.
_INDEX, _NBYTES, _CHECKSUM, _PIECES, _SIZES = range(5)

# Available memory is checked this many bytes ahead.
_GROWTH = 16 << 20
# Left to the rest of the machine; the arena of the batches leaves as much.
_HEADROOM = 64 << 20
# A claim holds the lock for a few microseconds. A lock that cannot be acquired for this long is orphaned: its process
# was killed while holding it, but a child forked meanwhile still shares it.
_PATIENCE_S = 5.0
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)
_PARTS_AT_ONCE = 1000  # Linux accepts 1024
_CHECKED_AT_ONCE = 1 << 20
_AT_ONCE = 4096  # bytes of a record read first, enough for a small one

ROOM_LEFT, FULL, MACHINE_FULL = range(3)


class SharedRecords:
    """Space for `length` samples in at most `nbytes` bytes, shared by this process and all that it is passed to.

    Args:
        length: number of samples.
        nbytes: maximum size, all included; allocated as it fills.
        path: a file that outlives the processes; None for memory that is freed with the last of them.
        fingerprint: 32 bytes that identify the dataset; a file with different ones is refused.

    Raises:
        DatasetError: `nbytes` is too small for the table, the file at `path` was made for something else, or this is
            not Linux.
        OSError: the file cannot be created or opened.
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
            raise DatasetError(f"nbytes={nbytes:,} is too small: the table of {length:,} samples takes {least:,}.")
        if not os.path.exists("/proc/self/fd") or not hasattr(os, "memfd_create"):
            raise DatasetError("DecodedCache needs Linux, for memfd_create and /proc/self/fd.")
        if self.path is not None:
            self._start(open_file(self.path, length, self.nbytes, fingerprint))
        else:
            fd = os.memfd_create("loaders-cache", os.MFD_CLOEXEC)
            lay_out(fd, length, self.nbytes, fingerprint)
            self._start(fd)

    def _start(self, fd: int) -> None:
        self._fd = fd
        self._identity = identity(fd)
        self._patience_s = _PATIENCE_S
        weakref.finalize(self, close, fd, self._identity)
        self._storage = Mapping(fd, self.nbytes) if self.path is None else File(fd, self.nbytes, self.path)
        # Offset at which each sample's record was verified. A power failure may leave incomplete records in a file, so
        # each is verified when it is first read.
        self._whole_at = np.zeros(self.length, np.int64) if self.path is not None else None
        if self.path is not None:
            self._find_tail()
        self._before = self._counted()

    @property
    def _table(self) -> Words:
        return self._storage.words(TABLE, self.length)

    def _word(self, at: int) -> int:
        return int(self._storage.words(at, 1)[0])

    def _find_tail(self) -> None:
        # After a power failure the words of the header may be older than those of the table.
        with self._descriptor() as fd:
            table = self._table
            nowhere = (table < self._first) | (table > self.nbytes - _SIZES * 8) | (table % 64 != 0)
            for index in np.flatnonzero(nowhere & (table != 0))[:1].tolist():
                self._place(index, int(table[index]))  # raises
            self._tail()
            last = int(table.max(initial=0))
            if last and self._lock(fd):
                nbytes = self._word(last // 8 + _NBYTES)
                end = last + nbytes if 0 < nbytes <= self.nbytes - last and nbytes % 64 == 0 else last
                self._storage.store(TAIL_AT, max(self._tail(), end))
                fcntl.flock(fd, fcntl.LOCK_UN)
            self._storage.store(REFUSED_AT, ROOM_LEFT)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return SharedRecords, (self.length, self.nbytes, self.path, self._fingerprint)
        if get_spawning_popen() is None:
            raise DatasetError(
                "a DecodedCache without a path is memory shared by these processes: it is passed to worker processes "
                "as they are started, and cannot be pickled otherwise.\n  Give it a path=: an unpickled copy opens "
                "the same file."
            )
        return _attach, (self.length, self.nbytes, DupFd(self._fd))

    def __deepcopy__(self, memo: Any) -> SharedRecords:
        return self

    # -- reading

    def get(self, index: int) -> Any:
        """The sample with its own copies of the arrays, or ABSENT."""
        return self._read(index, copied=True)

    def view(self, index: int) -> Any:
        """The sample, to be read only, or ABSENT; in memory its arrays are read-only views of the cache."""
        return self._read(index, copied=False)

    def _read(self, index: int, *, copied: bool) -> Any:
        self._storage.check()
        # The addresses of all other words depend on this one, so no processor reads them before it.
        offset = self._word(TABLE + index)
        if not offset:
            return ABSENT
        words = self._storage.words(self._place(index, offset) // 8, min(_AT_ONCE, self.nbytes - offset) // 8)
        if not self._is_whole(index, offset, words):
            return ABSENT
        sizes = self._sizes(index, offset, words)
        head: Bytes = words.view(np.uint8)
        at, pieces = _behind(0, len(sizes)), []
        for size in sizes:
            known = at + size <= head.nbytes
            pieces.append(head[at : at + size] if known else self._storage.read(offset + at, size))
            at = whole_lines(at + size)
        description, *arrays = pieces
        if copied:
            arrays = [array.copy() if array.base is not None else array for array in arrays]
        if self.path is None:
            return unpack(description, arrays)
        try:
            return plain.decode(description, arrays)
        except plain.UnknownClassError:
            return ABSENT  # until the dataset has returned one
        except ValueError as error:
            raise self._damaged(f"the record of sample {index} has an invalid description: {error}") from error

    def _place(self, index: int, offset: int) -> int:
        """The offset, checked to be one where a record may start."""
        if not self._first <= offset <= self.nbytes - _SIZES * 8 or offset % 64:
            raise self._damaged(f"its table has sample {index} at byte {offset:,}")
        return offset

    def _sizes(self, index: int, offset: int, words: Words) -> list[int]:
        nbytes, pieces = int(words[_NBYTES]), int(words[_PIECES])
        if 0 < pieces <= nbytes // 8 - _SIZES:
            if _SIZES + pieces > len(words):
                words = self._storage.words(offset // 8, _SIZES + pieces)
            sizes: list[int] = words[_SIZES : _SIZES + pieces].tolist()
            if min(sizes) >= 0 and _behind(0, pieces) + sum(map(whole_lines, sizes)) == nbytes:
                return sizes
        raise self._damaged(f"the record of sample {index} has pieces that do not fit into it")

    def _is_whole(self, index: int, offset: int, words: Words) -> bool:
        """Whether the record that begins with these words is the sample's, and intact."""
        if self._whole_at is None:
            return True
        number, nbytes, checksum = words[:_PIECES].tolist()
        if number != index or not _PIECES * 8 < nbytes <= self.nbytes - offset:
            return False
        if self._whole_at[index] != offset:
            start, end, found = offset + _PIECES * 8, offset + nbytes, 0
            for at in range(start, end, _CHECKED_AT_ONCE):
                found = zlib.crc32(self._storage.read(at, min(_CHECKED_AT_ONCE, end - at)), found)
            if found != checksum:
                return False
            self._whole_at[index] = offset
        return True

    def _damaged(self, how: str) -> DatasetError:
        return DatasetError(f'"{self.path}" is damaged: {how}.\n  Delete it and start again.')

    # -- writing

    def put(self, index: int, sample: Any) -> bool:
        """Store the sample if there is space for it; returns whether it is stored.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: it cannot be pickled or, in a file, not be described.
            DatasetError: the file is damaged.
        """
        nbytes, parts = self._record(index, sample)
        if self._patience_s == 0 or self.refused == MACHINE_FULL:
            return False
        offset = self._word(TABLE + index)
        if offset and self._is_whole(index, offset, self._storage.words(self._place(index, offset) // 8, _SIZES)):
            return True  # another process was first, or the class was unknown here
        if self._tail() + nbytes > self.nbytes:
            self._storage.store(REFUSED_AT, FULL)
            return False
        try:
            with self._descriptor() as fd:
                offset_or_none = self._claim(fd, nbytes)
                # By the descriptor: without free memory a write fails, but a store into the mapping is a bus error.
                if offset_or_none is None or not _write(fd, parts, offset_or_none):
                    return False
                # Processors other than x86 may reorder stores, but not across releasing and then acquiring a lock.
                fence = threading.Lock()
                for _ in range(2):
                    with fence:
                        pass
                self._storage.store(TABLE + index, offset_or_none)
        except OSError as error:  # also if no descriptor is free, or ours was closed: must not fail a read
            if error.errno in _NO_ROOM:
                self._storage.store(REFUSED_AT, MACHINE_FULL)
            return False
        return True

    def _record(self, index: int, sample: Any) -> tuple[int, list[Any]]:
        """The size of a record in bytes, and its bytes in parts."""
        if self.path is None:
            description, buffers = pack(sample, writable=True)
            pieces = [memoryview(description), *(buffer.raw() for buffer in buffers)]
        else:
            description, arrays = plain.encode(sample)
            pieces = [memoryview(description), *(array.data for array in arrays)]
        nbytes = _behind(0, len(pieces))
        head = struct.pack(f"{1 + len(pieces)}q", len(pieces), *(piece.nbytes for piece in pieces))
        parts: list[Any] = [head.ljust(nbytes - _PIECES * 8, b"\0")]
        for piece in pieces:
            parts += piece, bytes(whole_lines(piece.nbytes) - piece.nbytes)
            nbytes += whole_lines(piece.nbytes)
        checksum = 0
        if self._whole_at is not None:
            for part in parts:
                checksum = zlib.crc32(part, checksum)
        return nbytes, [struct.pack("3q", index, nbytes, checksum), *parts]

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """A descriptor opened for this call alone: a lock on an inherited or shared one is itself shared."""
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if identity(fd) != self._identity:
                raise OSError(errno.EBADF, "the descriptor of the cache refers to another file")
            yield fd
        finally:
            os.close(fd)

    def _claim(self, fd: int, nbytes: int) -> int | None:
        """Claim `nbytes` for one record: their offset, or None if there is no space or the lock cannot be acquired."""
        if not self._lock(fd):
            return None
        try:
            offset = self._tail()
            end = offset + nbytes
            if end > self.nbytes:
                return None
            if end > self._word(LOOKED_AT):
                target = min(self.nbytes, end + _GROWTH)
                if self.path is None and target - offset > available_nbytes() - _HEADROOM:
                    self._storage.store(REFUSED_AT, MACHINE_FULL)
                    return None
                self._storage.store(LOOKED_AT, target)
            self._storage.store(TAIL_AT, end)
            return offset
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def _tail(self) -> int:
        """The offset of the next record."""
        tail = self._word(TAIL_AT)
        if not self._first <= tail <= self.nbytes or tail % 64:
            raise self._damaged(f"it says that its records end at byte {tail:,}")
        return tail

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

    # -- statistics

    def count_read(self, served: bool) -> None:
        """Count a read in this process's counter; threads, and processes whose ids are 64 apart, may lose some."""
        at = COUNTERS + os.getpid() % PROCESSES * LINE
        reads, hits = self._storage.words(at, 2).tolist()
        self._storage.store(at, reads + 1, hits + served)

    def _counted(self) -> np.ndarray[Any, Any]:
        """All reads so far, and those served from the cache; int64 (2,)."""
        lines = self._storage.words(COUNTERS, PROCESSES * LINE).reshape(PROCESSES, LINE)
        counts: np.ndarray[Any, Any] = lines[:, :2].sum(axis=0)
        return counts

    @property
    def hit_rate(self) -> float:
        """Reads served / all reads, of all processes, since this one made or opened the records; nan if none."""
        reads, served = (self._counted() - self._before).tolist()
        return served / reads if reads else float("nan")

    @property
    def count(self) -> int:
        """Number of samples present."""
        return int(np.count_nonzero(self._table))

    @property
    def used_nbytes(self) -> int:
        """Bytes in use, table included."""
        return self._word(TAIL_AT)

    @property
    def refused(self) -> int:
        """ROOM_LEFT; FULL if a sample did not fit; MACHINE_FULL if memory or disk space ran out."""
        return self._word(REFUSED_AT)


def _write(fd: int, parts: list[Any], offset: int) -> bool:
    """Write the parts in sequence; returns whether all bytes were written."""
    for first in range(0, len(parts), _PARTS_AT_ONCE):
        some = parts[first : first + _PARTS_AT_ONCE]
        nbytes = sum(memoryview(part).nbytes for part in some)
        if os.pwritev(fd, some, offset) != nbytes:
            return False
        offset += nbytes
    return True


def _behind(offset: int, pieces: int) -> int:
    """Where the first of `pieces` pieces begins, in a record at `offset`."""
    return whole_lines(offset + (_SIZES + pieces) * 8)


def _attach(length: int, nbytes: int, descriptor: Any) -> SharedRecords:
    """The same records in a process that received their descriptor."""
    records = SharedRecords.__new__(SharedRecords)
    records.length, records.nbytes, records.path = length, nbytes, None
    records._first = first_record(length)
    records._start(descriptor.detach())
    return records
