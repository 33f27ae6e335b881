"""NumPy views of the memory of a column's chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]
# (buffer of a chunk or None, its first item)
Start = tuple[Any, int]

# Rows of this size are copied one by one; smaller ones are gathered together, which copies some of them twice.
_LARGE_NBYTES = 4096


class Layout:
    """How the rows of a column are divided into chunks; columns with the same division share one.

    Args:
        ends: int64 (chunks,), the rows up to and including each chunk.
    """

    def __init__(self, ends: Indices) -> None:
        self._ends = ends
        self._is_one = len(ends) == 1
        self._rows = int(ends[-1]) if len(ends) else 0
        # The last answers: the columns of a table ask for the same rows. Replaced as a whole, so safe across threads.
        self._last = (-1, 0, 0)
        self._last_all: tuple[Any, Any, Any] = (None, None, None)

    def find(self, row: int) -> tuple[int, int]:
        """The chunk of a row, and its number in it."""
        if row >= self._rows:
            raise self._beyond(row)
        if self._is_one:
            return 0, row
        last = self._last
        if last[0] != row:
            chunk = int(self._ends.searchsorted(row, "right"))
            last = self._last = row, chunk, row - int(self._ends[chunk - 1]) if chunk else row
        return last[1], last[2]

    def find_all(self, rows: Indices) -> tuple[Indices, Indices]:
        """The same for many rows."""
        if len(rows) and (row := int(rows.max())) >= self._rows:
            raise self._beyond(row)
        if self._is_one:
            return np.zeros(len(rows), np.int64), rows
        last = self._last_all
        if last[0] is not rows:
            chunks = self._ends.searchsorted(rows, "right")
            starts = np.concatenate(([0], self._ends[:-1]))
            last = self._last_all = rows, chunks, rows - starts[chunks]
        return last[1], last[2]

    def _beyond(self, row: int) -> IndexError:
        return IndexError(
            f"there is no row {row:,}: the table has {self._rows:,}, fewer than the dataset was made from"
        )


class _Chunks:
    """The memory of chunks, as arrays of `dtype`: chunks of one memory map, or of one allocation, share an array.

    So the rows of a batch, which lie in as many chunks, are gathered by a single call.
    """

    def __init__(self, starts: Sequence[Start], dtype: np.dtype[Any], per_byte: int = 1) -> None:
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.number_of = np.full(len(starts), -1, np.int64)
        self.starts = np.zeros(len(starts), np.int64)
        numbers: dict[tuple[int, int, int], int] = {}
        for chunk, (buffer, first) in enumerate(starts):
            if buffer is None or buffer.size == 0:
                continue
            root = buffer
            while root.parent is not None:
                root = root.parent
            offset = buffer.address - root.address
            # With the size: two arrays may begin at one address, such as a NumPy array and its first rows.
            key = root.address, root.size, offset % dtype.itemsize
            if key not in numbers:
                numbers[key] = len(self.arrays)
                memory = np.frombuffer(root, np.uint8)[offset % dtype.itemsize :]
                array = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
                array.flags.writeable = False
                self.arrays.append(array)
            self.number_of[chunk] = numbers[key]
            self.starts[chunk] = offset // dtype.itemsize * per_byte + first
        self.is_one = len(self.arrays) == 1 and not (self.number_of < 0).any()


class Blocks:
    """The items of a column of numbers, of all its chunks.

    Args:
        starts: of each chunk.
        stored: dtype in memory.
        dtype: of the items that are read, if it has the same size as `stored`.
    """

    def __init__(self, starts: Sequence[Start], stored: np.dtype[Any], dtype: np.dtype[Any]) -> None:
        self._chunks = _Chunks(starts, stored)
        if dtype.itemsize == stored.itemsize:
            self._chunks.arrays = [array.view(dtype) for array in self._chunks.arrays]

    def view(self, chunk: int, first: int, items: int) -> np.ndarray[Any, Any]:
        """Some items of a chunk: a read-only view."""
        chunks = self._chunks
        start = int(chunks.starts[chunk]) + first
        return chunks.arrays[0 if chunks.is_one else chunks.number_of[chunk]][start : start + items]

    def item(self, chunk: int, at: int) -> Any:
        """One item, a NumPy scalar."""
        chunks = self._chunks
        return chunks.arrays[0 if chunks.is_one else chunks.number_of[chunk]][int(chunks.starts[chunk]) + at]

    def take(self, number_of: Indices, firsts: Indices, out: np.ndarray[Any, Any]) -> None:
        """Write as many items as `out` has in a row, from `firsts` on, into each row of `out` (rows, items)."""
        chunks = self._chunks
        starts = chunks.starts[number_of] + firsts
        if chunks.is_one:
            _gather(chunks.arrays[0], starts, out)
            return
        arrays = chunks.number_of[number_of]
        for number in np.unique(arrays):
            where = np.flatnonzero(arrays == number)
            part = np.empty((len(where), *out.shape[1:]), out.dtype)
            _gather(chunks.arrays[number], starts[where], part)
            out[where] = part


class Bits:
    """The items of a bit-packed column: booleans, or which values are not null."""

    def __init__(self, starts: Sequence[Start]) -> None:
        self._chunks = _Chunks(starts, np.dtype(np.uint8), 8)

    def view(self, chunk: int, first: int, items: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Some items of a chunk, unpacked. All True where the chunk has no bits."""
        number = int(self._chunks.number_of[chunk])
        if number < 0:
            return np.ones(items, np.bool_)
        at = np.arange(first, first + items) + self._chunks.starts[chunk]
        return _bits(self._chunks.arrays[number], at)

    def item(self, chunk: int, at: int) -> np.bool_:
        """One item."""
        number = int(self._chunks.number_of[chunk])
        if number < 0:
            return np.True_
        at += int(self._chunks.starts[chunk])
        return np.bool_(int(self._chunks.arrays[number][at >> 3]) >> (at & 7) & 1)

    def take(self, number_of: Indices, firsts: Indices, out: np.ndarray[Any, Any]) -> None:
        """As `Blocks.take`."""
        out[...] = True
        arrays, items = self._chunks.number_of[number_of], np.arange(out.shape[1])
        for number in np.unique(arrays[arrays >= 0]):
            where = np.flatnonzero(arrays == number)
            at = (self._chunks.starts[number_of[where]] + firsts[where])[:, None] + items
            out[where] = _bits(self._chunks.arrays[number], at)


def _bits(array: np.ndarray[Any, Any], at: Indices) -> np.ndarray[Any, np.dtype[np.bool_]]:
    bits: np.ndarray[Any, np.dtype[np.bool_]] = (array[at >> 3] >> (at & 7) & 1).astype(np.bool_)
    return bits


def _gather(array: np.ndarray[Any, Any], starts: Indices, out: np.ndarray[Any, Any]) -> None:
    """Write `array[start : start + items]` into each row of `out` (rows, items)."""
    items = out.shape[1]
    is_same = out.dtype == array.dtype and out.flags.c_contiguous
    if is_same and not (starts % items).any():
        whole = array[: len(array) // items * items].reshape(-1, items)
        np.take(whole, starts // items, axis=0, out=out, mode="clip")  # "raise" would write to a copy of `out` first
    elif items == 1:
        out[:, 0] = array[starts]
    elif items * array.itemsize >= _LARGE_NBYTES:
        for row, start in enumerate(starts.tolist()):
            out[row] = array[start : start + items]
    else:
        windows = np.lib.stride_tricks.as_strided(
            array, (len(array) - items + 1, items), (array.itemsize, array.itemsize), writeable=False
        )
        out[...] = windows[starts]
