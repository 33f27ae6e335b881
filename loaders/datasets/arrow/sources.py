"""Where the rows of a dataset come from: a table in memory, or files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from loaders.datasets.arrow import huggingface
from loaders.datasets.arrow.blocks import Indices
from loaders.datasets.arrow.columns import numbers_of
from loaders.datasets.arrow.fields import FieldPlan
from loaders.datasets.arrow.files import Files, Reader, paths_of
from loaders.datasets.arrow.pieces import Piece
from loaders.datasets.per_worker import PerWorker
from loaders.images.decode import printable

Out = dict[str, np.ndarray[Any, Any]]


class TableSource:
    """A table in memory, or the mapped one of a `datasets.Dataset`; pickled as what it was made from.

    Attributes:
        schema: of the table.
        units: int64, rows per unit of reading: all rows are one, since they are read one by one.
        columns: that are read by default; None for all.
        images: the columns that are declared as images; None if the schema says it.
    """

    def __init__(self, source: Any) -> None:
        is_huggingface = huggingface.is_huggingface(source)
        self._source = huggingface.unformatted(source) if is_huggingface else source
        self.columns = huggingface.columns_of(source) if is_huggingface else None
        self.images = huggingface.images_of(source) if is_huggingface else None
        self.schema = (huggingface.table_of(source) if is_huggingface else source).schema
        self.units = np.array([len(source)], np.int64)
        self._opened: tuple[Piece, Any] | None = None
        self._plans: Sequence[FieldPlan] = ()

    def use(self, plans: Sequence[FieldPlan], cache_nbytes: int) -> None:
        """Read these fields."""
        self._plans = plans

    def find(self, row: int) -> tuple[Piece, int]:
        """The table that has a row, and its number there."""
        piece, order = self._opened or self._open()
        return piece, row if order is None else int(order.value(row))

    def take(self, rows: Indices, out: Out) -> None:
        """Write the values of many rows to the arrays of `out`. All fields have values of fixed size."""
        piece, order = self._opened or self._open()
        if order is not None:
            ordered = np.empty(len(rows), np.int64)
            order.take(rows, ordered)
            rows = ordered
        for plan in self._plans:
            piece.take(plan, rows, out[plan.name])

    def name(self, row: int) -> str:
        """A row in messages: it has no name."""
        return ""

    def _open(self) -> tuple[Piece, Any]:
        table, order = self._source, None
        if huggingface.is_huggingface(table):
            table, order = huggingface.table_of(self._source), huggingface.order_of(self._source)
        names = dict.fromkeys(column for plan in self._plans for column in plan.columns)
        piece = Piece(table.select(list(names)), self._plans)
        self._opened = piece, None if order is None else numbers_of(order.column(0))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class FileSource:
    """Tables in files, which each worker opens for itself; pickled as their paths.

    Attributes:
        schema, units, columns, images: as of `TableSource`.
    """

    columns: list[str] | None = None
    images: list[str] | None = None

    def __init__(self, paths: Any) -> None:
        self._files = Files(paths_of(paths))
        self.schema = self._files.schema
        rows = self._files.rows
        self.units = rows.sum(keepdims=True) if self._files.is_mapped else rows
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows

    def use(self, plans: Sequence[FieldPlan], cache_nbytes: int) -> None:
        """Read these fields, and keep as many bytes of decoded units."""
        self._plans = plans
        self._reader = PerWorker(Reader, self._files, plans, cache_nbytes)

    def find(self, row: int) -> tuple[Piece, int]:
        """The unit that has a row, and its number there.

        Raises:
            RowError: the unit cannot be read.
        """
        unit = self._unit_of(row)
        return self._reader().piece(unit), row - int(self._starts[unit])

    def take(self, rows: Indices, out: Out) -> None:
        """Write the values of many rows to the arrays of `out`. All fields have values of fixed size.

        Raises:
            RowError: a unit cannot be read.
        """
        units = self._ends.searchsorted(rows, "right")
        rows = rows - self._starts[units]
        for unit in np.unique(units):
            piece, where = self._reader().piece(int(unit)), np.flatnonzero(units == unit)
            for plan in self._plans:
                place = out[plan.name]
                if len(where) == len(place):
                    piece.take(plan, rows, place)
                    continue
                part = np.empty((len(where), *place.shape[1:]), place.dtype)
                piece.take(plan, rows[where], part)
                place[where] = part

    def name(self, row: int) -> str:
        """A row in messages: its file, and its number there."""
        unit = self._unit_of(row)
        path, _, _ = self._files.place(unit)
        return f"{printable(path)}, row {self._files.first_row(unit) + row - int(self._starts[unit])}"

    def _unit_of(self, row: int) -> int:
        return int(self._ends.searchsorted(row, "right"))


def source_of(given: Any) -> TableSource | FileSource:
    """The source of what `ArrowDataset` was given.

    Raises:
        TypeError: it is none of these.
        DatasetError: a file cannot be read.
    """
    if huggingface.is_huggingface(given) or isinstance(given, pa.Table):
        return TableSource(given)
    if isinstance(given, (list, tuple)) and given and all(isinstance(each, pa.RecordBatch) for each in given):
        return TableSource(pa.Table.from_batches(given))
    is_path = isinstance(given, (str, bytes, os.PathLike))
    if is_path or (isinstance(given, Iterable) and not isinstance(given, Mapping)):
        given = given if is_path else list(given)
        if is_path or all(isinstance(each, (str, bytes, os.PathLike)) for each in given):
            return FileSource(given)
    raise TypeError(
        f"source is a {type(given).__name__}: expected paths, a pyarrow.Table, record batches, or a map-style "
        "datasets.Dataset."
    )
