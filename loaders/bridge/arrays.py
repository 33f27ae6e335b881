"""`as_array`: an array over a tensor's memory, or the reason why there can be none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.bridge import dtypes
from loaders.errors import ArrayKindError, DtypeError, ShareError


def as_array(tensor: torch.Tensor, copy: bool | None = None) -> np.ndarray[Any, Any]:
    """The tensor as an array of the same shape, sharing its memory where NumPy can.

    NumPy cannot share, and `copy=None` copies: tensors on a device, with the conj or neg bit, unaligned ones, and
    the dtypes it lacks: bfloat16 and float8 come as float32, complex32 as complex64, each value exact.

    Two kinds are shared read-only, because torch guards what NumPy would not: tensors that require grad (autograd
    does not see NumPy write, and gradients would be silently wrong) and expanded ones (a stride of 0: writing one
    element would change others). The array itself is never tracked by autograd.

    Sharing means the array keeps the memory alive, also after `tensor.data = …` or `module.to(dtype)` gave the tensor
    other memory, and what one side writes the other reads.

    Args:
        tensor: any shape; strided, with memory of its own.
        copy: False shares or raises, None copies only if it must, True always copies. A copy is C-contiguous,
            writeable and owns its memory.

    Raises:
        ShareError: `copy` is False and NumPy cannot share this memory.
        DtypeError: NumPy has no such dtype: `copy` is False, or no other dtype holds the values.
        ArrayKindError: not a tensor, or one without plain memory: sparse, nested, meta, fake, wrapped, freed.
    """
    plain = require_dense(tensor)
    target = dtypes.numpy_dtype(plain)
    obstacle = _obstacle(plain, target)
    if copy or (copy is None and obstacle):
        return copy_to_array(plain)
    if obstacle:
        found, remedy = obstacle
        kind = ShareError if dtypes.is_shared(plain) else DtypeError
        raise kind(f"{dtypes.describe(plain)} {found}, which NumPy cannot share.\n  Pass copy=None to get {remedy}.")
    # The array keeps `plain` alive, a tensor of ours alone, whose storage nobody can replace. `tensor.numpy()` would
    # keep `tensor` alive instead, and read freed memory after `tensor.data = other`.
    array = plain.numpy()
    with torch._C.DisableTorchFunctionSubclass():
        tracked = tensor.requires_grad
    if tracked or any(n > 1 and stride == 0 for n, stride in zip(array.shape, array.strides, strict=True)):
        array.flags.writeable = False
    return array


def copy_to_array(plain: torch.Tensor) -> np.ndarray[Any, Any]:
    """A C-contiguous array of its own memory with the values of a tensor that `require_dense` returned."""
    array = np.empty(tuple(plain.shape), dtypes.numpy_dtype(plain))
    torch.from_numpy(array).copy_(plain)
    return array


def require_dense(tensor: object) -> torch.Tensor:
    """The tensor, detached and without its subclass, if it is one block of memory with strides over it.

    Raises:
        ArrayKindError: it is not, with the call that makes it one.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ArrayKindError(
            f"Expected a torch.Tensor, not {type(tensor).__name__}.\n  Pass torch.as_tensor(value), or an element."
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise ArrayKindError("The parameter of a lazy module is not initialised.\n  Run the module once first.")
    # A class that takes over dispatch holds its values elsewhere: FakeTensor, DTensor, quantization wrappers.
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ArrayKindError(
            f"{type(tensor).__name__} wraps other tensors and has no memory of its own.\n"
            "  Ask it for plain ones first: DTensor.full_tensor(), NestedTensor.unbind(). A fake tensor has no values."
        )
    # Subclasses such as torchvision's tv_tensors override functions, not memory; their functions must not run here.
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach()
    if plain.is_nested:
        raise ArrayKindError("A nested tensor has no single shape.\n  Convert the tensors of tensor.unbind().")
    if plain.layout != torch.strided:
        raise ArrayKindError(
            f"{dtypes.describe(plain)} has layout {plain.layout}, which NumPy lacks.\n"
            "  Call tensor.to_dense() first, which may take far more memory."
        )
    if plain.is_meta:
        raise ArrayKindError(
            f"{dtypes.describe(plain)} is on the meta device and has no values.\n  Make it on a real device."
        )
    _require_storage(plain)
    return plain


def _require_storage(plain: torch.Tensor) -> None:
    try:
        nbytes = plain.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError) as error:
        raise ArrayKindError(
            f"{dtypes.describe(plain)} has no memory: it lives inside a transform such as torch.func.vmap or grad.\n"
            "  Convert the result of the transform, outside of it."
        ) from error
    reach = sum((length - 1) * stride for length, stride in zip(plain.shape, plain.stride(), strict=True))
    needed = (plain.storage_offset() + reach + 1) * plain.itemsize if plain.numel() else 0
    # Quantized tensors may pack two elements in a byte; their dtype is refused anyway.
    if needed > nbytes and not plain.is_quantized:
        # FSDP between steps and `untyped_storage().resize_(0)` leave it so; torch would read beyond the end.
        raise ArrayKindError(
            f"{dtypes.describe(plain)} needs {needed} bytes and its storage has {nbytes}: it was freed or shrunk.\n"
            "  Convert it while its storage is whole."
        )
    # Inside torch.func.functionalize, torch itself would give an array at address 0.
    if plain.numel() and plain.device.type == "cpu" and not plain.data_ptr() and not plain._is_zerotensor():
        raise ArrayKindError(
            f"{dtypes.describe(plain)} is a wrapper at address 0 and has no memory.\n"
            "  Convert the result of the transform, outside of it."
        )


def _obstacle(plain: torch.Tensor, target: np.dtype[Any]) -> tuple[str, str] | None:
    """Why NumPy cannot share the memory, and what a copy gives; None if it can."""
    if not dtypes.is_shared(plain):
        return "has a dtype that only torch has", f"a {target} copy with the same values"
    if plain.device.type != "cpu":
        return f"is on {plain.device}", "a copy in host memory"
    if plain.is_conj() or plain.is_neg():
        bit = "conj" if plain.is_conj() else "neg"
        return f"carries the {bit} bit (its memory holds other values)", "a copy with the bit resolved"
    if plain.numel() and plain.data_ptr() % target.alignment:
        return f"is unaligned (at address {plain.data_ptr():#x})", "an aligned copy"
    if plain._is_zerotensor():
        return "is one of autograd's zero tensors, without memory", "an array of zeros"
    return None
