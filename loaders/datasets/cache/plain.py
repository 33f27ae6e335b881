"""Samples as plain data, for files: a description in JSON, and the bytes of their arrays. Reading one runs no code.

Supported are None, bool, int, float, complex, str, bytes, bytearray, NumPy scalars, arrays and tensors that are just
memory, and dict, OrderedDict, list, tuple, namedtuples and dataclasses of these. A class name in a file is looked up
only among the classes of samples that this process has encoded itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from loaders.batch.packing import as_dense, rebuild_tensor
from loaders.batch.spec import is_plain, tensor_as_array
from loaders.nested import children, is_dataclass, is_namedtuple

_SHORTEST = {"separators": (",", ":"), "check_circular": False}
# Byte order, kind and size, and the unit of dates: no Python objects, and nothing that NumPy would have to parse.
_DTYPE = re.compile(r"[<>|=][biufcmMSUV]\d+(\[\d*\w+\])?")
_TORCH_DTYPE = re.compile(r"bool|(b?float|u?int|complex)\d+(_\w+)?")
# What decoding a damaged or forged description may raise.
_DAMAGED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)

_seen: WeakValueDictionary[str, type] = WeakValueDictionary()  # name → class of encoded samples


class NotPlainError(TypeError):
    """A sample contains a value that has no plain description."""


class UnknownClassError(LookupError):
    """A sample contains a class of which this process has encoded no instance."""


def encode(sample: Any) -> tuple[bytes, list[np.ndarray[Any, Any]]]:
    """The description of a sample, and the bytes of its arrays, uint8 (N,) each.

    Raises:
        NotPlainError: a value in it cannot be described; the message names the field.
    """
    pieces: list[np.ndarray[Any, Any]] = []
    try:
        return json.dumps(_described(sample, "", pieces), **_SHORTEST).encode(), pieces  # type: ignore[arg-type]
    except RecursionError as error:
        raise NotPlainError("its containers are nested too deep, or contain themselves") from error


def decode(description: Any, pieces: Sequence[np.ndarray[Any, Any]]) -> Any:
    """The sample; its arrays are views of `pieces`, uint8 (N,) each.

    Raises:
        UnknownClassError: it contains a class that this process does not know.
        ValueError: the description is invalid.
    """
    try:
        return _value(json.loads(bytes(description)), pieces)
    except UnknownClassError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _described(value: Any, path: str, pieces: list[np.ndarray[Any, Any]]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() <= 64 else ["int", hex(value)]  # Python limits decimal digits only
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in (bytes, bytearray):
        return [kind.__name__, _piece(np.frombuffer(value, np.uint8), pieces)]
    if kind in (np.str_, np.bytes_):  # their dtypes may have size 0
        return [kind.__name__, _described(value.item(), path, pieces)]
    if isinstance(value, np.generic):
        return ["scalar", *_array_described(np.asarray(value), path, pieces)]
    if kind is np.ndarray or kind is np.memmap:
        return ["array", *_array_described(np.asarray(value), path, pieces)]
    torch: Any = sys.modules.get("torch")
    if torch is not None and kind is torch.Tensor and is_plain(value) and not vars(value):
        array, name = tensor_as_array(value)
        return ["tensor", *_array_described(array, path, pieces), name]
    if kind in (dict, OrderedDict):
        if kind is dict and all(type(name) is str for name in value):
            return {name: _described(below, _join(path, name), pieces) for name, below in value.items()}
        keys = [_described(name, _join(path, name), pieces) for name in value]
        return [kind.__name__, keys, [_described(below, _join(path, name), pieces) for name, below in value.items()]]
    named = is_namedtuple(value) or is_dataclass(value)
    if kind not in (list, tuple) and not named:
        raise NotPlainError(f"{_where(path)} is a {kind.__name__}")
    below = children(value) or []
    nodes = [_described(child, _join(path, name), pieces) for name, child in below]
    if not named:
        return [kind.__name__, *nodes]
    names = [name for name, _ in below]
    if more := getattr(value, "__dict__", {}).keys() - names:
        raise NotPlainError(f"{_where(path)} is a {kind.__name__} with attributes besides its fields, {sorted(more)}")
    _seen[_name_of(kind)] = kind
    return ["named", _name_of(kind), names, *nodes]


def _array_described(array: np.ndarray[Any, Any], path: str, pieces: list[np.ndarray[Any, Any]]) -> list[Any]:
    dtype = _dtype_described(array.dtype)
    if dtype is None or array.dtype.itemsize == 0:
        raise NotPlainError(f"{_where(path)} is an array of dtype {array.dtype}")
    dense, axes = as_dense(array)
    piece = np.ascontiguousarray(dense).reshape(-1).view(np.uint8)
    return [_piece(piece, pieces), dtype, list(dense.shape), axes]


def _piece(piece: np.ndarray[Any, Any], pieces: list[np.ndarray[Any, Any]]) -> int:
    pieces.append(piece)
    return len(pieces) - 1


def _dtype_described(dtype: np.dtype[Any]) -> Any:
    """The dtype as JSON, or None if it cannot be described."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        below = _dtype_described(base)
        return below and [below, list(shape)]
    if dtype.names is not None:
        parts = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]  # never None if there are names
        formats = [_dtype_described(part[0]) for part in parts]
        offsets = [part[1] for part in parts]
        known = None not in formats
        described = {"names": list(dtype.names), "formats": formats, "offsets": offsets, "itemsize": dtype.itemsize}
        return described if known else None
    return dtype.str if _DTYPE.fullmatch(dtype.str) and np.dtype(dtype.str) == dtype else None


