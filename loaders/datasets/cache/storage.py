"""Where the words and bytes of a cache are stored: in mapped anonymous memory, or in a file with a path.

A file is read by system calls and never mapped: if a mapped file is truncated, access kills the process (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from typing import Any

import numpy as np

from loaders.errors import DatasetError

Words = np.ndarray[Any, np.dtype[np.int64]]
Bytes = Any  # uint8 (N,); before Python 3.12 NumPy's types accept no buffers


class Mapping:
    """`nbytes` bytes of memory, mapped from `fd`."""

    def __init__(self, fd: int, nbytes: int) -> None:
        # mmap duplicates the descriptor unless trackfd is False.
        options: Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        memory: Any = mmap.mmap(fd, nbytes, **options)
        self._words = np.frombuffer(memory, np.int64)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._bytes.flags.writeable = False

    def check(self) -> None:
        """Do nothing: no other program can resize this memory."""

    def words(self, at: int, count: int) -> Words:
        """int64 (count,) from word `at` on; a view of the memory."""
        return self._words[at : at + count]

    def store(self, at: int, *values: int) -> None:
        """Write words, each in one store."""
        for number, value in enumerate(values):
            self._words[at + number] = value

    def read(self, start: int, nbytes: int) -> Bytes:
        """uint8 (nbytes,); a read-only view of the memory."""
        return self._bytes[start : start + nbytes]


class File:
    """A file of `nbytes` bytes, accessed by its descriptor."""

    def __init__(self, fd: int, nbytes: int, path: str) -> None:
        self._fd = fd
        self._nbytes = nbytes
        self._path = path
        self._identity = identity(fd)

    def check(self) -> None:
        """Check that the file still has its size.

        Raises:
            DatasetError: it was resized, or other code has closed the descriptor.
        """
        try:
            status = os.fstat(self._fd)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise DatasetError(f'"{self._path}": other code in this process has closed the descriptor of the cache.')
        if status.st_size != self._nbytes:
            raise self._cut_short(status.st_size)

    def words(self, at: int, count: int) -> Words:
        """int64 (count,) from word `at` on; a copy."""
        words: Words = self.read(at * 8, count * 8).view(np.int64)
        return words

    def store(self, at: int, *values: int) -> None:
        """Write words, all in one call."""
        self.check()
        os.pwrite(self._fd, struct.pack(f"{len(values)}q", *values), at * 8)

    def read(self, start: int, nbytes: int) -> Bytes:
        """uint8 (nbytes,); a copy."""
        content: Bytes = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:  # no call reads more than 2 GiB
            count = os.preadv(self._fd, [content[done:]], start + done)
            if not count:
                raise self._cut_short(start + done)
            done += count
        return content

    def _cut_short(self, nbytes: int) -> DatasetError:
        return DatasetError(
            f'"{self._path}" was changed while in use: it has {nbytes:,} bytes, not {self._nbytes:,}.\n'
            "  Delete it and start again."
        )


def identity(fd: int) -> tuple[int, int]:
    """What identifies the file of a descriptor: device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def close(fd: int, was: tuple[int, int]) -> None:
    """Close the descriptor, unless it now refers to another file."""
    try:
        if identity(fd) == was:
            os.close(fd)
    except OSError:  # already closed
        pass
