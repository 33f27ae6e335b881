"""Which dtypes NumPy and torch share, which are converted by a lossless copy, and which cannot be converted.

The four tables below are the only source: the conversions, `docs/conversions.md` and the tests read them. Dtypes are
named, not imported, so that the table is the same for every version of torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.errors import DtypeError

# As of torch 2.13: `+`, `<`, `max()`, `gather()` and use as an index are missing.
_FEW_OPERATIONS = "torch stores, casts and indexes it, but has little arithmetic: `.to(torch.int64)` before computing"

SHARED: dict[str, str] = {
    "bool": "",
    "uint8": "",
    "int8": "",
    "uint16": _FEW_OPERATIONS,
    "int16": "",
    "uint32": _FEW_OPERATIONS,
    "int32": "",
    "uint64": f"{_FEW_OPERATIONS} (wraps from 2**63)",
    "int64": "",
    "float16": "",
    "float32": "",
    "float64": "",
    "complex64": "",
    "complex128": "",
}
"""Dtypes with the same name and the same bytes in both libraries, and what to know about them."""

WIDENED: dict[str, str] = {
    "bfloat16": "float32",
    "float8_e4m3fn": "float32",
    "float8_e4m3fnuz": "float32",
    "float8_e5m2": "float32",
    "float8_e5m2fnuz": "float32",
    "float8_e8m0fnu": "float32",
    "complex32": "complex64",
}
"""torch dtypes without a NumPy dtype, and the NumPy dtype that holds each of their values exactly."""

_QUANTIZED = "call tensor.dequantize() for the values, or tensor.int_repr() for the integers"
_RAW_BITS = "call tensor.view(torch.uint8) for the raw bytes"

TORCH_ONLY: dict[str, str] = {
    **dict.fromkeys(["qint8", "quint8", "qint32", "quint4x2", "quint2x4"], _QUANTIZED),
    **dict.fromkeys([f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)], _RAW_BITS),
    **dict.fromkeys(["bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "float4_e2m1fn_x2"], _RAW_BITS),
}
"""torch dtypes that no NumPy dtype holds, and what to do."""

_NO_TEXT = "torch has no text: keep it as a list of str, or encode it as integers"

NUMPY_ONLY: dict[str, tuple[str, str]] = {
    "f": ("longdouble", "call array.astype(np.float64), which rounds"),
    "c": ("clongdouble", "call array.astype(np.complex128), which rounds"),
    "M": ("datetime64", "call array.view(np.int64) for the counts of its unit since 1970"),
    "m": ("timedelta64", "call array.view(np.int64) for the counts of its unit"),
    "O": ("object", "build a numeric array from its elements, such as np.stack(list(array))"),
    "U": ("str", _NO_TEXT),
    "T": ("StringDType", _NO_TEXT),
    "S": ("bytes", "call array.view(np.uint8) for the raw bytes"),
    "V": ("void, structured", 'convert field by field, array["name"], or the raw bytes, array.view(np.uint8)'),
}
"""NumPy dtypes that torch lacks, by `dtype.kind`: name and what to do."""

_NATIVE = {f"{dtype.kind}{dtype.itemsize}": dtype for dtype in map(np.dtype, SHARED)}


def native_dtype(array: np.ndarray[Any, Any]) -> np.dtype[Any]:
    """The dtype under which torch takes the bytes of `array`, in this machine's byte order.

    Kind and size decide, not the C type: torch refuses `np.ulonglong` where it takes `np.uint64`, with the same bytes.

    Raises:
        DtypeError: torch has no such dtype.
    """
    native = _NATIVE.get(f"{array.dtype.kind}{array.dtype.itemsize}")
    if native is not None and array.dtype.newbyteorder("=") == native:
        return native
    # 2 marks a dtype that another package registered, such as ml_dtypes: its kind does not tell its meaning.
    _, remedy = NUMPY_ONLY.get("" if array.dtype.isbuiltin == 2 else array.dtype.kind, ("", ""))
    raise _no_counterpart(array, "torch", remedy or "call array.astype with one of NumPy's own numeric dtypes")


def numpy_dtype(tensor: torch.Tensor) -> np.dtype[Any]:
    """The NumPy dtype that holds every value of `tensor` exactly; its bytes are the same if `is_shared` says so.

    Raises:
        DtypeError: no NumPy dtype does.
    """
    name = _name(tensor)
    counterpart = WIDENED.get(name, name)
    if counterpart not in SHARED:
        raise _no_counterpart(tensor, "NumPy", TORCH_ONLY.get(name, "convert it to another dtype"))
    return np.dtype(counterpart)


def is_shared(tensor: torch.Tensor) -> bool:
    """True if NumPy has the dtype of `tensor`."""
    return _name(tensor) in SHARED


def describe(array: np.ndarray[Any, Any] | torch.Tensor) -> str:
    """How messages name an array or tensor: `float32 array of shape (3, 224, 224)`."""
    if isinstance(array, torch.Tensor):
        return f"{_name(array)} tensor of shape {tuple(array.shape)}"
    return f"{array.dtype} array of shape {array.shape}"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _no_counterpart(array: np.ndarray[Any, Any] | torch.Tensor, other: str, remedy: str) -> DtypeError:
    return DtypeError(f"{describe(array)}: {other} has no such dtype.\n  {remedy[0].upper()}{remedy[1:]}.")
