"""Tables in files: which rows are in which unit of reading, and the reader of a worker."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from loaders.datasets.arrow import ipc, parquet
from loaders.datasets.arrow.faults import RowError
from loaders.datasets.arrow.fields import FieldPlan
from loaders.datasets.arrow.pieces import Piece
from loaders.datasets.image_files import PackedPaths
from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.system.interrupts import is_interrupt
from loaders.system.limits import whole_cores

_FORMATS = {"parquet": (parquet.scan, parquet.ParquetReader), "ipc": (ipc.scan, ipc.IpcReader)}
_WILD = "*?["


def paths_of(source: Any) -> list[str]:
    """The files that a path, a glob pattern, or several of them name; those of a pattern sorted.

    Raises:
        DatasetError: a pattern matches nothing, or there are no files.
    """
    found: list[str] = []
    for each in [source] if isinstance(source, (str, bytes, os.PathLike)) else source:
        path = os.fsdecode(each)
        if "://" in path:
            raise DatasetError(f'"{printable(path)}" is a URL: tables are read from local files.')
        if any(sign in path for sign in _WILD) and not os.path.exists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise DatasetError(f'No file matches "{printable(path)}".')
            found += matches
        else:
            found.append(path)
    if not found:
        raise DatasetError("There are no files.")
    return found


class Files:
    """The units of reading of several files, in arrays.

    Args:
        paths: of the files: Parquet, Arrow (Feather), or streams of Arrow, all of one schema.

    Attributes:
        schema: of the files.
        rows: int64, of each unit: a row group of Parquet, a batch of a compressed Arrow file, or a whole file that is
            mapped.
        is_mapped: whether all files are mapped, so that rows are read one by one.

    Raises:
        DatasetError: a file cannot be read, or has another schema; it is named.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        with ThreadPoolExecutor(min(8, whole_cores(), len(paths))) as pool:
            found = list(pool.map(_scanned, paths))
        self._paths = PackedPaths(paths)
        self.schema = found[0][1]
        for path, (_, schema, _, _) in zip(paths, found, strict=True):
            if differing := _difference(schema, self.schema):
                raise DatasetError(
                    f'"{printable(path)}" and "{printable(paths[0])}" have different columns: {", ".join(differing)}.'
                )
        self._formats = [kind for kind, _, _, _ in found]
        counts = [rows for _, _, rows, _ in found]
        self.rows = np.array([each for rows in counts for each in rows], np.int64)
        self._file_of = np.repeat(np.arange(len(counts)), [len(rows) for rows in counts])
        self._first_of = np.cumsum([0, *(len(rows) for rows in counts)])
        self.is_mapped = all(is_mapped for _, _, _, is_mapped in found)

    def place(self, unit: int) -> tuple[str, str, int]:
        """(path, format, number in the file) of a unit of reading."""
        file = int(self._file_of[unit])
        return self._paths[file], self._formats[file], unit - int(self._first_of[file])

    def first_row(self, unit: int) -> int:
        """Rows of the unit's file that come before it."""
        return int(self.rows[self._first_of[self._file_of[unit]] : unit].sum())

    def name(self, unit: int) -> str:
        """The unit in messages."""
        path, kind, number = self.place(unit)
        return f'{"row group" if kind == "parquet" else "batch"} {number} of "{printable(path)}"'


class Reader:
    """Reads units: one file is open at a time, and the last units are kept. For one thread.

    Args:
        files: where the units are.
        plans: the fields to read.
        cache_nbytes: the most that units may take in memory together, besides the last one.
    """

    def __init__(self, files: Files, plans: Sequence[FieldPlan], cache_nbytes: int) -> None:
        self._files, self._plans, self._limit = files, plans, cache_nbytes
        self._columns = list(dict.fromkeys(column for plan in plans for column in plan.columns))
        self._open: tuple[str, Any] | None = None
        self._kept: OrderedDict[int, tuple[Piece, int]] = OrderedDict()
        self.nbytes = 0

    def piece(self, unit: int) -> Piece:
        """A unit of reading.

        Raises:
            RowError: it cannot be read.
        """
        kept = self._kept.get(unit)
        if kept is not None:
            self._kept.move_to_end(unit)
            return kept[0]
        path, kind, number = self._files.place(unit)
        try:
            table, nbytes = self._opened(path, kind).read(number)
            if table.num_rows != self._files.rows[unit]:
                raise OSError(f"it has {table.num_rows:,} rows, and had {self._files.rows[unit]:,}: the file changed")
            piece = Piece(table, self._plans)
        except parquet.ERRORS as error:
            self.close()
            if is_interrupt(error):
                raise
            raise RowError(f"{self._files.name(unit)} cannot be read: {error}") from error
        self._kept[unit] = piece, nbytes
        self.nbytes += nbytes
        while self.nbytes > self._limit and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1][1]
        return piece

    def _opened(self, path: str, kind: str) -> Any:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = path, _FORMATS[kind][1](path, self._columns)
        return self._open[1]

    def close(self) -> None:
        """Close the file."""
        opened, self._open = self._open, None
        if opened is not None:
            opened[1].close()


def _scanned(path: str) -> tuple[str, Any, list[int], bool]:
    try:
        with open(path, "rb") as file:
            kind = "parquet" if file.read(len(parquet.MAGIC)) == parquet.MAGIC else "ipc"
        schema, rows, is_mapped = _FORMATS[kind][0](path)
        _ = schema.names  # damaged ones are no text
        return kind, schema, rows, is_mapped
    except (*parquet.ERRORS, MemoryError) as error:
        raise DatasetError(
            f'"{printable(path)}" cannot be read as a Parquet or Arrow file: {error}\n'
            "  It may be cut short, or of another format."
        ) from error


def _difference(schema: Any, other: Any) -> list[str]:
    """The columns that only one of two schemas has, or has with another type."""
    mine, others = ({field.name: field.type for field in each} for each in (schema, other))
    differing = sorted(name for name in {**mine, **others} if mine.get(name) != others.get(name))
    return [f"{name}: {mine.get(name, 'missing')} and {others.get(name, 'missing')}" for name in differing[:8]]
