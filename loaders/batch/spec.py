"""What a batch looks like before it is read: its fields, their shapes and dtypes, and the container around them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import numpy as np

from loaders.nested import children, is_dataclass, is_namedtuple, rebuild

# What torch.from_numpy takes, besides native byte order. uint16, uint32 and uint64 since torch 2.3.
TORCH_DTYPES = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)
Kind = Literal["stack", "pad", "ragged", "object"]
Leaf = Literal["array", "tensor", "scalar", "int", "float", "bool", "object"]
_EXTENT = np.dtype(np.int64)
# If there are this many fields of less than a page, they share blocks of a few pages.
_MANY_SMALL, _SMALL_NBYTES, _SHARED_NBYTES = 64, 4096, 1 << 15
_UNKNOWN = np.dtype(np.float32)  # of `[]`, as in `torch.tensor([])`


@dataclass(frozen=True)
class Field:
    """How samples of different shapes share a batch. Without a declaration a field is stacked: one shape for all.

    A sample may have no rows there: `[]`, or an array of shape (0,), whatever columns the others have.

    Args:
        pad: the value that fills the first dimension up to the longest sample of the batch; comes out as `Padded`.
        ragged: keep every sample's own shape; comes out as `Ragged`, a list of views that share the slot's memory.
    """

    pad: float | None = None
    ragged: bool = False

    def __post_init__(self) -> None:
        if (self.pad is None) == (not self.ragged):
            raise ValueError("Field needs exactly one of pad=value and ragged=True.")

    @property
    def kind(self) -> Kind:
        """The field's kind in a spec."""
        return "ragged" if self.ragged else "pad"


