"""Collate for torch's stock DataLoader: ndarrays stay ndarrays until their batch is whole."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils import collate as _torchs_collate  # private, but documented for registering functions

from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.nested import is_dataclass, is_namedtuple, rebuild
from loaders.system.opencv_threads import quiet_opencv


def numpy_collate(samples: Sequence[Any]) -> Any:
    """A batch from samples, as torch's `default_collate` makes it, with each ndarray copied once.

    For the stock loader: `torch.utils.data.DataLoader(dataset, collate_fn=numpy_collate)`. In a worker process the rows
    are written straight into the shared memory that the consumer will read, so the batch is neither copied nor pickled
    on its way there.

    Structure, dtypes and values are those of `default_collate`: a tuple of fields comes out as a list, Python floats as
    float64, strings as they are. In addition, dataclasses come out as dataclasses, and big-endian arrays in native byte
    order. It is stricter: dtypes are never promoted, fields never dropped.

    Args:
        samples: dicts, tuples, namedtuples, lists or dataclasses, nested as you like, of ndarrays, scalars, strings.

    Returns:
        The same structure with a CPU tensor (B, *shape) for each ndarray or number.

    Raises:
        FieldShapeError: the arrays of a field differ in shape.
        FieldDtypeError: they differ in dtype or type, or torch has no such dtype (str, object, datetime, masked …).
        FieldNameError: the samples differ in their fields.
    """
    quiet_opencv()
    return _collate(samples, "", get_worker_info() is not None)


def registered_collation() -> tuple[Any, ...]:
    """What the user registered with torch's `default_collate` for values that rows hold: (type, function) pairs.

    If there are any, `default_collate` runs the user's functions and must not be bypassed. Values that no row holds are
    left to `default_collate` anyway.
    """
    return tuple((kind, function) for kind, function in _registered() if any(map(_is_held_by_rows, _types(kind))))


def _registered() -> list[tuple[Any, Any]]:
    table = _torchs_collate.default_collate_fn_map
    return [(kind, fn) for kind, fn in table.items() if getattr(fn, "__module__", None) != _torchs_collate.__name__]


def _types(kind: Any) -> tuple[type[Any], ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _is_held_by_rows(kind: type[Any]) -> bool:
    rest = (kind, *kind.__subclasses__())
    return (
        any(issubclass(held, kind) for held in _HELD)
        or issubclass(kind, (np.ndarray, np.generic))
        or any(dataclasses.is_dataclass(each) or hasattr(each, "_fields") for each in rest)
    )


# Of their subclasses only those of arrays, and namedtuples and dataclasses, are written into rows.
_HELD = (bool, int, float, np.ndarray, np.float32, np.int64, np.bool_, torch.Tensor, dict, OrderedDict, list, tuple)


def _is_collated_by_the_user(value: Any) -> bool:
    """Whether torch would pass this value to a function of the user's, which it finds by type, then by isinstance."""
    if not (own := dict(_registered())):
        return False
    table = _torchs_collate.default_collate_fn_map
    first = next((kind for kind in table if isinstance(value, kind)), None)
    return (type(value) if type(value) in table else first) in own


def _collate(column: Any, field: str, shared: bool) -> Any:
    first = column[0]
    if _is_collated_by_the_user(first):
        return default_collate(column)
    if isinstance(first, (np.ndarray, np.number, np.bool_)):
        return _stack(column, field, shared)
    below = partial(_collate_below, field=field, shared=shared)
    if isinstance(first, Mapping):
        _check_fields(column, field, lambda sample: set(sample) if isinstance(sample, Mapping) else None)
        return _rebuild_mapping(first, {key: below(key, [sample[key] for sample in column]) for key in first})
    if is_namedtuple(first):
        _check_fields(column, field, lambda sample: getattr(sample, "_fields", None))
        return rebuild(first, list(map(below, first._fields, zip(*column, strict=True))))
    if isinstance(first, Sequence) and not isinstance(first, (str, bytes)):
        _check_fields(column, field, lambda sample: len(sample) if isinstance(sample, Sequence) else None)
        return _rebuild_sequence(first, list(map(below, range(len(first)), zip(*column, strict=True))))
    if is_dataclass(first):
        names = [part.name for part in dataclasses.fields(first)]
        _check_fields(column, field, type)
        return rebuild(first, [below(name, [getattr(sample, name) for sample in column]) for name in names])
    if isinstance(first, torch.Tensor):
        return default_collate(column)
    try:
        return default_collate(column)  # numbers, strings, and what the user registered with torch
    except (TypeError, RuntimeError) as error:
        raise FieldDtypeError(f"{_name(field)}: {error}", field=field or None) from error


