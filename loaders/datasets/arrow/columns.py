"""The values of one column of a table, by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from loaders.datasets.arrow.blocks import Bits, Blocks, Indices, Layout
from loaders.datasets.arrow.faults import DamagedError, NullError
from loaders.datasets.arrow.fields import FieldPlan, Fixed, fixed
from loaders.datasets.arrow.values import value_of

_types = pa.types


class FixedColumn:
    """Values of fixed size: read-only views of Arrow's memory, or copies where it stores them in another form.

    Args:
        name: of the column.
        layout: of the chunks.
        chunks: of the column.
        fixed: what the values are.
        dtype: that they are cast to; None for none.
        fill: in place of nulls, as a 1-tuple; None raises an error.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        chunks: Sequence[Any],
        fixed: Fixed,
        dtype: np.dtype[Any] | None,
        fill: tuple[Any] | None,
    ) -> None:
        self._name = name
        self._layout, self._fixed, self._fill = layout, fixed, fill
        self._dtype = fixed.dtype if dtype is None else dtype
        leaves = [_leaf(chunk) for chunk in chunks]
        starts = [(leaf.buffers()[1], first) for leaf, first in leaves]
        self._items: Bits | Blocks = Bits(starts) if fixed.is_bits else Blocks(starts, fixed.stored, fixed.dtype)
        self._casts_items = not fixed.is_bits and fixed.stored.itemsize != fixed.dtype.itemsize
        self._casts = self._casts_items or self._dtype != fixed.dtype
        self._valid = _valid([(chunk, chunk.offset) for chunk in chunks])
        self._valid_items = _valid(leaves) if fixed.shape else None

    def value(self, row: int) -> Any:
        """The value in a row: ndarray, or NumPy scalar if it has no dimensions.

        Raises:
            NullError: it is null, or contains a null.
        """
        chunk, at = self._layout.find(row)
        if self._valid is not None and not self._valid.item(chunk, at):
            return np.full(self._fixed.final_shape, self._filling(), self._dtype)[()]
        if not self._fixed.shape:
            value = self._items.item(chunk, at)
        else:
            items = self._fixed.items
            value = self._fixed.shaped(self._items.view(chunk, at * items, items))
            if self._valid_items is not None:
                valid = self._fixed.shaped(self._valid_items.view(chunk, at * items, items))
                if not valid.all():
                    return np.where(valid, value.astype(self._dtype), self._filling()).astype(self._dtype)
        if self._casts:
            value = value.astype(self._fixed.dtype) if self._casts_items else value
            value = value.astype(self._dtype)
        return value

    def take(self, rows: Indices, out: np.ndarray[Any, Any]) -> None:
        """Write the values in many rows to `out` (rows, *shape), of their dtype.

        Raises:
            NullError: as above; `out` is then undefined.
        """
        chunks, ats = self._layout.find_all(rows)
        fixed, items, count = self._fixed, self._fixed.items, len(rows)
        is_plain = not (self._casts_items or fixed.permutation) and out.flags.c_contiguous
        place = out.reshape(count, items) if is_plain else np.empty((count, items), self._stored_dtype)
        self._items.take(chunks, ats * items, place)
        if not is_plain:
            values = fixed.shaped(place)
            out[...] = values.astype(fixed.dtype) if self._casts_items else values
        if self._valid is not None:
            valid = np.empty((count, 1), np.bool_)
            self._valid.take(chunks, ats, valid)
            if not valid.all():
                out[~valid[:, 0]] = self._filling()
        if self._valid_items is not None:
            valid = np.empty((count, items), np.bool_)
            self._valid_items.take(chunks, ats * items, valid)
            if not valid.all():
                out[~fixed.shaped(valid)] = self._filling()

    @property
    def _stored_dtype(self) -> np.dtype[Any]:
        return self._fixed.stored if self._casts_items else self._fixed.dtype

    def _filling(self) -> Any:
        if self._fill is None:
            raise NullError(self._name)
        return self._fill[0]


