"""The rows of a slot as a batch of tensors: `torch.from_numpy` once per field, no copy.

The batch is what the loader's collate function would have made of the samples. Where a slot could not hold a field of
some row, the function itself makes that one field, in private memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate, default_convert

from loaders.batch.rows import Overflow, as_row_array
from loaders.batch.spec import TORCH_DTYPES, BatchSpec, FieldSpec, closed, has_no_rows
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.nested import children, rebuild

# By name. NumPy composes the name of a dtype each time that it is asked for.
_TORCH_DTYPES = {name: getattr(torch, name) for name in TORCH_DTYPES}

Collate = Callable[[Any], Any]
Name = Callable[[int], tuple[Any, "str | None"]]  # row → (index, source) of its sample, for messages


class Padded(NamedTuple):
    """Samples of different length in one tensor.

    Attributes:
        values: (B, longest, …); filled with the pad value beyond a sample's length.
        counts: int64 (B,): the length of each sample.
    """

    values: torch.Tensor
    counts: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """bool (B, longest): True where `values` holds a sample's own values. An array after `to_numpy`."""
        counts: Any = self.counts
        longest = self.values.shape[1]
        on_device = isinstance(counts, torch.Tensor)
        places: Any = torch.arange(longest, device=counts.device) if on_device else np.arange(longest)
        mask: torch.Tensor = places < counts[:, None]
        return mask


class Ragged(list[torch.Tensor]):
    """Samples of different shape: a list of tensors, each a view of the slot's memory."""

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, offsets): all samples concatenated along the first dimension (a copy), and int64 (B + 1,).

        Sample i is `values[offsets[i] : offsets[i + 1]]`. The samples must agree in all other dimensions.
        """
        values = torch.cat(list(self)) if self else torch.empty(0)
        return values, torch.tensor([0, *map(len, self)], device=values.device).cumsum(0)


def tensor_over(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """A tensor of torch dtype `dtype` that shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype is _TORCH_DTYPES.get(dtype) else tensor.view(getattr(torch, dtype))


def assemble(
    spec: BatchSpec | None,
    memories: Sequence[Any],
    rows: int,
    overflow: Overflow,
    name: Name,
    collate: Collate = default_collate,
) -> Any:
    """The batch.

    Args:
        spec: of the slot; None if `overflow` holds the whole batch.
        memories: per field its leased block, None for fields without one.
        rows: how many of the slot's rows are in the batch.
        overflow: what the slot could not hold.
        name: gives the index and source of a row's sample, for messages.
        collate: collates what the slot could not hold: `default_collate` or `numpy_collate`.

    Raises:
        FieldShapeError, FieldDtypeError, FieldNameError: the samples cannot be batched; `collate` would fail, too.
    """
    if overflow.whole is not None:
        return collate(overflow.whole[0])
    assert spec is not None
    if overflow.samples:
        return _collate(samples_of(spec, memories, rows, overflow), "", name, collate)

    def column(number: int, container: type[Any]) -> Any:
        field, memory, odd = spec.fields[number], memories[number], overflow.fields.get(number)
        if odd:
            values = container(_values_of(field, memory, rows, dict(odd)))
            if field.kind in ("stack", "object"):
                return _collate(values, field.path, name, collate)
            return _mixed(field, values, odd, name)
        if field.kind == "stack":
            return tensor_over(field.values(memory, 0, rows), field.torch_dtype)
        if field.kind == "pad":
            counts = field.extents(memory, 0, rows)[:, 0]
            values = field.values(memory, 0, rows)[:, : counts.max(initial=0)]
            return Padded(tensor_over(values, field.torch_dtype), torch.from_numpy(counts))
        return Ragged(_values_as_tensors(field, memory, rows))

    return _collated(spec.skeleton, column)


