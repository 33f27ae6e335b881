"""`as_tensor`: a tensor over an array's memory, or the reason why there can be none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.bridge import dtypes
from loaders.errors import ArrayKindError, ShareError


def as_tensor(array: np.ndarray[Any, Any] | np.generic, copy: bool | None = None) -> torch.Tensor:
    """The array as a CPU tensor of the same shape and dtype, sharing its memory where torch can.

    torch cannot share, and `copy=None` copies: read-only arrays and NumPy scalars (a tensor would let you write),
    broadcast arrays (a stride of 0: writing one element would change others; NumPy treats them as read-only too),
    negative strides, strides that are no multiple of the item size, unaligned data, a foreign byte order. Axes of
    length 1 and arrays without elements never prevent sharing.

    Sharing means the tensor keeps the memory alive, also that of a memmap, and what one side writes the other reads.
    Subclasses (`np.matrix`, `np.memmap`, …) are taken as the plain array they extend.

    Args:
        array: any shape; bool, an integer, float16/32/64 or complex64/128.
        copy: False shares or raises, None copies only if it must, True always copies. A copy is C-contiguous.

    Raises:
        ShareError: `copy` is False and torch cannot share this memory.
        DtypeError: torch has no such dtype.
        ArrayKindError: not an ndarray, or a masked array, whose mask torch would drop silently.
    """
    plain = _plain(array)
    native = dtypes.native_dtype(plain)
    obstacle = _obstacle(plain)
    if copy or (copy is None and obstacle):
        return torch.from_numpy(np.array(plain, dtype=native, order="C"))
    if obstacle:
        found, remedy = obstacle
        raise ShareError(f"{dtypes.describe(plain)} {found}, which torch cannot share.\n  Pass copy=True, or {remedy}.")
    return torch.from_numpy(_regular(plain.view(native)))


def _plain(array: object) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ma.MaskedArray):
        raise ArrayKindError(
            f"{dtypes.describe(array)} is a masked array, and torch has no mask.\n"
            "  Pass array.filled(value), or array.data and array.mask as two arrays."
        )
    if isinstance(array, np.generic):
        scalar = np.asarray(array)
        scalar.flags.writeable = False
        return scalar
    if isinstance(array, np.ndarray):
        return np.asarray(array)
    if isinstance(array, torch.Tensor):
        raise ArrayKindError("as_tensor takes a NumPy array, and this is a tensor already.\n  Use it as it is.")
    raise ArrayKindError(
        f"as_tensor takes a NumPy array, not {type(array).__name__}.\n  Pass np.asarray(value), which sets the dtype."
    )


def _obstacle(array: np.ndarray[Any, Any]) -> tuple[str, str] | None:
    """Why torch cannot share the memory, and what else to do than copy=True; None if it can."""
    # On other axes strides are never followed, so they may be anything: `a[:1][::-1]` has a negative one.
    followed = [stride for length, stride in zip(array.shape, array.strides, strict=True) if length > 1]
    if not array.dtype.isnative:
        return "has a foreign byte order", "call array.astype(array.dtype.newbyteorder('='))"
    if array.size == 0:
        return None
    if 0 in followed:
        return f"is broadcast (strides {array.strides}): several elements share memory", "call array.copy()"
    if any(stride < 0 for stride in followed):
        return f"has negative strides {array.strides}", "call np.ascontiguousarray on it first"
    if any(stride % array.itemsize for stride in followed):
        return (
            f"has strides {array.strides} that are no multiple of its {array.itemsize} bytes per element",
            "call np.ascontiguousarray on it first",
        )
    if not array.flags.aligned:
        return f"is unaligned (at address {array.ctypes.data:#x})", "call array.copy()"
    # Not `flags.writeable`: NumPy warns when it is read on a result of np.broadcast_arrays, which is read-only here.
    if array.__array_interface__["data"][1]:
        return "is read-only", "make it writeable first (np.memmap: mode='r+' or 'c')"
    return None


def _regular(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory, with strides that torch takes on the axes where no stride is followed."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    if all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides):
        return array
    strides = [
        stride if length > 1 else array.itemsize for length, stride in zip(array.shape, array.strides, strict=True)
    ]
    return np.lib.stride_tricks.as_strided(array, array.shape, strides)