class StackedColumns:
    """Columns of numbers, stacked: row i of all of them is one array.

    Args:
        columns: of values without dimensions.
        dtype: of the arrays.
    """

    def __init__(self, columns: Sequence[FixedColumn], dtype: np.dtype[Any]) -> None:
        self._columns, self._dtype = columns, dtype

    def value(self, row: int) -> np.ndarray[Any, Any]:
        """As `FixedColumn.value`."""
        return np.array([column.value(row) for column in self._columns], self._dtype)

    def take(self, rows: Indices, out: np.ndarray[Any, Any]) -> None:
        """As `FixedColumn.take`."""
        place = np.empty(len(rows), self._dtype)  # a column of `out` is not contiguous
        for number, column in enumerate(self._columns):
            column.take(rows, place)
            out[:, number] = place


class ValueColumn:
    """Values that have no fixed size, as `value_of` gives them.

    Args:
        layout: of the chunks.
        chunks: the column, a ChunkedArray.
        dtype: that arrays are cast to; None for none.
        fill: in place of nulls, as a 1-tuple; None raises an error.
    """

    def __init__(self, layout: Layout, chunks: Any, dtype: np.dtype[Any] | None, fill: tuple[Any] | None) -> None:
        self._layout, self._chunks, self._dtype, self._fill = layout, chunks, dtype, fill
        self._is_flat = _is_flat(chunks.type)
        self._checked_chunks: set[tuple[int, str]] = set()  # whose offsets were checked all at once

    def value(self, row: int) -> Any:
        """The value in a row.

        Raises:
            NullError: it is null, or contains a null.
            RaggedError: it contains lists of different lengths.
            DamagedError: the column's offsets are wrong.
        """
        chunk, at = self._layout.find(row)
        array = self._chunks.chunk(chunk)
        scalar = self._checked_flat(array, at) if self._is_flat else self._checked_nested(array, (chunk, ""), at)
        if not scalar.is_valid and self._fill is not None:
            return self._fill[0]
        value = value_of(scalar)
        if self._dtype is not None and isinstance(value, (np.ndarray, np.generic, float)):
            return np.asarray(value).astype(self._dtype)[()]
        return value

    def encoded(self, row: int) -> Any:
        """An encoded image: a memoryview of its bytes, or its path where the column has only that."""
        chunk, at = self._layout.find(row)
        array = self._chunks.chunk(chunk)
        path = None
        if _types.is_struct(array.type):
            if array.slice(at, 1).null_count:  # `array[at]` would read its values, whose offsets are not checked yet
                raise NullError
            names = [array.type.field(number).name for number in range(array.type.num_fields)]
            if "path" in names:
                path = self._checked(array.field("path"), (chunk, "path"), at).as_py()
            array = array.field("bytes")
        scalar = self._checked(array, (chunk, "bytes"), at)
        if scalar.is_valid:
            return memoryview(scalar.as_buffer())
        if path is None:
            raise NullError
        return path

    def _checked(self, array: Any, part: tuple[int, str], at: int) -> Any:
        """The scalar of a row. The offsets in a mapped file may point anywhere.

        `part` is the number of the chunk, and what of its values `array` is.
        """
        return self._checked_flat(array, at) if _is_flat(array.type) else self._checked_nested(array, part, at)

    def _checked_nested(self, array: Any, part: tuple[int, str], at: int) -> Any:
        if part not in self._checked_chunks:
            try:
                array.validate(full=True)
            except (pa.ArrowInvalid, IndexError) as error:
                raise DamagedError(str(error)) from error
            self._checked_chunks.add(part)
        return array[at]

    def _checked_flat(self, array: Any, at: int) -> Any:
        dtype = _offset_dtype(array.type)
        if dtype is not None and (buffer := array.buffers()[1]) is not None:
            first = (array.offset + at) * dtype.itemsize
            if not 0 <= first <= buffer.size - 2 * dtype.itemsize:
                raise DamagedError("its offsets are cut off")
            start, end = np.frombuffer(buffer, dtype, 2, first).tolist()
            if not 0 <= start <= end <= _room(array):
                raise DamagedError(f"its offsets are {start} and {end}, of {_room(array)}")
        return array[at]


