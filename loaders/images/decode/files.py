"""Sources of encoded images: bytes in memory, local files, remote files; read whole or in parts."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from loaders.errors import MissingExtraError
from loaders.images.decode.opencv import UndecodableError
from loaders.timing.stages import READ, count_read

_Data = TypeVar("_Data", bytes, bytearray)

# Parts of a remote file share a request if at most this lies between them: a request costs as much as these bytes.
_GAP_NBYTES = 64 * 1024
_REMOTE = "://"


class Parts(Protocol):
    """An encoded image, of which parts can be read.

    Attributes:
        path: None for bytes in memory.
        nbytes: its size.
        mtime_ns: its modification time; None where that does not identify its content.
    """

    path: str | None
    nbytes: int
    mtime_ns: int | None

    def read(self) -> bytes:
        """All of it."""

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        """The bytes of some parts, concatenated; fewer where they extend past the end."""

    def close(self) -> None:
        """Close it."""


class Stored(ABC):
    """An encoded image that is a part of a file, such as a member of a tar shard."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The path of the file and its name there, for messages."""

    @abstractmethod
    def open(self) -> Parts:
        """Open it.

        Raises:
            OSError: it cannot be opened.
        """


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Stored


def is_remote(source: object) -> bool:
    """Whether it is a path that fsspec opens, such as `s3://bucket/photo.jpg`."""
    return isinstance(source, str) and _REMOTE in source


def open_parts(source: Source, *, is_sample: bool = False) -> Parts:
    """Open an image file, given as a path, a URL for fsspec, encoded bytes, or a part of another file.

    Args:
        source: the path, URL, bytes or part.
        is_sample: whether it is a sample of a dataset, which is read repeatedly: a pipe or a device is refused, as
            opening or reading it may block forever.

    Raises:
        OSError, UndecodableError: it cannot be opened.
        MissingExtraError: it is a URL, and fsspec or its package for the protocol is not installed.
    """
    if isinstance(source, Stored):
        return source.open()
    if not isinstance(source, (str, os.PathLike)):
        return _Bytes(bytes(source))
    if isinstance(source, str) and is_remote(source):
        return _RemoteFile(source)
    return _LocalFile(source, is_sample)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the file's name in it.

    Raises:
        MissingExtraError: fsspec or its package for the protocol is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError(f"\"{url}\" needs fsspec, which is missing: pip install 'loaders[remote]'.") from error
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except ImportError as error:  # such as s3fs, gcsfs, aiohttp
        raise MissingExtraError(f'"{url}": {error}') from error
    return found


def cat_ranges(files: Any, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
    """The bytes of some parts of a remote file, in ascending order; parts near to each other share a request.

    Args:
        files: fsspec's file system.
        name: of the file in it.
    """
    together: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        is_near = together and start - together[-1][1] <= _GAP_NBYTES
        together.append((together.pop()[0] if is_near else start, end))
    begins, lasts = ([piece[end] for piece in together] for end in (0, 1))
    blocks = files.cat_ranges([name] * len(together), begins, lasts, on_error="raise")
    found, block = list[bytes](), 0
    for start, end in zip(starts, ends, strict=True):
        while end > lasts[block]:
            block += 1
        found.append(bytes(blocks[block][start - begins[block] : end - begins[block]]))
    return found


class MarkedParts:
    """The same image, with its reads timed and counted for the current sample."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.path, self.nbytes, self.mtime_ns = parts.path, parts.nbytes, parts.mtime_ns

    def read(self) -> bytes:
        """All of it."""
        with READ:
            return self._counted(self._parts.read())

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        """The bytes of some parts."""
        with READ:
            return self._counted(self._parts.read_parts(starts, ends))

    def close(self) -> None:
        """Close it."""
        self._parts.close()

    def _counted(self, data: _Data) -> _Data:
        if self.path is not None:
            count_read(len(data))
        return data


class _Bytes:
    path: str | None = None
    mtime_ns: int | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def read(self) -> bytes:
        return self._data

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        view = memoryview(self._data)
        return bytearray().join([view[start:end] for start, end in zip(starts, ends, strict=True)])

    def close(self) -> None:
        pass


class _LocalFile:
    def __init__(self, path: str | os.PathLike[str], is_sample: bool) -> None:
        self.path: str | None = os.fspath(path)
        try:
            self._file = io.FileIO(path, "rb", opener=_open_without_waiting if is_sample else None)
        except ValueError as error:  # a NUL in the name
            raise UndecodableError(str(error)) from error
        status = os.fstat(self._file.fileno())
        if is_sample and not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise UndecodableError("it is a pipe or a device, not a file")
        self.nbytes = status.st_size
        self.mtime_ns: int | None = status.st_mtime_ns
        self._pipe: _Bytes | None = None
        if not stat.S_ISREG(status.st_mode):  # a pipe has no offsets
            self._pipe = _Bytes(self._file.readall())
            self.nbytes = self._pipe.nbytes

    def read(self) -> bytes:
        if self._pipe is not None:
            return self._pipe.read()
        self._file.seek(0)
        return self._file.readall()

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        if self._pipe is not None:
            return self._pipe.read_parts(starts, ends)
        fd = self._file.fileno()
        if hasattr(os, "pread"):
            pieces = [os.pread(fd, end - start, start) for start, end in zip(starts, ends, strict=True)]
        else:  # Windows
            pieces = []
            for start, end in zip(starts, ends, strict=True):
                self._file.seek(start)
                pieces.append(self._file.read(end - start))
        return bytearray().join(pieces)

    def close(self) -> None:
        self._file.close()


def _open_without_waiting(path: str, flags: int) -> int:
    # Opens a pipe without waiting for a writer; the flag has no effect on a file.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class _RemoteFile:
    mtime_ns: int | None = None  # object stores report the time of the upload

    def __init__(self, url: str) -> None:
        self.path: str | None = url
        self._files, self._name = file_system(url)
        self.nbytes = int(self._files.size(self._name) or 0)

    def read(self) -> bytes:
        return bytes(self._files.cat_file(self._name))

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        return bytearray().join(cat_ranges(self._files, self._name, starts, ends))

    def close(self) -> None:
        pass
