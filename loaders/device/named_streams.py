"""Streams of the user's own that read a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from loaders.errors import DeviceError
from loaders.memory.registry import lease_at
from loaders.nested import leaves


def record_stream(batch: Any, stream: Any) -> None:
    """Declare that `stream` reads this batch: its memory is reused only after the work enqueued on the stream so far.

    Needed only for a stream that is current neither where the batch was handed out nor where its last view is dropped,
    and only for copies that the host does not wait for. Call it after the copy was given to the stream, while you still
    hold the batch.

        with torch.cuda.stream(mine):
            image = batch["image"].to("cuda", non_blocking=True)
        loaders.record_stream(batch, mine)

    Args:
        batch: a batch of a `DataLoader`, or any part of it: nested containers of tensors and ndarrays. Tensors on a
            device are passed on to torch's own `record_stream`; memory of any other origin needs nothing.
        stream: a `torch.Stream`, such as a `torch.cuda.Stream`.

    Raises:
        TypeError: `stream` is not a stream.
        DeviceError: torch has no `record_stream` for a tensor on the device.
    """
    if not hasattr(stream, "record_event"):
        raise TypeError(f"stream={stream!r}: expected a torch.Stream, such as torch.cuda.current_stream().")
    for _, leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu":
            try:
                leaf.record_stream(stream)
            except NotImplementedError:
                raise DeviceError(
                    f"torch has no record_stream for {leaf.layout} tensors on {leaf.device.type!r}.\n"
                    "  Hold the tensor until the stream has read it: stream.synchronize(), or an event of it."
                ) from None
            continue
        lease = lease_at(_address(leaf))
        if lease is not None:
            lease.named.add(stream)


def waits_itself(tensor: torch.Tensor) -> None:
    """Every reader of this memory holds it until the device is done: only streams that the user named need events."""
    lease = lease_at(_address(tensor))
    if lease is not None:
        lease.streams = None


def _address(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        return leaf.data_ptr() if leaf.layout is torch.strided else 0
    return int(leaf.__array_interface__["data"][0]) if isinstance(leaf, np.ndarray) else 0
