"""Open shards: a bounded number of descriptors in each process.

Descriptors are opened on first use and never pickled. Reads name their offset, so that threads and forked processes
share a descriptor without harm.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from loaders.datasets.tar.headers import BLOCK
from loaders.images.decode.files import cat_ranges, file_system, is_remote

MOST_OPEN = 64  # in each process, for each dataset
MOST_REMOTE = 4096  # these take no descriptor, and to open one is a request
_BEFORE_NBYTES = 2 * BLOCK  # a header, and before it the end of what extends it, such as a long name
_SMALL_NBYTES = 16 * 1024  # to copy so much is cheaper than a second system call
_HAS_PREAD = hasattr(os, "pread")
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class _Process:
    """This one: the number of forks that led to it. To ask for its id would be a system call for each read."""

    forks = 0


def _count_fork() -> None:
    _Process.forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Shard(Protocol):
    """An open shard.

    Attributes:
        path: path or URL.
        nbytes: its size.
        mtime_ns: its modification time; 0 where that does not identify its content.
    """

    path: str
    nbytes: int
    mtime_ns: int

    def read(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """The bytes of some parts; fewer where they extend past the end."""

    def read_member(self, start: int, nbytes: int) -> tuple[bytes, bytes]:
        """What precedes a member, from `before` on, and its content; fewer bytes where they extend past the end."""


def before(start: int) -> int:
    """Where that begins whose checksum is compared: the header before a member at `start`, and the block before it."""
    return max(0, start - _BEFORE_NBYTES)


def open_shard(path: str) -> Shard:
    """Open a shard.

    Raises:
        OSError: it cannot be opened, or is not a file.
        MissingExtraError: it is a URL, and fsspec or its package for the protocol is not installed.
    """
    return _RemoteShard(path) if is_remote(path) else _LocalShard(path)


class _LocalShard:
    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        # Opens a pipe without waiting for a writer; the flag has no effect on a file.
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is a folder, a pipe or a device, not a file")
        self.nbytes, self.mtime_ns = status.st_size, status.st_mtime_ns

    def read(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        return [self._read_one(start, end - start) for start, end in zip(starts, ends, strict=True)]

    def read_member(self, start: int, nbytes: int) -> tuple[bytes, bytes]:
        begin = before(start)
        if nbytes < _SMALL_NBYTES:
            both = self._read_one(begin, start - begin + nbytes)
            return both[: start - begin], both[start - begin :]
        return self._read_one(begin, start - begin), self._read_one(start, nbytes)

    def _read_one(self, start: int, nbytes: int) -> bytes:
        if not _HAS_PREAD:  # Windows
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(nbytes)
        found = os.pread(self._fd, nbytes, start)
        while len(found) < nbytes and (more := os.pread(self._fd, nbytes - len(found), start + len(found))):
            found += more  # no call reads more than 2 GiB
        return found

    def __del__(self) -> None:
        # Not when it is dropped from the open ones: another thread may be reading.
        if self._fd >= 0:
            os.close(self._fd)


class _RemoteShard:
    mtime_ns = 0  # object stores report the time of the upload

    def __init__(self, path: str) -> None:
        self.path = path
        self._files, self._name = file_system(path)
        self.nbytes = int(self._files.size(self._name) or 0)

    def read(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        return cat_ranges(self._files, self._name, starts, [min(end, self.nbytes) for end in ends])

    def read_member(self, start: int, nbytes: int) -> tuple[bytes, bytes]:
        header, content = self.read([before(start), start], [start, start + nbytes])
        return header, content


class OpenShards:
    """The shards that this process has open, at most `MOST_OPEN` files; the one not used for longest is closed first.

    Args:
        paths: of all shards.
        sizes, times: int64 (shards,), as they were when the members were found.
    """

    def __init__(self, paths: Sequence[str], sizes: Any, times: Any) -> None:
        self._paths, self._sizes, self._times = paths, sizes, times
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._forks = _Process.forks

    def __getitem__(self, number: int) -> Shard:
        if self._forks != _Process.forks:  # clients of remote stores do not survive a fork
            self._open, self._forks = OrderedDict(), _Process.forks
        # No lock, which a fork could copy while it is held: each call here is one step for other threads.
        shard = self._open.get(number)
        if shard is not None:
            try:
                self._open.move_to_end(number)
            except KeyError:  # another thread has just dropped it
                pass
            return shard
        shard = self._opened(self._paths[number])
        expected = int(self._sizes[number]), int(self._times[number])
        if (shard.nbytes, shard.mtime_ns) != expected:
            what = "size" if shard.nbytes != expected[0] else "modification time"
            raise OSError(
                f"its shard has changed since its members were found: it has another {what}.\n  Make the dataset "
                "again, and delete its index= file if it has one"
            )
        self._open[number] = shard
        while len(self._open) > (MOST_REMOTE if is_remote(shard.path) else MOST_OPEN):
            try:
                self._open.popitem(last=False)
            except KeyError:  # another thread did
                break
        return shard

    def _opened(self, path: str) -> Shard:
        try:
            return open_shard(path)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR or not self._open:
                raise
            self._open.clear()
            return open_shard(path)

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenShards, (self._paths, self._sizes, self._times)
