"""Writes one sample into one row of a slot: the one host write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders.batch.spec import BatchSpec, FieldSpec, closed, has_no_rows, is_masked, is_plain, tensor_as_array

Put = Callable[[int, Any], bool]


@dataclass
class Overflow:
    """What the slot could not hold of some rows. It is pickled beside the slot, and counted.

    Attributes:
        fields: field number → the (row, value) pairs that did not fit or have no memory of their own.
        samples: the (row, sample) pairs whose container differs from the first sample's.
        needs: field number → the largest shape that did not fit into its row; for an open field, its spec.
        whole: a 1-tuple of what `__getitems__` returned for the batch, where that is not a list with one sample per
            row: the collate function gets it as it is. Nothing is in the slot then.
    """

    fields: dict[int, list[tuple[int, Any]]] = field(default_factory=dict)
    samples: list[tuple[int, Any]] = field(default_factory=list)
    needs: dict[int, tuple[int, ...] | FieldSpec] = field(default_factory=dict)
    whole: tuple[Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.fields or self.samples or self.whole)

    def merge(self, other: Overflow) -> None:
        """Add the overflow of another span of the same batch."""
        for number, pairs in other.fields.items():
            self.fields.setdefault(number, []).extend(pairs)
        self.samples.extend(other.samples)
        self.whole = other.whole or self.whole
        for number, need in other.needs.items():
            self.need(number, need)

    def drop(self, row: int) -> None:
        """Remove what belongs to this row."""
        self.samples = [pair for pair in self.samples if pair[0] != row]
        self.fields = {number: [pair for pair in pairs if pair[0] != row] for number, pairs in self.fields.items()}

    def need(self, number: int, need: tuple[int, ...] | FieldSpec) -> None:
        """Record what did not fit."""
        if np.prod(_shape_of(need)) > np.prod(_shape_of(self.needs.get(number, (0,)))):
            self.needs[number] = need


def _shape_of(need: tuple[int, ...] | FieldSpec) -> tuple[int, ...]:
    return need.shape if isinstance(need, FieldSpec) else need


class RowWriter:
    """Writes samples into the rows of one slot.

    Args:
        spec: of the slot.
        buffer: the memory the slot lies in.
        offsets: of each field's block in `buffer`.
        rows: of the slot.
    """

    def __init__(self, spec: BatchSpec, buffer: Any, offsets: Sequence[int], rows: int) -> None:
        self.spec = spec
        self._puts: list[Put] = []
        self._values: list[np.ndarray[Any, Any] | None] = []
        for each, offset in zip(spec.fields, offsets, strict=True):
            values = each.values(buffer, offset, rows) if each.kind != "object" else _NONE
            extents = each.extents(buffer, offset, rows) if each.kind in ("pad", "ragged") else _NONE
            self._puts.append(_PUTS[each.kind](each, values, extents))
            self._values.append(values if each.kind == "stack" else None)

    def write(self, row: int, sample: Any, overflow: Overflow) -> None:
        """Write one sample. What does not fit goes to `overflow`; nothing is ever cast."""
        values = self.spec.flatten(sample)
        if values is None:
            overflow.samples.append((row, sample))
            return
        puts, number = self._puts, 0
        for value in values:
            if not puts[number](row, value):
                self._overflow(row, number, value, overflow)
            number += 1  # noqa: SIM113  `zip` and `enumerate` take as long as writing a small value

    def _overflow(self, row: int, number: int, value: Any, overflow: Overflow) -> None:
        overflow.fields.setdefault(number, []).append((row, value))
        field = self.spec.fields[number]
        if field.is_open and (known := closed(field, value)) is not field:
            overflow.need(number, known)
        elif field.kind in ("pad", "ragged") and hasattr(value, "shape") and not field.is_open:
            overflow.need(number, tuple(value.shape))

    def row(self, row: int) -> Any:
        """A sample-like container of writable arrays over one row, for datasets with `read_into`."""
        return self.spec.unflatten([values[row, ...] for values in self._values if values is not None])

    def rows(self, start: int, stop: int) -> Any:
        """The same over several rows: each array has one more dimension."""
        return self.spec.unflatten([values[start:stop] for values in self._values if values is not None])

    @property
    def takes_rows(self) -> bool:
        """True if every field is stacked, so that `row` covers the whole sample."""
        return all(values is not None for values in self._values)


def as_row_array(spec: FieldSpec, value: Any) -> np.ndarray[Any, Any] | None:
    """The value as an array of the field's dtype, sharing memory, or None if it is of another kind or dtype."""
    if spec.leaf == "tensor":
        if not hasattr(value, "is_quantized") or not is_plain(value):
            return None
        array, name = tensor_as_array(value)
        return array if name == spec.torch_dtype else None
    return value if _is_array(value) and value.dtype == spec.dtype else None


