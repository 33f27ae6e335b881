"""What the fields of a sample are: found from the schema of a table and the arguments of a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from loaders.errors import DatasetError

_types = pa.types
Columns = Iterable[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Fixed:
    """Values of fixed size.

    Attributes:
        stored: dtype in Arrow's memory.
        dtype: of the values: datetime64 and timedelta64 where `stored` are integers.
        shape: of a value as stored.
        permutation: of its axes; empty for none.
        is_bits: eight to a byte.
    """

    stored: np.dtype[Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    permutation: tuple[int, ...] = ()
    is_bits: bool = False

    @property
    def items(self) -> int:
        """Items of a value."""
        return prod(self.shape)

    @property
    def final_shape(self) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.shape[axis] for axis in self.permutation) if self.permutation else self.shape

    def shaped(self, items: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Items (…, items) as values (…, *final_shape): a view."""
        lead = items.shape[:-1]
        values: np.ndarray[Any, Any] = items.reshape(*lead, *self.shape)
        axes = self.permutation or tuple(range(len(self.shape)))
        turned: np.ndarray[Any, Any] = values.transpose(*range(len(lead)), *(len(lead) + axis for axis in axes))
        return turned


@dataclass(frozen=True)
class FieldPlan:
    """One field of the samples.

    Attributes:
        name: of the field.
        columns: that it is read from; several are stacked into one row.
        fixed: of the values; None if they have no fixed size.
        dtype: that the values are cast to; None for none.
        fill: in place of a null, as a 1-tuple; None raises an error.
        is_image: an encoded image, to be decoded.
    """

    name: str
    columns: tuple[str, ...]
    fixed: Fixed | None
    dtype: np.dtype[Any] | None
    fill: tuple[Any] | None
    is_image: bool = False
    is_stacked: bool = False

    @property
    def row(self) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
        """(dtype, shape) of every value; None if they differ."""
        if self.fixed is None:
            return None
        shape = (len(self.columns),) if self.is_stacked else self.fixed.final_shape
        return self.dtype or self.fixed.dtype, shape


def fixed(kind: Any) -> Fixed | None:
    """What values of an Arrow type are; None if they have no fixed size."""
    if isinstance(kind, pa.BaseExtensionType):
        inner = fixed(kind.storage_type)
        if inner is None or not isinstance(kind, pa.FixedShapeTensorType):
            return inner
        permutation = tuple(kind.permutation or ())
        in_order = permutation == tuple(range(len(permutation)))
        return Fixed(inner.stored, inner.dtype, tuple(kind.shape), () if in_order else permutation, inner.is_bits)
    if _types.is_fixed_size_list(kind):
        inner = fixed(kind.value_type)
        if inner is None or inner.permutation or kind.list_size == 0:
            return None
        return Fixed(inner.stored, inner.dtype, (kind.list_size, *inner.shape), (), inner.is_bits)
    if _types.is_boolean(kind):
        return Fixed(np.dtype(np.uint8), np.dtype(np.bool_), is_bits=True)
    if _types.is_integer(kind) or _types.is_floating(kind):
        number = np.dtype(kind.to_pandas_dtype())
        return Fixed(number, number)
    if _types.is_date(kind):
        return Fixed(np.dtype(f"i{kind.bit_width // 8}"), np.dtype("M8[D]" if kind.bit_width == 32 else "M8[ms]"))
    if _types.is_timestamp(kind):
        return Fixed(np.dtype(np.int64), np.dtype(f"M8[{kind.unit}]"))
    if _types.is_time(kind) or _types.is_duration(kind):
        return Fixed(np.dtype(f"i{kind.bit_width // 8}"), np.dtype(f"m8[{kind.unit}]"))
    return None


def plan_fields(
    schema: Any,
    columns: Columns | None,
    image: str | None,
    declared: Iterable[str] | None,
    dtypes: Mapping[str, Any],
    nulls: Mapping[str, Any],
) -> tuple[FieldPlan, ...]:
    """The fields of a dataset.

    Args:
        schema: of the table.
        columns, image, dtypes, nulls: of `ArrowDataset`.
        declared: the columns that are declared as images; None finds out from the schema.

    Raises:
        DatasetError: a column is missing, or its type has no form in a sample.
    """
    sources = _sources(schema, columns)
    images = {image} if image is not None else set(image_columns(schema) if declared is None else declared)
    if image is not None and image not in sources.values():
        raise DatasetError(f"image={image!r} is not among the columns {_listed(sources)}.")
    for argument, given in (("dtypes", dtypes), ("nulls", nulls)):
        if unknown := sorted(set(given) - set(sources)):
            raise DatasetError(f"{argument}= names {', '.join(map(repr, unknown))}; the fields are {_listed(sources)}.")
    return tuple(
        _planned(schema, name, each, images, dtypes.get(name), (nulls[name],) if name in nulls else None)
        for name, each in sources.items()
    )


