"""What a slot pool needs to know about the accelerator that reads its memory. Tests substitute a simulated one."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from loaders.errors import DeviceError

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process, not only the current one


class Accelerator:
    """Page-locks memory for an accelerator, and records how far its streams have got.

    Args:
        device: of the kind that `torch.accelerator` reports here, such as "cuda:1"; without an index, the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = getattr(torch, device.type, None)  # torch.cuda, torch.xpu, …

    @property
    def can_page_lock(self) -> bool:
        """Whether torch can page-lock memory that is not its own: with CUDA, and with ROCm under the same name."""
        return hasattr(self._module, "cudart")

    def page_lock(self, address: int, nbytes: int) -> None:
        """Let the copy engine read `nbytes` at `address`, which are whole pages, in place.

        Raises:
            DeviceError: the platform or the driver refuses.
        """
        if not self.can_page_lock:
            raise DeviceError(f"torch cannot page-lock memory that is not its own for {self.device.type}.")
        cudart = self._module.cudart()
        with self._module.device(self.device):  # otherwise an unused device would be initialized for it
            status = cudart.cudaHostRegister(address, nbytes, _PORTABLE)
        if int(status) != 0:
            self._forget_last_error()
            raise DeviceError(f"cudaHostRegister says: {cudart.cudaGetErrorString(status)}.")

    def page_unlock(self, address: int) -> None:
        """Undo `page_lock`; the device must have finished reading."""
        cudart = self._module.cudart()
        with self._module.device(self.device):
            status = cudart.cudaHostUnregister(address)
        if int(status) != 0:
            self._forget_last_error()

    def current_streams(self) -> tuple[Hashable, ...]:
        """The calling thread's current stream on each device that this process may have used."""
        return tuple(torch.accelerator.current_stream(index) for index in self._used_devices())

    def is_capturing(self) -> bool:
        """Whether the calling thread is capturing a graph of work."""
        if hasattr(self._module, "is_current_stream_capturing"):
            return bool(self._module.is_current_stream_capturing())
        stream = torch.accelerator.current_stream()
        return bool(stream.is_capturing()) if hasattr(stream, "is_capturing") else False  # older torch

    def record_event(self, stream: Any) -> torch.Event:
        """An event after all work submitted to the stream so far."""
        event: torch.Event = stream.record_event()
        return event

    def _used_devices(self) -> Iterable[int]:
        count = torch.accelerator.device_count()
        # An event on a CUDA device that was never used would initialize it, and take some hundred MB of its memory. For
        # other kinds torch does not report which were used, so all of them count.
        is_used = getattr(torch._C, f"_{self.device.type}_hasPrimaryContext", None)
        if count == 1 or is_used is None:
            return range(count)
        return [index for index in range(count) if is_used(index)]

    def _forget_last_error(self) -> None:
        # CUDA reports a returned error again to the next caller that asks: torch, after its next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)


def open_accelerator() -> Accelerator | None:
    """The accelerator of this machine, which reads batches asynchronously; or None."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else Accelerator(device)


def has_pinned_memory() -> bool:
    """Whether torch has page-locked memory for the accelerator of this process.

    Raises:
        AcceleratorError, OutOfMemoryError: it has, but the device or the machine refuses to provide it.
    """
    try:
        torch.empty(1, device="cpu", pin_memory=True)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        return False
    return True