def collate_privately(
    spec: BatchSpec | None, samples: Sequence[Any], name: Name, collate: Collate = default_collate
) -> Any:
    """The batch of samples that lie in no slot, or in different ones, in memory of its own."""
    if spec is None:
        return _collate(list(samples), "", name, collate)
    overflow = Overflow()
    for row, sample in enumerate(samples):
        values = spec.flatten(sample)
        if values is None:
            return _collate(list(samples), "", name, collate)
        for number, value in enumerate(values):
            overflow.fields.setdefault(number, []).append((row, value))
    return assemble(spec, [None] * len(spec.fields), len(samples), overflow, name, collate)


def convert(sample: Any, name: Name) -> Any:
    """One sample as a loader without batching returns it."""
    try:
        return default_convert(sample)  # type: ignore[no-untyped-call]  # torch's
    except (RuntimeError, TypeError, ValueError) as error:
        raise _error(FieldDtypeError, 0, "", f"torch cannot convert it: {error}", name) from error


def samples_of(spec: BatchSpec, memories: Sequence[Any], rows: int, overflow: Overflow) -> list[Any]:
    """The samples as the dataset gave them; their arrays are views of the slot."""
    odd_fields = {number: dict(pairs) for number, pairs in overflow.fields.items()}
    whole = dict(overflow.samples)
    columns = [
        _values_of(field, memory, rows, {**dict.fromkeys(whole), **odd_fields.get(number, {})})
        for number, (field, memory) in enumerate(zip(spec.fields, memories, strict=True))
    ]
    return [whole[row] if row in whole else spec.unflatten([column[row] for column in columns]) for row in range(rows)]


def _values_of(field: FieldSpec, memory: Any, rows: int, odd: dict[int, Any]) -> list[Any]:
    """The field of every row as the dataset gave it."""
    if field.kind == "object":
        return [odd.get(row) for row in range(rows)]
    values = field.values(memory, 0, rows)
    extents = None if field.kind == "stack" else field.extents(memory, 0, rows)

    def value(row: int) -> Any:
        if extents is None:
            array = values[row, ...]
        elif field.kind == "pad":
            array = values[row, : extents[row, 0]]
        else:
            array = values[row, : np.prod(extents[row])].reshape(extents[row])
        if field.leaf == "tensor":
            return tensor_over(array, field.torch_dtype)
        return array if field.leaf == "array" else array[()] if field.leaf == "scalar" else array.item()

    return [odd[row] if row in odd else value(row) for row in range(rows)]


def _values_as_tensors(field: FieldSpec, memory: Any, rows: int) -> list[torch.Tensor]:
    values = _values_of(field, memory, rows, {})
    return values if field.leaf == "tensor" else [tensor_over(value, field.torch_dtype) for value in values]


def _mixed(field: FieldSpec, values: Sequence[Any], odd: Sequence[tuple[int, Any]], name: Name) -> Padded | Ragged:
    """A pad or ragged field of which some rows lie in the slot and the odd ones do not."""
    if field.is_open:
        field = next((known for value in values if not (known := closed(field, value)).is_open), field)
    columns: Any = field.shape[1:]
    if field.kind == "ragged":  # the columns of the other rows
        known_arrays = (as_row_array(field, value) for value in values if not has_no_rows(value))
        columns = next((array.shape[1:] for array in known_arrays if array is not None), (0,) * (field.ndim - 1))
    none = np.empty((0, *columns), field.dtype)
    arrays = []
    for row, value in enumerate(values):
        array = none if has_no_rows(value) else as_row_array(field, value)
        if array is None:
            detail = (
                f"{_looks(value)}, expected {field.torch_dtype} {'tensor' if field.leaf == 'tensor' else 'ndarray'}"
            )
            raise _error(FieldDtypeError, row, field.path, detail, name)
        if array.ndim != field.ndim or (field.kind == "pad" and array.shape[1:] != field.shape[1:]):
            rest = "".join(f", {n}" for n in field.shape[1:])
            want = f"(…{rest})" if field.kind == "pad" else f"{field.ndim} dimensions"
            detail = f"{_looks(value)}, expected {want}"
            if field.kind == "pad" and array.ndim == field.ndim:
                detail += ".\n  Padding covers the first dimension only: where others vary, use Field(ragged=True)"
            raise _error(FieldShapeError, row, field.path, detail, name)
        arrays.append(array)
    if field.kind == "ragged":
        for row, _ in odd:
            arrays[row] = arrays[row].copy()  # it may be the dataset's own
        return Ragged(tensor_over(array, field.torch_dtype) for array in arrays)
    counts = np.array([len(array) for array in arrays], np.int64)
    padded = np.full((len(values), int(counts.max()), *field.shape[1:]), field.pad, field.dtype)
    for row, array in enumerate(arrays):
        padded[row, : counts[row]] = array
    return Padded(tensor_over(padded, field.torch_dtype), torch.from_numpy(counts))