def _collate_below(key: Any, column: Sequence[Any], *, field: str, shared: bool) -> Any:
    return _collate(column, f"{field}.{key}" if field else str(key), shared)


def _check_fields(column: Sequence[Any], field: str, fields_of: Callable[[Any], Any]) -> None:
    expected = fields_of(column[0])
    for row, sample in enumerate(column):
        if (found := fields_of(sample)) != expected:
            raise FieldNameError(
                f"{_name(field, row)}: {_listed(found, sample)}, "
                f"expected {_listed(expected, column[0])} as in the earlier samples.\n"
                "  All samples of a batch need the same fields: fill in what is missing in the dataset.",
                field=field or None,
            )


def _listed(fields: Any, sample: Any) -> str:
    if isinstance(fields, (set, tuple)):
        return f"fields {', '.join(sorted(map(str, fields))) or '(none)'}"
    return type(sample).__name__ + (f" of {fields}" if isinstance(fields, int) else "")


def _stack(column: Sequence[Any], field: str, shared: bool) -> torch.Tensor:
    first = column[0]
    # Native byte order: torch has no other, and the one copy that is made here converts it.
    dtype = first.dtype.newbyteorder("=")
    batch, tensor = _allocate((len(column), *first.shape), dtype, field, shared)
    for row, array in enumerate(column):
        if not isinstance(array, (np.ndarray, np.number, np.bool_)) or isinstance(array, np.ma.MaskedArray):
            raise FieldDtypeError(
                f"{_name(field, row)}: a {type(array).__name__}, expected a plain ndarray.\n"
                "  Return the same kind of value in each sample; of a masked array, its filled() and its mask.",
                field=field or None,
            )
        if array.shape != first.shape:
            raise FieldShapeError(
                f"{_name(field, row)}: shape {array.shape}, expected {first.shape} as in the earlier samples.\n"
                "  All samples of a batch share one shape: resize, crop or pad in the dataset or its transform.",
                field=field or None,
            )
        if array.dtype.newbyteorder("=") != dtype:
            raise FieldDtypeError(
                f"{_name(field, row)}: dtype {array.dtype}, expected {dtype} as in the earlier samples.\n"
                f"  All samples of a batch share one dtype: call .astype(np.{dtype.name}) in the dataset.",
                field=field or None,
            )
        batch[row] = array
    return tensor


def _allocate(
    shape: tuple[int, ...], dtype: np.dtype[Any], field: str, shared: bool
) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """An array to write the batch into, and the tensor over the same bytes."""
    try:
        if not shared:
            batch = np.empty(shape, dtype)
            return batch, torch.from_numpy(batch)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError as error:
        raise FieldDtypeError(
            f"{_name(field)}: arrays of dtype {dtype} cannot become tensors.\n"
            "  Return numbers or bools as ndarrays, and texts as str.",
            field=field or None,
        ) from error
    # As default_collate does for tensors; share_memory_() would first copy the empty batch there. The system refuses a
    # mapping of 0 bytes, and torch makes none then.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]  # torch's
    tensor = torch.empty(0, dtype=kind, device="cpu").set_(storage).view(shape)
    return tensor.numpy(), tensor


def _name(field: str, row: int | None = None) -> str:
    sample = "" if row is None else describe_sample(None, None, row)
    return ", ".join(filter(None, (sample, f'field "{field}"' if field else ""))) or "the samples"


def _rebuild_mapping(first: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    # A copy keeps what a subclass has besides its items, such as a default_factory.
    try:
        if isinstance(first, MutableMapping):
            clone = copy.copy(first)
            clone.update(values)
            return clone
        return type(first)(values)  # type: ignore[call-arg]  # most mappings take a dict; others raise TypeError
    except TypeError:
        return values


def _rebuild_sequence(first: Sequence[Any], values: list[Any]) -> Any:
    if isinstance(first, tuple):
        return values
    try:
        if isinstance(first, MutableSequence):
            clone = copy.copy(first)
            for position, value in enumerate(values):
                clone[position] = value
            return clone
        return type(first)(values)  # type: ignore[call-arg]  # as above
    except TypeError:
        return values
