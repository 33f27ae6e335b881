"""Values of columns that have no fixed size: text, bytes, lists, structs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loaders.datasets.arrow.faults import NullError, RaggedError
from loaders.datasets.arrow.fields import Fixed, fixed

_types = pa.types


def value_of(scalar: Any) -> Any:
    """The value of an Arrow scalar.

    Returns:
        ndarray for lists of numbers, NumPy scalar for numbers, dates and times, float for decimals, str, bytes, dict
        for structs, lists of str or bytes; what `to_pylist` gives for lists of structs.

    Raises:
        NullError: it is null, or contains a null.
        RaggedError: it is a list of lists of different lengths.
    """
    if not scalar.is_valid:
        raise NullError
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        return _extension_value(kind, scalar)
    if _is_list(kind):
        return array_of(scalar.values)
    if _types.is_struct(kind):
        return {name: value_of(value) for name, value in scalar.items()}
    if _types.is_dictionary(kind):
        return value_of(scalar.value)
    if _types.is_decimal(kind):
        return float(scalar.as_py())
    found = fixed(kind)
    if found is not None:
        return array_of(pa.array([scalar], kind))[0]
    return scalar.as_py()


def array_of(array: Any) -> Any:
    """The values of an Arrow array, as `value_of` gives them: a view of its memory where there is one.

    Raises:
        NullError, RaggedError: as in `value_of`.
    """
    if array.null_count:
        raise NullError
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        found = fixed(kind)
        values = array_of(array.storage)
        return values.reshape(len(array), *found.shape) if found is not None and not found.permutation else values
    if _is_list(kind):
        if _types.is_fixed_size_list(kind):
            length = kind.list_size
        else:
            lengths = np.unique(pc.list_value_length(array).to_numpy(zero_copy_only=False))
            if len(lengths) > 1:
                raise RaggedError
            length = int(lengths[0]) if len(lengths) else 0
        values = array_of(array.flatten())
        if isinstance(values, np.ndarray):
            return values.reshape(len(array), length, *values.shape[1:])
        return [values[row * length : (row + 1) * length] for row in range(len(array))]
    if _types.is_dictionary(kind):
        return array_of(array.dictionary_decode())
    if _types.is_decimal(kind):
        return np.array([float(value) for value in array.to_pylist()], np.float64)
    found = fixed(kind)
    return _numbers(array, found) if found is not None else array.to_pylist()


def _numbers(array: Any, found: Fixed) -> np.ndarray[Any, Any]:
    if found.is_bits:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.empty(0, found.dtype)
    items = np.frombuffer(buffer, found.stored, len(array), array.offset * found.stored.itemsize)
    items.flags.writeable = False  # it is the memory of the table, or of a row group that is kept
    return items.view(found.dtype) if found.dtype.itemsize == found.stored.itemsize else items.astype(found.dtype)


def _extension_value(kind: Any, scalar: Any) -> Any:
    found = fixed(kind)
    value = value_of(scalar.value)
    return found.shaped(value) if found is not None else value


def _is_list(kind: Any) -> bool:
    return bool(
        _types.is_list(kind)
        or _types.is_large_list(kind)
        or _types.is_fixed_size_list(kind)
        or _types.is_list_view(kind)
        or _types.is_large_list_view(kind)
    )