def _collate(values: Sequence[Any], path: str, name: Name, collate: Collate) -> Any:
    """The values of one field, or whole samples, collated by `collate`; an error names the sample that does not fit."""
    try:
        return collate(values)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        first = values[0]
        row = next((row for row, value in enumerate(values) if not _go_together(first, value, collate)), 0)
        path, want, have = _disagreement(path, first, values[row], collate)
        wanted, found = _shape_of(want), _shape_of(have)
        if wanted is not None and found is not None and wanted != found:
            detail = (
                f"shape {found}, expected {wanted}.\n  All samples of a batch share one shape: "
                "resize in the dataset, or declare the field with Field(pad=…) or Field(ragged=True)"
            )
            raise _error(FieldShapeError, row, path, detail, name) from error
        if _outline(want) != _outline(have) and (children(want) is not None or children(have) is not None):
            detail = f"has {_outline(have)}, expected {_outline(want)} as in the first sample of the batch"
            raise _error(FieldNameError, row, path, detail, name) from error
        against = "cannot be collated" if want is have else f"does not match {_looks(want)}"
        raise _error(FieldDtypeError, row, path, f"{_looks(have)} {against}: {error}", name) from error


def _go_together(first: Any, value: Any, collate: Collate) -> bool:
    try:
        collate([first, value])
        return True
    except (RuntimeError, TypeError, ValueError, KeyError):
        return False


def _disagreement(path: str, first: Any, value: Any, collate: Collate) -> tuple[str, Any, Any]:
    """Where `collate` cannot combine two samples: the path, and what each has there."""
    have = dict(children(value) or [])
    for name, below in children(first) or []:
        if name in have and not _go_together(below, have[name], collate):
            return _disagreement(f"{path}.{name}" if path else name, below, have[name], collate)
    return path, first, value


def _outline(sample: Any) -> str:
    below = children(sample)
    return (
        type(sample).__name__ if below is None else f"{type(sample).__name__}({', '.join(name for name, _ in below)})"
    )


def _shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape, None for what has none."""
    try:
        return tuple(value.shape)
    except (AttributeError, RuntimeError, TypeError):  # torch's RuntimeError for a nested tensor, which has none
        return None


def _looks(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        shape = _shape_of(value)
        return f"{value.dtype} {kind} of shape {shape}" if shape is not None else f"nested {value.dtype} {kind}"
    return f"{type(value).__name__} {value!r:.40}"


def _error(kind: Any, row: int, path: str | None, detail: str, name: Name) -> Exception:
    index, source = name(row)
    where = f', field "{path}"' if path else ""
    who = describe_sample(index, source, row)
    error: Exception = kind(
        f"{who}{where}: {detail.rstrip('.')}.",
        index=index if isinstance(index, int) else None,
        source=source,
        field=path,
    )
    return error


def _collated(skeleton: Any, column: Callable[[int, type[Any]], Any], container: type[Any] = list) -> Any:
    """The container of the batch as `default_collate` makes it: tuples come out as lists, everything else as it was.

    `container` is the type in which torch has a field's values: a tuple below sequences. Texts are returned in it.
    """
    if type(skeleton) is int:
        return column(skeleton, container)
    container = tuple if isinstance(skeleton, (tuple, list)) else list
    below = [_collated(child, column, container) for _, child in children(skeleton) or []]
    return below if type(skeleton) in (tuple, list) else rebuild(skeleton, below)
