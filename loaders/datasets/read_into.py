"""`read_into`: where a dataset's own may stand for indexing, and `copy_into`, which writes any sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.nested import leaves
from loaders.timing.stages import WRITE

# What says what a sample is: the second is that of `IndexedDataset`.
_READ_BY = {"__getitem__", "_read"}


def owns_read_into(kind: type) -> bool:
    """Whether `read_into` writes what indexing gives: it is of the class that says what a sample is, or of one below.

    Not so in a subclass that reads in its own way and inherits `read_into`, nor in a wrapper that passes on, by
    `__getattr__`, that of the dataset inside.
    """
    for each in kind.__mro__:
        if "read_into" in vars(each):
            return True
        if not _READ_BY.isdisjoint(vars(each)):
            return False
    return False


def own_read_into(dataset: Any) -> Callable[[Any, Any], None] | None:
    """`dataset.read_into` where it may stand for indexing; a property that raises AttributeError says that none may."""
    return getattr(dataset, "read_into", None) if owns_read_into(type(dataset)) else None


def copy_into(out: Any, sample: Any, index: int, describe: Callable[[int], str]) -> None:
    """Write the values of a sample into the arrays of `out`, which has its structure.

    Args:
        out: arrays, as `read_into` is given them.
        sample: arrays and numbers.
        index: the number of the sample, for the message of an error.
        describe: of the dataset, likewise.

    Raises:
        FieldNameError, FieldShapeError, FieldDtypeError: the sample is not like `out`. Nothing is cast.
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


def without_image(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields but the one named "image", which has a way of its own."""
    return {name: value for name, value in fields.items() if name != "image"}


def settle(result: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Write the result of a crop into `out`, unless it is there: a subclass may change what the crop has written."""
    if result is not out:
        with WRITE:
            out[...] = result
