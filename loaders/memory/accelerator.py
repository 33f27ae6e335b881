"""What a slot pool must know of the accelerator that reads its memory. Tests put a simulated one in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch

from loaders.errors import DeviceError

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process, not only the current one


class Accelerator:
    """Page-locks memory for an accelerator, and tells how far its streams are.

    Args:
        device: such as "cuda:1"; without an index the one that is current.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def page_lock(self, address: int, nbytes: int) -> None:
        """Let the copy engine read `nbytes` at `address`, whole pages, where they lie.

        Raises:
            DeviceError: the platform or the driver refuses.
        """
        if self.device.type != "cuda":
            raise DeviceError(f"torch cannot page-lock memory that is not its own for {self.device.type}.")
        cudart = _cudart()
        with torch.cuda.device(self.device):  # or a device that nobody uses would be opened for it
            status = cudart.cudaHostRegister(address, nbytes, _PORTABLE)
        if int(status) != 0:
            _forget_last_error()
            raise DeviceError(f"cudaHostRegister says: {cudart.cudaGetErrorString(status)}.")

    def page_unlock(self, address: int) -> None:
        """Undo `page_lock`; the device must have finished reading."""
        cudart = _cudart()
        with torch.cuda.device(self.device):
            status = cudart.cudaHostUnregister(address)
        if int(status) != 0:
            _forget_last_error()

    def current_streams(self) -> tuple[Hashable, ...]:
        """The calling thread's current stream on each device that this process has used."""
        return tuple(torch.accelerator.current_stream(index) for index in self._used_devices())

    def is_capturing(self) -> bool:
        """Whether the calling thread is capturing a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def record_event(self, stream: Any) -> torch.Event:
        """An event at the end of what the stream was given so far."""
        event: torch.Event = stream.record_event()
        return event

    def _used_devices(self) -> list[int]:
        count = torch.accelerator.device_count()
        is_used = getattr(torch._C, "_cuda_hasPrimaryContext", None) if self.device.type == "cuda" else None
        if count == 1 or is_used is None:
            return [torch.accelerator.current_device_index()]
        # An event on a device that was never used would open it, and take some hundred MB of its memory.
        return [index for index in range(count) if is_used(index)]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's


def open_accelerator() -> Accelerator | None:
    """The accelerator of this machine that reads memory which is not torch's: CUDA, or None."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Accelerator(device) if device is not None and device.type == "cuda" else None


def _forget_last_error() -> None:
    # CUDA keeps an error that was returned once more for whoever asks next: torch, after its next kernel.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
