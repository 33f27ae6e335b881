"""Writes `docs/conversions.md` from the dtype tables and from what the conversions actually do.

python -m loaders.bridge.table > docs/conversions.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from loaders.bridge.arrays import as_array
from loaders.bridge.dtypes import NUMPY_ONLY, SHARED, TORCH_ONLY, WIDENED
from loaders.bridge.sharing import shares_memory
from loaders.bridge.tensors import as_tensor
from loaders.errors import ConversionError

_OPENING = """\
<!-- Generated: `python -m loaders.bridge.table > docs/conversions.md`. A test compares the two. -->
# What shares memory, what copies, what is refused

`loaders.as_tensor(array, copy=None)` and `loaders.as_array(tensor, copy=None)` take `copy` as the array API does:
`False` shares or raises, `None` copies only if it must, `True` always copies. `loaders.to_numpy(tree)` always gives
copies, of everything that `as_array(tensor, copy=True)` takes. A copy is C-contiguous, writeable and in native byte
order. `ShareError` is a `ValueError`, `DtypeError` and `ArrayKindError` are a `TypeError`; the message says what to do.
"""


class _Subclass(np.ndarray[Any, Any]):
    pass


def _freed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


LAYOUTS: dict[str, Callable[[], Any]] = {
    "C-contiguous, `np.zeros((2, 3))`": lambda: np.zeros((2, 3)),
    "a slice or transpose, `x[:, ::2].T`": lambda: np.zeros((2, 4))[:, ::2].T,
    "0-d, `np.array(1.0)`": lambda: np.array(1.0),
    "`np.memmap` opened with `r+` or `c`, `np.matrix`, other subclasses": lambda: np.zeros((2, 2)).view(_Subclass),
    "negative stride on an axis of length 1, `x[:1][::-1]`": lambda: np.zeros(3)[:1][::-1],
    "overlapping windows that you made writeable": lambda: np.lib.stride_tricks.as_strided(np.zeros(4), (3, 2), (8, 8)),
    "negative strides, `x[::-1]`": lambda: np.zeros(3)[::-1],
    "broadcast (stride 0), `np.broadcast_to`, `np.broadcast_arrays`": lambda: np.broadcast_to(np.zeros(1), 3),
    "read-only, `np.memmap` opened with `r`": lambda: np.frombuffer(bytes(8)),
    "unaligned data": lambda: np.zeros(17, np.uint8)[1:].view(np.float64),
    "strides no multiple of the item size, a field of a structured array": lambda: np.zeros(2, "u1, f8")["f1"],
    "foreign byte order, `np.dtype('>f4')` on x86 and Arm": lambda: np.zeros(3, np.dtype("f4").newbyteorder()),
    "a NumPy scalar, `np.float32(1)`": lambda: np.float32(1),
    "`np.ma.MaskedArray`: torch has no mask": lambda: np.ma.masked_array([1.0], [True]),
    "a list or a Python number": lambda: [1.0],
}
"""What an array can be besides its dtype, each with an example."""

TENSORS: dict[str, Callable[[], Any]] = {
    "strided: contiguous, transposed, channels_last, sliced": lambda: torch.zeros(2, 3).T,
    "made under `torch.inference_mode`": lambda: torch.inference_mode()(torch.zeros)(3),
    "requires grad: NumPy's writes would corrupt gradients unseen": lambda: torch.zeros(3, requires_grad=True),
    "expanded (stride 0), as `np.broadcast_to` gives it": lambda: torch.zeros(1).expand(3),
    "carries the conj bit": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "carries the neg bit": lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
    "unaligned": lambda: torch.frombuffer(bytearray(17), dtype=torch.float64, offset=1),
    "sparse (any layout but strided): `.to_dense()` first": lambda: torch.eye(2).to_sparse(),
    "on the meta device": lambda: torch.zeros(3, device="meta"),
    "inside `torch.func` transforms; nested, fake, `DTensor`; freed storage": _freed,
}
"""What a tensor can be besides its dtype, each with an example; `render` adds devices, which not every machine has."""


def outcome(convert: Callable[..., Any], source: Any, copy: bool | None) -> str:
    """What `convert(source, copy=copy)` does: "shares", "shares read-only", "copies", or the error's name."""
    try:
        result = convert(source, copy=copy)
    except ConversionError as error:
        return f"`{type(error).__name__}`"
    if isinstance(source, np.generic) or not shares_memory(source, result):
        return "copies"
    return "shares read-only" if isinstance(result, np.ndarray) and not result.flags.writeable else "shares"


def render() -> str:
    """The whole of `docs/conversions.md`."""
    refused = ["`DtypeError`"] * 3
    arrays: list[tuple[str, ...]]
    arrays = [(f"`{name}`", f"`torch.{name}`", "shares", "shares", "copies", note) for name, note in SHARED.items()]
    arrays += [(name, "—", *refused, remedy) for name, remedy in NUMPY_ONLY.values()]
    tensors: list[tuple[str, ...]]
    tensors = [(f"`{name}`", f"`np.{name}`", "shares", "shares", "copies", "") for name in SHARED]
    tensors += [
        (f"`{name}`", f"`np.{wide}`", "`DtypeError`", "copies", "copies", "every value exact")
        for name, wide in WIDENED.items()
    ]
    tensors += [(f"`{name}`", "—", *refused, remedy) for name, remedy in TORCH_ONLY.items()]
    on_device = ("on a device", "`ShareError`", "copies", "copies")
    modes = ("copy=False", "copy=None", "copy=True")
    return "\n".join(
        [
            _OPENING,
            "## Dtypes: `as_tensor`\n",
            *_table(("NumPy", "torch", *modes, "note"), arrays),
            "\n`np.bool` is `np.bool_` before NumPy 2. Dtypes that other packages register are refused too.\n",
            "## Layouts: `as_tensor`\n",
            *_table(("array", *modes), [_row(as_tensor, *item) for item in LAYOUTS.items()]),
            "\n## Dtypes: `as_array`\n",
            *_table(("torch", "NumPy", *modes, "note"), tensors),
            "\n## Layouts: `as_array`\n",
            *_table(("tensor", *modes), [*(_row(as_array, *item) for item in TENSORS.items()), on_device]),
            "",
        ]
    )


def _row(convert: Callable[..., Any], name: str, example: Callable[[], Any]) -> tuple[str, ...]:
    return (name, *(outcome(convert, example(), copy) for copy in (False, None, True)))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    sys.stdout.write(render())