def _is_array(value: Any) -> bool:
    # What to do with masked values is for the collate function to decide.
    return type(value) is np.ndarray or (isinstance(value, np.ndarray) and not is_masked(value))


def _object(spec: FieldSpec, values: np.ndarray[Any, Any], extents: np.ndarray[Any, Any]) -> Put:
    return lambda row, value: False


def _stack(spec: FieldSpec, values: np.ndarray[Any, Any], extents: np.ndarray[Any, Any]) -> Put:
    return _stack_array(spec, values) if spec.leaf in ("array", "tensor", "scalar") else _stack_number(spec, values)


def _stack_array(spec: FieldSpec, values: np.ndarray[Any, Any]) -> Put:
    shape, dtype = spec.shape, spec.dtype

    def put(row: int, value: Any) -> bool:
        is_array = type(value) is np.ndarray or _is_array(value)
        if is_array and value.dtype == dtype and value.shape == shape:
            values[row] = value
            return True
        return False

    def put_scalar(row: int, value: Any) -> bool:
        if isinstance(value, np.generic) and value.dtype == dtype:
            values[row] = value
            return True
        return False

    def put_tensor(row: int, value: Any) -> bool:
        array = as_row_array(spec, value)
        if array is None or array.shape != shape:
            return False
        values[row] = array
        return True

    return put_tensor if spec.leaf == "tensor" else put_scalar if spec.leaf == "scalar" else put


def _stack_number(spec: FieldSpec, values: np.ndarray[Any, Any]) -> Put:
    kind = {"int": int, "float": float, "bool": bool}[spec.leaf]

    def put(row: int, value: Any) -> bool:
        if type(value) is not kind:
            return False
        try:
            values[row] = value
        except OverflowError:
            return False
        return True

    return put


def _pad(spec: FieldSpec, values: np.ndarray[Any, Any], extents: np.ndarray[Any, Any]) -> Put:
    none = np.empty((0, *spec.shape[1:]), spec.dtype)

    def put(row: int, value: Any) -> bool:
        array = none if has_no_rows(value) else as_row_array(spec, value)
        if array is None or array.shape[1:] != spec.shape[1:] or array.ndim != spec.ndim:
            return False
        count = array.shape[0]
        if count > spec.shape[0]:
            return False
        values[row, :count] = array
        values[row, count:] = spec.pad
        extents[row] = array.shape
        return True

    return put


def _ragged(spec: FieldSpec, values: np.ndarray[Any, Any], extents: np.ndarray[Any, Any]) -> Put:
    def put(row: int, value: Any) -> bool:
        array = as_row_array(spec, value)
        if array is None or array.ndim != spec.ndim or array.size > values.shape[1]:
            return False
        np.copyto(values[row, : array.size].reshape(array.shape), array)
        extents[row] = array.shape
        return True

    return put


_NONE = np.empty(0)
_PUTS = {"object": _object, "stack": _stack, "pad": _pad, "ragged": _ragged}
