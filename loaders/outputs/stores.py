"""Where collected rows are kept until the end: in memory, in the final files, or in a rank's own scratch files.

Arrays of one batch come as a list, one per output, always in the same order: `Rows` says what each is.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """One output: `name` is "" where there is but one; each of its rows has this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class MemoryStore:
    """Rows in memory, batch by batch; put together when they are asked for."""

    wants_copies = True

    def __init__(self, kinds: Sequence[Rows]) -> None:
        self._kinds = kinds
        self._indices: list[Array] = []
        self._pieces: list[list[Array]] = [[] for _ in kinds]

    def put(self, index: Array, arrays: Sequence[Array]) -> None:
        """Keep the arrays, which nobody else writes to, and the index of each of their rows."""
        if len(index):
            self._indices.append(index)
            for pieces, array in zip(self._pieces, arrays, strict=True):
                pieces.append(array)

    def indices(self) -> Array:
        """int64 (N,), ascending: which rows there are, and so the order of `arrays`."""
        if len(self._indices) != 1 or (np.diff(self._indices[0]) <= 0).any():
            self._merge()
        return self._indices[0]

    def arrays(self) -> list[Array]:
        """One array (N, …) per output."""
        self.indices()
        return [pieces[0] for pieces in self._pieces]

    def take(self, start: int, stop: int) -> tuple[Array, list[Array]]:
        """Some of the rows and their indices."""
        return self.indices()[start:stop], [array[start:stop] for array in self.arrays()]

    def _merge(self) -> None:
        index = np.concatenate([np.empty(0, np.int64), *self._indices])
        kept, first = np.unique(index, return_index=True)
        target = np.full(len(index), -1)
        target[first] = np.arange(len(kept))
        for kind, pieces in zip(self._kinds, self._pieces, strict=True):
            merged = np.empty((len(kept), *kind.shape), kind.dtype)
            start = 0
            pieces.reverse()
            while pieces:  # each is released as soon as it is copied
                piece = pieces.pop()
                rows = target[start : start + len(piece)]
                start += len(piece)
                merged[rows[rows >= 0]] = piece if (rows >= 0).all() else piece[rows >= 0]
            pieces.append(merged)
        self._indices = [kept]


class LengthStore:
    """Rows 0 … `length` - 1 in memory, each written into its place at once."""

    wants_copies = False

    def __init__(self, kinds: Sequence[Rows], length: int) -> None:
        self._targets: list[Array] = [np.empty((length, *kind.shape), kind.dtype) for kind in kinds]
        self._has = np.zeros(length, bool)

    def put(self, index: Array, arrays: Sequence[Array]) -> None:
        """Write those rows that are not there yet."""
        _, first = np.unique(index, return_index=True)
        fresh = np.sort(first[~self._has[index[first]]])
        for target, array in zip(self._targets, arrays, strict=True):
            target[index[fresh]] = array if len(fresh) == len(index) else array[fresh]
        self._has[index[fresh]] = True

    def indices(self) -> Array:
        """int64 (N,), ascending: which rows there are."""
        return np.flatnonzero(self._has)

    def arrays(self) -> list[Array]:
        """One array (length, …) per output; what was not put is arbitrary."""
        return self._targets


class FileStore(LengthStore):
    """The same in memory-mapped `.npy` files. Their names end in `.part` until they are complete.

    Raises:
        OSError: there is no room for a file. Space is reserved up front: a mapped page without room is a bus error.
    """

    def __init__(self, kinds: Sequence[Rows], length: int, files: Sequence[Path]) -> None:
        super().__init__([], length)
        self._files = files
        for kind, file in zip(kinds, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = _part(file)
            self._targets.append(
                np.lib.format.open_memmap(part, mode="w+", dtype=kind.dtype, shape=(length, *kind.shape))
            )
            _reserve(part)

    def arrays(self) -> list[Array]:
        """Give the files their names, and map them read-only."""
        self._targets.clear()
        for file in self._files:
            _part(file).replace(file)
        return [np.load(file, mmap_mode="r") for file in self._files]


class ScratchStore:
    """Rows of a rank that only passes them on, in unnamed files beside the final ones, no larger than their rows."""

    wants_copies = False

    def __init__(self, kinds: Sequence[Rows], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._kinds = kinds
        self._indices: list[Array] = []
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in kinds]  # noqa: SIM115  they live as long as this

    def put(self, index: Array, arrays: Sequence[Array]) -> None:
        """Append the rows."""
        self._indices.append(index)
        for file, array in zip(self._files, arrays, strict=True):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def indices(self) -> Array:
        """int64 (N,), in the order of arrival."""
        self._indices = [np.concatenate([np.empty(0, np.int64), *self._indices])]
        return self._indices[0]

    def take(self, start: int, stop: int) -> tuple[Array, list[Array]]:
        """Some of the rows and their indices."""
        index = self.indices()[start:stop]
        arrays: list[Array] = []
        for kind, file in zip(self._kinds, self._files, strict=True):
            file.seek(start * kind.nbytes)
            read = file.read(len(index) * kind.nbytes)
            arrays.append(np.frombuffer(read, np.uint8).view(kind.dtype).reshape(len(index), *kind.shape))
        return index, arrays


Store: TypeAlias = MemoryStore | LengthStore | ScratchStore


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _reserve(file: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        nbytes = os.fstat(opened.fileno()).st_size
        try:
            os.posix_fallocate(opened.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
                file.unlink()
                raise OSError(error.errno, f"no room for {nbytes:,} bytes: {error.strerror}", str(file)) from None