def _value(node: Any, pieces: Sequence[np.ndarray[Any, Any]]) -> Any:
    if isinstance(node, dict):
        return {name: _value(below, pieces) for name, below in node.items()}
    if not isinstance(node, list):
        return node
    tag, *rest = node
    if tag in ("list", "tuple"):
        values = [_value(below, pieces) for below in rest]
        return values if tag == "list" else tuple(values)
    if tag in ("array", "scalar"):
        array = _array(rest, pieces)
        return array if tag == "array" else array[()]
    if tag in ("dict", "OrderedDict"):
        keys, values = ([_value(below, pieces) for below in side] for side in rest)
        items = zip(keys, values, strict=True)
        return dict(items) if tag == "dict" else OrderedDict(items)
    if tag == "named":
        name, names, *nodes = rest
        return _named(name, names, [_value(below, pieces) for below in nodes])
    if tag == "tensor":
        *described, name = rest
        array = _array(described, pieces)
        if not _TORCH_DTYPE.fullmatch(name):
            raise ValueError(f"{name!r} is not a dtype of torch")
        return rebuild_tensor(array, list(range(array.ndim)), name)
    [*content] = rest
    if tag == "int":
        return int(content[0], 16)
    if tag == "complex":
        return complex(*content)
    if tag in ("bytes", "bytearray"):
        return pieces[content[0]].tobytes() if tag == "bytes" else bytearray(pieces[content[0]])
    if tag in ("str_", "bytes_"):
        return np.str_(content[0]) if tag == "str_" else np.bytes_(_value(content[0], pieces))
    raise ValueError(f"{tag!r} is not a known tag")


def _array(described: list[Any], pieces: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    number, dtype_node, shape, axes = described
    dtype, piece = _dtype(dtype_node), pieces[number]
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0 or number < 0:
        raise ValueError(f"no array can have dtype {dtype} and shape {shape}")
    if math.prod(shape) * dtype.itemsize != piece.nbytes:
        raise ValueError(f"{dtype} of shape {shape} does not take {piece.nbytes} bytes")
    dense: np.ndarray[Any, Any] = np.ndarray(tuple(shape), dtype, piece).transpose(axes)
    return dense


def _dtype(node: Any) -> np.dtype[Any]:
    if isinstance(node, list):
        base, shape = node
        made: Any = (_dtype(base), tuple(shape))
    elif isinstance(node, dict):
        made = {**node, "formats": [_dtype(below) for below in node["formats"]]}
    elif _DTYPE.fullmatch(node):
        made = node
    else:
        raise ValueError(f"{node!r} is not a dtype of plain numbers, dates or text")
    dtype: np.dtype[Any] = np.dtype(made)
    return dtype


def _named(name: str, names: list[str], values: list[Any]) -> Any:
    kind: Any = _seen.get(name)
    if kind is None:
        raise UnknownClassError(name)
    is_tuple = issubclass(kind, tuple)
    if names != (list(kind._fields) if is_tuple else [field.name for field in dataclasses.fields(kind)]):
        raise UnknownClassError(name)  # another class of the same name
    if is_tuple:
        if len(values) != len(names):
            raise ValueError(f"{len(values)} values for {len(names)} fields")
        return tuple.__new__(kind, values)  # not the constructor, which may run any code
    made = object.__new__(kind)
    for each, value in zip(names, values, strict=True):
        object.__setattr__(made, each, value)
    return made


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _where(path: str) -> str:
    return f'field "{path}"' if path else "it"