@dataclass(frozen=True)
class FieldSpec:
    """One field of a batch.

    Attributes:
        path: where in the sample: "image", "meta.boxes", "0".
        kind: stack (one shape for all) | pad | ragged | object (not in the slot: pickled beside it).
        leaf: what the sample holds there, so that a row can be turned back into exactly that.
        dtype: of a row. Torch dtypes that NumPy lacks are kept as integers of the same size.
        torch_dtype: the name of the dtype the batch has in torch.
        shape: of a row; for pad and ragged the room of a row, of which a sample may use less.
        pad: the value that fills a padded row.
        is_open: True while nothing else is known of a pad or ragged field, since the first sample has no rows there.
    """

    path: str
    kind: Kind
    leaf: Leaf
    dtype: np.dtype[Any] = np.dtype(object)  # noqa: RUF009  a dtype is immutable
    torch_dtype: str = ""
    shape: tuple[int, ...] = ()
    pad: float = 0
    is_open: bool = False

    @property
    def ndim(self) -> int:
        """Dimensions of one sample. A ragged row is flat: its `shape` is (ndim, room)."""
        return self.shape[0] if self.kind == "ragged" else len(self.shape)

    def values_offset(self, rows: int) -> int:
        """Bytes before the values: the extents (int64 per dimension and row) of pad and ragged fields."""
        return 0 if self.kind == "stack" else -(-rows * self.ndim * _EXTENT.itemsize // 64) * 64

    def nbytes(self, rows: int) -> int:
        """Size of the field's block in a slot of `rows` rows."""
        row = self.shape[1] if self.kind == "ragged" else int(np.prod(self.shape, dtype=np.int64))
        return self.values_offset(rows) + rows * row * self.dtype.itemsize

    def values(self, buffer: Any, offset: int, rows: int) -> np.ndarray[Any, Any]:
        """The values of all rows over `buffer`: (rows, *shape), for ragged fields (rows, room)."""
        shape = (rows, self.shape[1]) if self.kind == "ragged" else (rows, *self.shape)
        values: np.ndarray[Any, Any] = np.ndarray(shape, self.dtype, buffer, offset + self.values_offset(rows))
        return values

    def extents(self, buffer: Any, offset: int, rows: int) -> np.ndarray[Any, Any]:
        """The shapes of the samples of a pad or ragged field: int64 (rows, ndim)."""
        extents: np.ndarray[Any, Any] = np.ndarray((rows, self.ndim), _EXTENT, buffer, offset)
        return extents


Needs = Mapping[int, "tuple[int, ...] | FieldSpec"]
"""What did not fit: field number → the largest shape of a row; for an open field, its spec."""


@dataclass(frozen=True)
class BatchSpec:
    """The fields of a batch, and the sample's container with each leaf replaced by its field's number."""

    fields: tuple[FieldSpec, ...]
    skeleton: Any

    @classmethod
    def from_sample(cls, sample: Any, declared: Mapping[str, Field] | None = None) -> BatchSpec:
        """The spec of batches whose first sample is `sample`.

        Raises:
            ValueError: `declared` names a field the sample does not have, or one that is no array.
        """
        fields: list[FieldSpec] = []
        declared = dict(declared or {})

        def visit(path: str, node: Any) -> Any:
            below = children(node) if _is_known_container(node) else None
            if below is None or (path in declared and has_no_rows(node)):
                fields.append(_field_of(path, node, declared.pop(path, None)))
                return len(fields) - 1
            return rebuild(node, [visit(f"{path}.{name}" if path else name, child) for name, child in below])

        skeleton = visit("", sample)
        if declared:
            have = ", ".join(repr(field.path) for field in fields)
            raise ValueError(f"fields= declares {', '.join(map(repr, declared))}; the first sample has {have}.")
        return cls(tuple(fields), skeleton)

    def sizes(self, rows: int) -> list[int]:
        """Bytes of each field's block; 0 for fields that are not in the slot or lie in another's block."""
        sizes = [0] * len(self.fields)
        for field, (owner, at) in zip(self.fields, self.shares(rows), strict=True):
            if field.kind != "object":
                sizes[owner] = at + field.nbytes(rows)
        return sizes

    def shares(self, rows: int) -> list[tuple[int, int]]:
        """For each field the number of the field whose block it lies in, usually its own, and its offset in bytes.

        A block takes at least a page, so very many small fields share blocks. Whoever holds one of them then holds its
        neighbours, too: a few pages at most, and never a large field.
        """
        shares = self._shares.get(rows)
        if shares is None:
            sizes = [0 if field.kind == "object" else field.nbytes(rows) for field in self.fields]
            shares = [(number, 0) for number in range(len(sizes))]
            small = [number for number, size in enumerate(sizes) if 0 < size < _SMALL_NBYTES]
            owner, end = -1, _SHARED_NBYTES
            for number in small if len(small) >= _MANY_SMALL else ():
                if end + sizes[number] > _SHARED_NBYTES:
                    owner, end = number, 0
                shares[number] = owner, end
                end += -(-sizes[number] // 64) * 64
            self._shares[rows] = shares
        return shares

    def spread(self, blocks: Sequence[tuple[int, int]], rows: int) -> tuple[tuple[int, int], ...]:
        """The (offset, nbytes) of every field, from those of the blocks for `sizes(rows)`."""
        if len(self.fields) < _MANY_SMALL:  # none lies in another's block
            return tuple(blocks)
        return tuple(
            blocks[number] if owner == number else (blocks[owner][0] + at, field.nbytes(rows))
            for number, (field, (owner, at)) in enumerate(zip(self.fields, self.shares(rows), strict=True))
        )

    @functools.cached_property
    def _shares(self) -> dict[int, list[tuple[int, int]]]:
        return {}

    @functools.cached_property
    def row_nbytes(self) -> int:
        """Bytes that are written into one row, over all fields whose rows have one size."""
        return sum(field.nbytes(1) - field.values_offset(1) for field in self.fields if field.kind in ("stack", "pad"))

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is cached: another thread may be adding it to the `__dict__` that a plain pickle iterates over.
        return BatchSpec, (self.fields, self.skeleton)

    @functools.cached_property
    def _names(self) -> tuple[Any, ...] | None:
        """The keys of a sample that is one flat dict, the usual case; None for all others."""
        skeleton = self.skeleton
        flat = type(skeleton) is dict and all(type(below) is int for below in skeleton.values())
        return tuple(skeleton) if flat else None

    def flatten(self, sample: Any) -> list[Any] | None:
        """The leaves of a sample in the order of `fields`, or None if its container differs from the first one's."""
        names = self._names
        if names is not None:
            # The keys' order must agree, too: a batch has that of its own first sample.
            return list(sample.values()) if type(sample) is dict and tuple(sample) == names else None
        out: list[Any] = []
        return out if _flatten(self.skeleton, sample, out) else None

    def unflatten(self, values: Sequence[Any]) -> Any:
        """The sample with these leaves."""
        return _fill(self.skeleton, values)

    def grown(self, needs: Needs) -> BatchSpec:
        """The same spec with more room: one and a half times what `needs` say for what did not fit."""
        if not needs:
            return self
        fields = list(self.fields)
        for number, need in needs.items():
            field = fields[number]
            if isinstance(need, FieldSpec):  # of a batch that was begun while the field was open
                if field.is_open:
                    fields[number] = need
                continue
            if field.kind == "pad":
                room = (max(field.shape[0], _half_more(need[0])), *field.shape[1:])
            else:
                room = (field.shape[0], max(field.shape[1], _half_more(int(np.prod(need, dtype=np.int64)))))
            fields[number] = dataclasses.replace(field, shape=room)
        # The same object if nothing has grown: workers are sent each spec object once.
        return self if tuple(fields) == self.fields else dataclasses.replace(self, fields=tuple(fields))


def owners(places: Sequence[tuple[int, int]]) -> list[int]:
    """For each (offset, nbytes) the number of the entry in whose block it lies, usually its own."""
    found = list(range(len(places)))
    owner, end = -1, 0
    for number in sorted(found, key=lambda each: places[each]):
        offset, nbytes = places[number]
        if offset < end:
            found[number] = owner
        elif nbytes:
            owner, end = number, offset + nbytes
    return found


def has_no_rows(value: Any) -> bool:
    """True for `[]` and `()`, and arrays and tensors of shape (0,): no rows, and unknown columns."""
    if type(value) in (list, tuple):
        return not value
    torch: Any = sys.modules.get("torch")
    is_tensor = torch is not None and type(value) is torch.Tensor and is_plain(value)
    return (is_tensor or isinstance(value, np.ndarray)) and tuple(value.shape) == (0,)


def closed(field: FieldSpec, value: Any) -> FieldSpec:
    """The spec of an open field, from a value with rows; `field` itself if the value has none or it is not open.

    Raises:
        ValueError: the value's dtype cannot hold the pad value.
    """
    if not field.is_open or has_no_rows(value) or _leaf_of(value)[0] not in ("array", "tensor") or not value.shape:
        return field
    return _field_of(field.path, value, Field(pad=field.pad) if field.kind == "pad" else Field(ragged=True))


def is_masked(value: Any) -> bool:
    """True for masked arrays. Checked without importing `numpy.ma`, which takes 15 ms in every worker."""
    masked: Any = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(value, masked.MaskedArray)


def is_plain(tensor: Any) -> bool:
    """True for a tensor that is plain memory: dense, on the CPU, outside autograd."""
    return bool(
        tensor.device.type == "cpu"
        and str(tensor.layout) == "torch.strided"
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_nested
    )


def tensor_as_array(tensor: Any) -> tuple[np.ndarray[Any, Any], str]:
    """A plain tensor's memory as an array, and its dtype's name; dtypes NumPy lacks come as integers of their size."""
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return tensor.numpy(), name
    except TypeError:
        torch: Any = sys.modules["torch"]
        return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy(), name


def _half_more(n: int) -> int:
    return n + (n >> 1) + 1


def _is_known_container(node: Any) -> bool:
    # Other mappings and sequences may do anything on access: they are pickled whole, and torch collates them.
    return type(node) in (dict, OrderedDict, tuple, list) or is_namedtuple(node) or is_dataclass(node)


def _field_of(path: str, value: Any, declared: Field | None) -> FieldSpec:
    leaf, dtype, torch_dtype, shape = _leaf_of(value)
    if declared is not None and has_no_rows(value):
        if leaf not in ("array", "tensor"):
            leaf, dtype, torch_dtype = "array", _UNKNOWN, _UNKNOWN.name
        shape = (0,) if declared.kind == "pad" else (1, 0)
        return FieldSpec(path, declared.kind, leaf, dtype, torch_dtype, shape, declared.pad or 0, is_open=True)
    if declared is None:
        if leaf == "object":
            return FieldSpec(path, "object", leaf)
        return FieldSpec(path, "stack", leaf, dtype, torch_dtype, shape)
    if leaf not in ("array", "tensor") or not shape:
        raise ValueError(
            f"field {path!r} is declared {declared.kind} but the first sample holds {type(value).__name__} there: "
            "only arrays of at least one dimension can be padded or ragged."
        )
    if declared.kind == "pad":
        room = (max(8, _half_more(shape[0])), *shape[1:])
        pad = _as_stored(path, declared.pad or 0, dtype, torch_dtype)
        return FieldSpec(path, "pad", leaf, dtype, torch_dtype, room, pad)
    room = (len(shape), max(64, _half_more(int(np.prod(shape, dtype=np.int64)))))
    return FieldSpec(path, "ragged", leaf, dtype, torch_dtype, room)


def _as_stored(path: str, pad: float, dtype: np.dtype[Any], torch_dtype: str) -> float:
    """The pad value as rows hold it: for dtypes that NumPy lacks, its bits as an integer."""
    if torch_dtype != dtype.name:
        torch: Any = sys.modules["torch"]
        stored: float = tensor_as_array(torch.tensor(pad, dtype=getattr(torch, torch_dtype)))[0].item()
        return stored
    if dtype.kind in "biu":
        lowest, highest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if not (float(pad).is_integer() and lowest <= pad <= highest):
            raise ValueError(f"field {path!r} holds {dtype}, which cannot hold pad={pad}.")
    return pad


def _leaf_of(value: Any) -> tuple[Leaf, np.dtype[Any], str, tuple[int, ...]]:
    """(leaf, row dtype, torch dtype, shape) as torch's `default_collate` would treat the value."""
    kind = type(value)
    if kind is bool:
        return "bool", np.dtype(np.bool_), "bool", ()
    if kind is int:
        return "int", np.dtype(np.int64), "int64", ()
    if kind is float:
        return "float", np.dtype(np.float64), "float64", ()
    # What to do with masked values is for the collate function to decide.
    if isinstance(value, (np.ndarray, np.generic)) and not (isinstance(value, (str, bytes)) or is_masked(value)):
        dtype = value.dtype
        if dtype.name in TORCH_DTYPES and dtype.isnative:
            return ("array" if isinstance(value, np.ndarray) else "scalar"), dtype, dtype.name, value.shape
    torch: Any = sys.modules.get("torch")
    if torch is not None and kind is torch.Tensor and is_plain(value):
        array, name = tensor_as_array(value)
        return "tensor", array.dtype, name, array.shape
    return "object", np.dtype(object), "", ()


def _flatten(skeleton: Any, sample: Any, out: list[Any]) -> bool:
    kind = type(skeleton)
    if kind is int:
        out.append(sample)
        return True
    if type(sample) is not kind:
        return False
    if kind is dict or kind is OrderedDict:
        return list(sample) == list(skeleton) and all(map(_flatten, skeleton.values(), sample.values(), repeat(out)))
    if isinstance(skeleton, (tuple, list)):
        return len(sample) == len(skeleton) and all(map(_flatten, skeleton, sample, repeat(out)))
    return all(_flatten(getattr(skeleton, f.name), getattr(sample, f.name), out) for f in dataclasses.fields(skeleton))


def _fill(skeleton: Any, values: Sequence[Any]) -> Any:
    if type(skeleton) is int:
        return values[skeleton]
    if isinstance(skeleton, dict):
        filled = copy.copy(skeleton)
        for name, below in skeleton.items():
            filled[name] = _fill(below, values)
        return filled
    return rebuild(skeleton, [_fill(below, values) for _, below in children(skeleton) or []])
