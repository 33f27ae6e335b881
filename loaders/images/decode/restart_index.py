"""The index of a folder of JPEGs with restart markers: one file in the folder with the offsets of their segments.

With it, a photo need not be read whole to find its markers. An entry is used only for a file that still has the same
size, modification time and header. Only `loaders prepare` writes the index; reading photos never does.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from loaders.images.decode.files import file_system, is_remote
from loaders.images.decode.restart import Restarts
from loaders.images.decode.restart_table import Table, entry_of, is_of

NAME = ".loaders-restarts.npy"

_ARRAY_FILE = b"\x93NUMPY\x01\x00"
_UNSAVED = 1 << 14  # entries at most; if they cannot be saved, the earliest are dropped
_SAVING_SHARE = 0.05  # of the time since the last save that a save may take, at most
_SAVE_EVERY_S = 1.0
_FOLDERS = 1 << 16  # whose index is cached, at most


class RestartIndex:
    """Entries of the files below one folder: the saved ones, and those added by this process.

    Args:
        folder: the folder of the index; None for an index that is not saved.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._added: OrderedDict[int, tuple[bytes, Restarts]] = OrderedDict()
        self._saved_at, self._took_s = time.monotonic(), 0.0
        self._table = _load(folder)

    def __len__(self) -> int:
        return len({*self._table.hashes, *self._added})

    def get(self, name: bytes, nbytes: int, mtime_ns: int | None) -> Restarts | None:
        """The entry of a file; None if there is none, or if the file has changed since.

        Args:
            name: path of the file, relative to the folder.
            nbytes: its size now.
            mtime_ns: its modification time now; None to ignore it.
        """
        number, table = _number(name), self._table
        entry, restarts = self._added.get(number, (None, None))
        entry = entry or table.entry(number)
        if entry is None:
            return None
        return (restarts or table.restarts(entry)) if is_of(entry, nbytes, mtime_ns) else None

    def add(self, name: bytes, nbytes: int, mtime_ns: int | None, restarts: Restarts) -> None:
        """Add an entry in memory; beyond a limit, the earliest is dropped."""
        self._added[_number(name)] = (entry_of(nbytes, mtime_ns or 0, restarts), restarts)
        while len(self._added) > _UNSAVED:
            self._added.popitem(last=False)

    def save_now_and_then(self) -> None:
        """Save the added entries if they are many, or if the last save was long enough ago."""
        waited_s = time.monotonic() - self._saved_at
        is_time = waited_s > _SAVE_EVERY_S and self._took_s < _SAVING_SHARE * waited_s
        if is_time or len(self._added) >= _UNSAVED:
            self.save()

    def save(self) -> bool:
        """Write the added entries to the file, merged with its current content.

        If two processes save at the same time, the entries of one may be lost; the file stays intact.

        Returns:
            False if it cannot be written: no permission, no space.
        """
        if self._folder is None or is_remote(self._folder):
            return False
        began, added = time.monotonic(), dict(self._added)
        try:
            _replace(self._folder, _load(self._folder).with_added(added))
            self._table = _load(self._folder)
        except OSError:
            return False
        finally:
            self._saved_at = time.monotonic()
            self._took_s = self._saved_at - began
        for number, entry in added.items():
            if self._added.get(number) is entry:
                del self._added[number]
        return True


_indexes: dict[str, RestartIndex] = {}
_homes: dict[str, tuple[RestartIndex, str] | None] = {}


def known_restarts(path: str, nbytes: int, mtime_ns: int | None) -> Restarts | None:
    """The entry of a file in the index of its folder or of one above it; without an index, what this process remembers.

    The entry is possible for a file of this size; only the file's header tells whether it is right.
    """
    home, name = _home(path)
    found = home.get(name, nbytes, mtime_ns)
    return found if found is not None and found.is_possible(nbytes) else None


def remember_restarts(path: str, nbytes: int, mtime_ns: int | None, restarts: Restarts) -> None:
    """Add an entry in memory, for the lifetime of this process."""
    _homes.pop(os.path.dirname(_absolute(path)), None)  # there may be an index by now
    home, name = _home(path)
    home.add(name, nbytes, mtime_ns, restarts)


