"""`copy_into`: a sample into the arrays of a row, for datasets that offer `read_into`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, describe_sample
from loaders.nested import leaves
from loaders.timing.stages import WRITE


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
