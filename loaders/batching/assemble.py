"""The rows of a slot as a batch of tensors: `torch.from_numpy` once per field, no copy.

The batch is what torch's `default_collate` would have made of the samples. Where a slot could not hold a field of some
row, that one field is made by `default_collate` itself, in private memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from loaders.batching.rows import Beside, as_row_array
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.spec import BatchSpec, FieldSpec
from loaders.tree import children, rebuild

Name = Callable[[int], tuple[Any, "str | None"]]  # row → (index, source) of its sample, for messages


class Padded(NamedTuple):
    """Samples of different length in one tensor.

    Attributes:
        values: (B, longest, …); what is beyond a sample's length holds the pad value.
        counts: int64 (B,): the length of each sample.
    """

    values: torch.Tensor
    counts: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """bool (B, longest): True where `values` holds a sample's own values."""
        return torch.arange(self.values.shape[1], device=self.counts.device) < self.counts[:, None]


class Ragged(list[torch.Tensor]):
    """Samples of different shape: a list of tensors, each a view of the slot's memory."""

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, offsets): all samples one behind the other along the first dimension (a copy), and int64 (B + 1,).

        Sample i is `values[offsets[i] : offsets[i + 1]]`. The samples must agree in all other dimensions.
        """
        counts = torch.tensor([0, *(len(each) for each in self)])
        return torch.cat(list(self)) if self else torch.empty(0), counts.cumsum(0)


def tensor_over(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """A tensor of torch dtype `dtype` that shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor if dtype == array.dtype.name else tensor.view(getattr(torch, dtype))


def assemble(spec: BatchSpec, memories: Sequence[Any], rows: int, beside: Beside, name: Name) -> Any:
    """The batch.

    Args:
        spec: of the slot.
        memories: per field its leased block, None for fields without one.
        rows: how many of the slot's rows are in the batch.
        beside: what the slot could not hold.
        name: tells a row's sample, for messages.

    Raises:
        FieldShapeError, FieldDtypeError, FieldNameError: the samples do not go together, as torch would say too.
    """
    if beside.samples:
        return _collate_samples(samples_of(spec, memories, rows, beside), name)
    columns = []
    for number, (field, memory) in enumerate(zip(spec.fields, memories, strict=True)):
        odd = beside.fields.get(number)
        if odd:
            columns.append(_private_column(field, _values_of(field, memory, rows, dict(odd)), name))
        elif field.kind == "stack":
            columns.append(tensor_over(field.values(memory, 0, rows), field.torch_dtype))
        elif field.kind == "pad":
            counts = field.extents(memory, 0, rows)[:, 0]
            values = field.values(memory, 0, rows)[:, : counts.max(initial=0)]
            columns.append(Padded(tensor_over(values, field.torch_dtype), torch.from_numpy(counts)))
        else:
            columns.append(Ragged(_values_as_tensors(field, memory, rows)))
    return _collated(spec.skeleton, columns)


def collate_privately(spec: BatchSpec | None, samples: Sequence[Any], name: Name) -> Any:
    """The batch of samples that lie in no slot, or in different ones, in memory of its own."""
    if spec is None:
        return _collate_samples(list(samples), name)
    beside = Beside()
    for row, sample in enumerate(samples):
        values = spec.flatten(sample)
        if values is None:
            return _collate_samples(list(samples), name)
        for number, value in enumerate(values):
            beside.fields.setdefault(number, []).append((row, value))
    return assemble(spec, [None] * len(spec.fields), len(samples), beside, name)


def samples_of(spec: BatchSpec, memories: Sequence[Any], rows: int, beside: Beside) -> list[Any]:
    """The samples again, as the dataset gave them; their arrays are views of the slot."""
    odd_fields = {number: dict(pairs) for number, pairs in beside.fields.items()}
    whole = dict(beside.samples)
    columns = [
        _values_of(field, memory, rows, {**dict.fromkeys(whole), **odd_fields.get(number, {})})
        for number, (field, memory) in enumerate(zip(spec.fields, memories, strict=True))
    ]
    return [
        whole[row] if row in whole else spec.unflatten([column[row] for column in columns]) for row in range(rows)
    ]


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


def _private_column(field: FieldSpec, values: list[Any], name: Name) -> Any:
    if field.kind in ("stack", "object"):
        return _collate(values, field.path, name)
    arrays = [as_row_array(field, value) for value in values]
    for row, array in enumerate(arrays):
        if array is None or array.ndim != field.ndim or (field.kind == "pad" and array.shape[1:] != field.shape[1:]):
            want = f"{field.ndim} dimensions" if field.kind == "ragged" else f"shape (…, {field.shape[1:]})"
            raise _error(FieldShapeError, row, field.path, f"{_looks(values[row])}, expected {field.dtype} of {want}", name)
    if field.kind == "ragged":
        return Ragged(tensor_over(np.ascontiguousarray(array), field.torch_dtype) for array in arrays if array is not None)
    counts = np.array([len(array) for array in arrays if array is not None], np.int64)
    padded = np.full((len(values), int(counts.max()), *field.shape[1:]), field.pad, field.dtype)
    for row, array in enumerate(arrays):
        padded[row, : counts[row]] = array
    return Padded(tensor_over(padded, field.torch_dtype), torch.from_numpy(counts))


def _collate(values: list[Any], path: str, name: Name) -> Any:
    try:
        return default_collate(values)
    except (RuntimeError, TypeError, ValueError, KeyError, OverflowError) as error:
        first = values[0]
        for row, value in enumerate(values):
            if getattr(value, "shape", None) != getattr(first, "shape", None):
                detail = (
                    f"shape {tuple(np.shape(value))}, expected {tuple(np.shape(first))}.\n  All samples of a batch share "
                    "one shape: resize in the dataset, or declare the field with Field(pad=…) or Field(ragged=True)"
                )
                raise _error(FieldShapeError, row, path, detail, name) from error
            if type(value) is not type(first):
                raise _error(FieldDtypeError, row, path, f"{_looks(value)}, expected {_looks(first)}", name) from error
        raise _error(FieldDtypeError, 0, path, f"{_looks(first)} cannot be collated: {error}", name) from error


def _collate_samples(samples: list[Any], name: Name) -> Any:
    """Samples whose containers differ: torch decides what that gives."""
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        shape = _outline(samples[0])
        for row, sample in enumerate(samples):
            if _outline(sample) != shape:
                detail = f"has {_outline(sample)}, expected {shape} as in the first sample of the batch"
                raise _error(FieldNameError, row, None, detail, name) from error
        raise


def _outline(sample: Any) -> str:
    below = children(sample)
    return type(sample).__name__ if below is None else f"{type(sample).__name__}({', '.join(name for name, _ in below)})"


def _looks(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return f"{value.dtype} array of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.40}"


def _error(kind: Any, row: int, path: str | None, detail: str, name: Name) -> Exception:
    index, source = name(row)
    where = f', field "{path}"' if path else ""
    who = describe_sample(index, source, row)
    error: Exception = kind(
        f"{who}{where}: {detail}.", index=index if isinstance(index, int) else None, source=source, field=path
    )
    return error


def _collated(skeleton: Any, columns: Sequence[Any]) -> Any:
    """The container of the batch as `default_collate` makes it: tuples come out as lists, everything else as it was."""
    if type(skeleton) is int:
        return columns[skeleton]
    below = [_collated(child, columns) for _, child in children(skeleton) or []]
    return below if type(skeleton) in (tuple, list) else rebuild(skeleton, below)