def index_of(folder: str | os.PathLike[str]) -> RestartIndex:
    """The index of a folder, whether or not it has been saved yet."""
    where = os.path.realpath(folder)
    if where not in _indexes:
        _homes.clear()
        _indexes[where] = RestartIndex(where)
    return _indexes[where]


def _home(path: str) -> tuple[RestartIndex, bytes]:
    path = _absolute(path)
    folder = os.path.dirname(path)
    try:
        found = _homes[folder]
    except KeyError:
        if len(_homes) >= _FOLDERS:
            _homes.clear()
        found = _homes[folder] = _search(folder if is_remote(folder) else os.path.realpath(folder))
    if found is None:
        return _loose, os.fsencode(path)
    return found[0], os.fsencode(found[1] + path[len(folder) :].lstrip("/" + os.sep))


def _absolute(path: str) -> str:
    return path if os.path.isabs(path) or is_remote(path) else os.path.abspath(path)


def _search(start: str) -> tuple[RestartIndex, str] | None:
    """The nearest index in a folder or above it, and the folder's path relative to that, with a trailing separator."""
    folder = start
    while True:
        if folder not in _indexes and _exists(folder):
            _indexes[folder] = RestartIndex(folder)
        if folder in _indexes:
            below = start[len(folder) :].lstrip("/" + os.sep)
            return _indexes[folder], below and below + ("/" if is_remote(start) else os.sep)
        above = os.path.dirname(folder)
        if above in (folder, "") or above.endswith(":"):  # only `s3:` is left
            return None
        folder = above


def _exists(folder: str) -> bool:
    if not is_remote(folder):
        return os.path.exists(os.path.join(folder, NAME))
    files, name = file_system(f"{folder}/{NAME}")
    try:
        return bool(files.exists(name))
    except OSError:  # the photos may be readable without permission to list
        return False


class _IndexFile:
    """Bytes of an open file. It is not mapped: reading a mapping of a truncated file kills the process (SIGBUS)."""

    def __init__(self, path: str) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        self.nbytes = os.fstat(self._fd).st_size

    def read(self, at: int, nbytes: int) -> bytes:
        found = b""
        try:
            while len(found) < nbytes and (piece := self._read_once(at + len(found), nbytes - len(found))):
                found += piece  # more than one only beyond two gigabytes
        except OSError:
            pass
        return found

    def _read_once(self, at: int, nbytes: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, nbytes, at)
        os.lseek(self._fd, at, os.SEEK_SET)  # Windows
        return os.read(self._fd, nbytes)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _FetchedIndex:
    """Bytes of a file that is in memory."""

    def __init__(self, content: bytes = b"") -> None:
        self._content = content
        self.nbytes = len(content)

    def read(self, at: int, nbytes: int) -> bytes:
        return self._content[at : at + nbytes]


def _load(folder: str | None) -> Table:
    file: _IndexFile | _FetchedIndex = _FetchedIndex()
    try:
        if folder is not None and is_remote(folder):
            files, name = file_system(f"{folder}/{NAME}")
            file = _FetchedIndex(bytes(files.cat_file(name)))
        elif folder is not None:
            file = _IndexFile(os.path.join(folder, NAME))
    except OSError:  # missing
        pass
    # NumPy's own reader is unpredictable on a damaged header, and only the end of the header matters.
    head = file.read(0, 10)
    begin = 10 + int.from_bytes(head[8:10], "little")
    return Table(
        lambda at, nbytes: file.read(begin + at, nbytes), file.nbytes - begin if head[:8] == _ARRAY_FILE else 0
    )


def _replace(folder: str, content: np.ndarray[Any, Any]) -> None:
    unfinished = Path(folder, f".loaders-{secrets.token_hex(8)}.part")
    try:
        with open(unfinished, "xb") as file:
            np.save(file, content)
        os.replace(unfinished, os.path.join(folder, NAME))
    finally:
        unfinished.unlink(missing_ok=True)


def _number(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


_loose = RestartIndex(None)  # for files without an index in any folder above