def image_columns(schema: Any) -> set[str]:
    """The columns of images that Hugging Face's `datasets` declared in a schema it wrote."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
        return {name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "Image"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _sources(schema: Any, columns: Columns | None) -> dict[str, tuple[str, ...] | str]:
    if isinstance(columns, str):
        raise TypeError(f"columns is one name, {columns!r}: pass a list of names.")
    if columns is None:
        columns = schema.names
    given = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    sources = {name: each if isinstance(each, str) else tuple(each) for name, each in given.items()}
    if not all(sources.values()):
        raise DatasetError("A field is made from no column.")
    if not sources:
        raise DatasetError("There are no columns.")
    for each in sources.values():
        for column in (each,) if isinstance(each, str) else each:
            found = schema.names.count(column)
            if found != 1:
                has = "there is no" if not found else f"there are {found} a"
                raise DatasetError(f'{has} column "{column}"; the table has {_listed(schema.names)}.')
    return sources


def _planned(
    schema: Any, name: str, source: tuple[str, ...] | str, images: set[str], dtype: Any, fill: tuple[Any] | None
) -> FieldPlan:
    dtype = None if dtype is None else np.dtype(dtype)
    names = (source,) if isinstance(source, str) else source
    kinds = [schema.field(column).type for column in names]
    if isinstance(source, str) and source in images:
        if not _is_image(kinds[0]):
            raise DatasetError(f'column "{source}" is {kinds[0]}: encoded images are binary, or {{bytes, path}}.')
        if dtype is not None or fill is not None:
            raise DatasetError(f'field "{name}" is an image: dtypes= and nulls= are for other fields.')
        return FieldPlan(name, names, None, None, None, is_image=True)
    for column, kind in zip(names, kinds, strict=True):
        if why := _refused(kind):
            raise DatasetError(f'column "{column}" is {kind}: {why}. Leave it out with columns=.')
    found = [fixed(kind) for kind in kinds]
    if not isinstance(source, str):
        if any(each is None or each.shape or each.dtype.kind not in "biuf" for each in found):
            told = ", ".join(f"{column}: {kind}" for column, kind in zip(names, kinds, strict=True))
            raise DatasetError(f'field "{name}" stacks columns, which must be numbers: {told}.')
        common = np.result_type(*(each.dtype for each in found if each is not None))
        plan = FieldPlan(name, names, found[0], dtype or common, fill, is_stacked=True)
    else:
        plan = FieldPlan(name, names, found[0], dtype, fill)
        if dtype is not None and found[0] is None and not _is_numbers(kinds[0]):
            raise DatasetError(f'dtypes= names field "{name}", which is {kinds[0]}: it holds no numbers.')
    if fill is not None and plan.row is not None:
        _check_fill(name, fill[0], plan.row[0])
    return plan


def _check_fill(name: str, value: Any, dtype: np.dtype[Any]) -> None:
    try:
        with np.errstate(all="ignore"):
            cast = np.asarray(value).astype(dtype)
        fits = cast.ndim == 0 and (bool(cast == value) or (bool(cast != cast) and bool(value != value)))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise DatasetError(f"nulls={{{name!r}: {value!r}}}: it is not a value of {dtype}.")


def _refused(kind: Any) -> str:
    if _types.is_null(kind):
        return "every value is null"
    if _types.is_map(kind) or _types.is_union(kind) or _types.is_interval(kind):
        return "such values have no form in a sample"
    return ""


def _is_image(kind: Any) -> bool:
    if _types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return "bytes" in names
    return bool(_types.is_binary(kind) or _types.is_large_binary(kind) or _types.is_binary_view(kind))


def _is_numbers(kind: Any) -> bool:
    while not isinstance(kind, pa.BaseExtensionType) and hasattr(kind, "value_type"):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        return _is_numbers(kind.storage_type)
    return fixed(kind) is not None or bool(_types.is_decimal(kind))


def _listed(names: Iterable[str]) -> str:
    known = [f'"{name}"' for name in names]
    return ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
