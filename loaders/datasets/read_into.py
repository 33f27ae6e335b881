"""When a dataset's `read_into` or `read_rows_into` may replace indexing, and `copy_into`, which writes any sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.nested import leaves
from loaders.timing.stages import WRITE

# The methods that define what a sample is; `_read` is that of `IndexedDataset`.
_READ_BY = {"__getitem__", "_read"}


def owns_read_into(kind: type, method: str = "read_into") -> bool:
    """Whether `method` writes what indexing returns: the class that defines the indexing, or a subclass, defines it.

    False for a subclass that overrides the indexing and inherits the method, and for a wrapper whose `__getattr__`
    forwards to the dataset inside.
    """
    for each in kind.__mro__:
        if method in vars(each):
            return True
        if not _READ_BY.isdisjoint(vars(each)):
            return False
    return False


def own_read_into(dataset: Any) -> Callable[[Any, Any], None] | None:
    """`dataset.read_into` if it may replace indexing; None if not, or if it is a property raising AttributeError."""
    return getattr(dataset, "read_into", None) if owns_read_into(type(dataset)) else None


def copy_into(out: Any, sample: Any, index: int, describe: Callable[[int], str]) -> None:
    """Write the values of a sample into the arrays of `out`, which has the same structure.

    Args:
        out: arrays, as passed to `read_into`.
        sample: arrays and numbers.
        index: of the sample, for error messages.
        describe: the dataset's method, for error messages.

    Raises:
        FieldNameError, FieldShapeError, FieldDtypeError: the sample does not match `out`. Nothing is cast.
    """
    places, values = list(leaves(out)), list(leaves(sample))
    if [path for path, _ in places] != [path for path, _ in values]:
        found, expected = (", ".join(path for path, _ in each) for each in (values, places))
        raise FieldNameError(
            f"{describe_sample(index, describe(index))}: fields {found}; expected {expected}.", index=index
        )
    for (path, place), (_, value) in zip(places, values, strict=True):
        array = np.asarray(value)
        if array.dtype != place.dtype or isinstance(value, np.ma.MaskedArray):
            kind = array.dtype if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__
            raise FieldDtypeError(
                f'{describe_sample(index, describe(index))}, field "{path}": {kind}, expected {place.dtype}.',
                index=index,
                source=describe(index),
                field=path,
            )
        if array.shape != place.shape:
            raise FieldShapeError(
                f'{describe_sample(index, describe(index))}, field "{path}": shape {array.shape}, '
                f"expected {place.shape}.\n  All samples of a batch share one shape: resize in the dataset or its "
                "transform, or declare the field with pad= or ragged=.",
                index=index,
                source=describe(index),
                field=path,
            )
        with WRITE:
            place[...] = array


def without_image(fields: dict[str, Any], image: str = "image") -> dict[str, Any]:
    """The fields without the image, which is written separately."""
    return {name: value for name, value in fields.items() if name != image}


def settle(result: Any, out: Any) -> None:
    """Copy the result of a crop to `out`, unless it is `out`: a subclass of Crop may return another array."""
    if result is not out:
        with WRITE:
            out[...] = result


def checked_rows(indices: Sequence[Any], length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices as positions in [0, length); negative ones count from the end.

    Raises:
        IndexError: one is out of range.
        TypeError: they are not integers.
    """
    rows = np.asarray(indices)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise TypeError(f"indices are {rows.dtype} of shape {rows.shape}, expected integers")
    if len(rows) and not (-length <= int(rows.min()) and int(rows.max()) < length):
        raise IndexError(f"an index is out of range: there are {length} samples")
    rows = rows.astype(np.int64)
    return np.where(rows < 0, rows + length, rows)


def take_rows(array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Write `array[rows]` to `out`, in one pass.

    Raises:
        IndexError: there are fewer rows.
        TypeError: the dtypes differ. Nothing is cast.
        ValueError: the shapes differ.
    """
    if len(rows) and (row := int(rows.max())) >= len(array):  # of a file that has become shorter
        raise IndexError(f"there is no row {row:,}: the array has {len(array):,}")
    if out.dtype != array.dtype:
        raise TypeError(f"rows are {array.dtype}, expected {out.dtype}")
    if out.shape != (len(rows), *array.shape[1:]):
        raise ValueError(f"rows have shape {array.shape[1:]}, expected {out.shape[1:]}")
    if array.flags.c_contiguous and array.flags.aligned and out.flags.c_contiguous:
        np.take(array, rows, axis=0, out=out, mode="clip")  # "raise" would write to a copy of `out` first
    elif array.ndim == 1:
        out[...] = array[rows]
    else:  # `take` would copy all of the array
        for place, row in zip(out, rows, strict=True):
            place[...] = array[row]