def as_column(plan: FieldPlan, table: Any, layouts: dict[bytes, Layout]) -> Any:
    """The column of a field of a table: a `FixedColumn`, `StackedColumns` or `ValueColumn`."""
    if plan.is_stacked:
        assert plan.dtype is not None
        columns = [_one(plan, name, table.column(name), layouts, plan.dtype) for name in plan.columns]
        return StackedColumns([column for column in columns if isinstance(column, FixedColumn)], plan.dtype)
    return _one(plan, plan.columns[0], table.column(plan.columns[0]), layouts, plan.dtype)


def numbers_of(column: Any) -> FixedColumn:
    """A column of numbers without nulls."""
    found = _one(FieldPlan("", ("",), fixed(column.type), None, None), "", column, {}, None)
    assert isinstance(found, FixedColumn)
    return found


def _one(
    plan: FieldPlan, name: str, column: Any, layouts: dict[bytes, Layout], dtype: np.dtype[Any] | None
) -> FixedColumn | ValueColumn:
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
    layout = layouts.setdefault(ends.tobytes(), Layout(ends))
    found = None if plan.is_image else fixed(column.type)
    if found is not None and not (len(found.shape) > 1 and any(map(_has_inner_nulls, chunks))):
        return FixedColumn(name, layout, chunks, found, dtype, plan.fill)
    return ValueColumn(layout, pa.chunked_array(chunks, column.type), dtype, plan.fill)


def _leaf(array: Any) -> tuple[Any, int]:
    """The array of a column's items, and the first one in its buffer that belongs to the column."""
    if isinstance(array, pa.ExtensionArray):
        return _leaf(array.storage)
    if _types.is_fixed_size_list(array.type):
        leaf, first = _leaf(array.values)
        found = fixed(array.type)
        assert found is not None  # all of a column of fixed size is
        return leaf, first + array.offset * found.items
    return array, array.offset


def _has_inner_nulls(array: Any) -> bool:
    """Whether a list inside a value is null; not whether a value is, or a number."""
    while isinstance(array, pa.ExtensionArray) or _types.is_fixed_size_list(array.type):
        is_extension = isinstance(array, pa.ExtensionArray)  # whose storage has the nulls of the values
        array = array.storage if is_extension else array.flatten()
        if not is_extension and array.null_count:
            return True
    return False


def _valid(arrays: Sequence[tuple[Any, int]]) -> Bits | None:
    """Which values are not null; None if all are."""
    if not any(array.null_count for array, _ in arrays):
        return None
    storages = [array.storage if isinstance(array, pa.ExtensionArray) else array for array, _ in arrays]
    return Bits([(each.buffers()[0], first) for each, (_, first) in zip(storages, arrays, strict=True)])


def _offset_dtype(kind: Any) -> np.dtype[Any] | None:
    """dtype of the offsets of text, bytes and lists; None if such values have none, or more than that."""
    if _types.is_string(kind) or _types.is_binary(kind) or _types.is_list(kind):
        return np.dtype(np.int32)
    if _types.is_large_string(kind) or _types.is_large_binary(kind) or _types.is_large_list(kind):
        return np.dtype(np.int64)
    return None


def _is_flat(kind: Any) -> bool:
    """Whether checking a value's own offsets is enough."""
    if _offset_dtype(kind) is None:
        return bool(_types.is_primitive(kind) or _types.is_decimal(kind) or _types.is_fixed_size_binary(kind))
    return not hasattr(kind, "value_type") or bool(_types.is_primitive(kind.value_type))


def _room(array: Any) -> int:
    """How far the offsets of an array may reach."""
    if hasattr(array.type, "value_type"):
        return len(array.values)
    data = array.buffers()[2]
    return 0 if data is None else int(data.size)
