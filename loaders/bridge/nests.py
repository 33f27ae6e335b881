"""`to_numpy`: nested outputs of a model as arrays of your own, with one wait for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.bridge import dtypes
from loaders.bridge.arrays import copy_to_array, require_dense
from loaders.errors import ConversionError
from loaders.nested import leaves, map_tree


def to_numpy(tree: Any) -> Any:
    """Every tensor in `tree` as an array you own: detach, bring to the host, convert, in one call.

    The transfers of all tensors are queued before the host waits, once per device. Arrays are C-contiguous, writeable
    and share memory with nothing, not even with each other; they are in ordinary, not in page-locked memory. bfloat16
    and float8 come as float32, complex32 as complex64; conj and neg bits are resolved.

    Args:
        tree: a tensor, or dicts, lists, tuples, namedtuples and dataclasses of them, nested in any way. Arrays are
            copied, too, keeping their class; everything else passes through as it is.

    Returns:
        The same containers with arrays in place of tensors.

    Raises:
        DtypeError: quantized or sub-byte tensors; the message names the place in the tree.
        ArrayKindError: tensors without plain memory. Sparse ones are refused rather than made dense, because that
            may take far more memory: call `.to_dense()` if you want that.
    """
    arrived: list[Any] = []
    waits: dict[torch.device, None] = {}  # a dict, for its order; one wait per device
    for path, leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor):
            host, device = _begin_transfer(_require_convertible(leaf, path))
            arrived.append(host)
            if device is not None:
                waits[device] = None
        else:
            arrived.append(leaf)
    for device in waits:
        _wait_for(device)
    results = iter(arrived)  # `map_tree` visits the leaves in the order of `leaves`
    return map_tree(lambda _: _own(next(results)), tree)


def _require_convertible(tensor: torch.Tensor, path: str) -> torch.Tensor:
    try:
        plain = require_dense(tensor)
        dtypes.numpy_dtype(plain)
    except ConversionError as error:
        raise type(error)(f'"{path}": {error}' if path else str(error)) from error.__cause__
    return plain


def _begin_transfer(plain: torch.Tensor) -> tuple[torch.Tensor, torch.device | None]:
    """Queue the copy to the host. The device is the one to wait for before reading; None if there is no wait."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != plain.device.type:
        return plain.cpu(), None  # there already, or on a device without streams, where the copy is synchronous
    # The bits first: torch would resolve them on the host right after queueing, before the bytes have arrived.
    resolved = plain.resolve_conj().resolve_neg()
    try:
        return resolved.to("cpu", non_blocking=True), plain.device
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError:  # torch has no page-locked memory for this accelerator, which it would copy into
        return resolved.cpu(), None


def _wait_for(device: torch.device) -> None:
    # An event, because it waits for the queued copies alone and, unlike streams, every accelerator can wait on one.
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    event.synchronize()


def _own(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return copy_to_array(leaf)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
