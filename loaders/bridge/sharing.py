"""`shares_memory`: whether two arrays or tensors have a byte in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.bridge.arrays import require_dense
from loaders.errors import ArrayKindError

# About half a second; the problem is NP-hard, and strided views with many axes can take forever.
_MAX_WORK = 10_000_000


def shares_memory(a: np.ndarray[Any, Any] | torch.Tensor, b: np.ndarray[Any, Any] | torch.Tensor) -> bool:
    """True if some byte belongs to both, each an array or a tensor of any dtype.

    Exact, not by bounds: `x[::2]` and `x[1::2]` share nothing. Only where NumPy gives up (contrived views of many
    axes) do the bounds decide, and True then means "may". Memory is told apart by device; tensors on the meta device
    and those without elements share nothing.

    Raises:
        ArrayKindError: neither array nor tensor, or a tensor that hides its memory (sparse, nested, wrapped): compare
            its parts, such as `tensor.values()`.
    """
    (device_a, bytes_a), (device_b, bytes_b) = _locate(a), _locate(b)
    if device_a != device_b:
        return False
    try:
        return np.shares_memory(bytes_a, bytes_b, max_work=_MAX_WORK)  # type: ignore[arg-type]  # the stub is narrower
    except np.exceptions.TooHardError:
        return np.may_share_memory(bytes_a, bytes_b)


class _Extent:
    """Where a tensor's elements lie, as NumPy's array interface. The addresses are compared, never read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{tensor.itemsize}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }


def _locate(array: object) -> tuple[torch.device, np.ndarray[Any, Any]]:
    if isinstance(array, np.ndarray):
        return torch.device("cpu"), array
    if not isinstance(array, torch.Tensor):
        raise ArrayKindError(
            f"shares_memory compares arrays and tensors, not {type(array).__name__}.\n  Pass the arrays inside it."
        )
    with torch._C.DisableTorchFunctionSubclass():
        if array.is_meta:
            return array.device, np.empty(0)
    plain = require_dense(array)
    # Autograd's zero tensors have elements and no memory: their address is 0.
    return plain.device, np.asarray(_Extent(plain)) if plain.data_ptr() else np.empty(0)
