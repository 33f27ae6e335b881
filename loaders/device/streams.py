"""What the prefetcher needs of an accelerator. Tests put a simulated device in its place."""

from __future__ import annotations

import torch

from loaders.errors import DeviceError


class Streams:
    """A side stream that copies, and its waits from and to the compute stream.

    The compute stream is whichever stream is current where a method is called. `pin` works on the host; the other
    methods only enqueue, and return at once. Written over torch's device-generic `torch.Stream`, `torch.Event` and
    `torch.accelerator`; of those, CUDA has all that is needed.

    Args:
        device: an accelerator; without an index, the one that is current now.

    Raises:
        DeviceError: torch cannot use the device, or has no side streams for it.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            self.device = torch.empty(0, device=device).device  # with its index
            self._side = torch.Stream(device=self.device)
            self._compute()
        except Exception as error:
            says = str(error).strip().partition("\n")[0].rstrip(".")
            raise DeviceError(
                f"device {str(device)!r} cannot be used: torch {torch.__version__} says: {says}.\n"
                '  Install a torch build that has this device and check its driver, or pass device="cpu": '
                "the same script runs there."
            ) from error

    def _compute(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that the copy engine reads: itself if it lies there or on a device, else a copy."""
        # Sparse and jagged tensors go as they are: of pageable memory the driver has read all when it returns.
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_pinned():
            return tensor
        # Not tensor.pin_memory(): it keeps the strides, and cannot write into those of an expanded tensor.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def side_waits_for_compute(self) -> None:
        """What the side stream is given from now on runs after what the compute stream was given so far."""
        self._side.wait_stream(self._compute())

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, copied on the side stream. The source may change once a later event is reached."""
        with self._side:
            return tensor.to(self.device, non_blocking=True)

    def record_event(self) -> torch.Event:
        """An event at the end of what the side stream was given so far."""
        return self._side.record_event()

    def compute_waits_for(self, event: torch.Event) -> None:
        """What the compute stream is given from now on runs after `event`."""
        self._compute().wait_event(event)

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Once freed, the memory is reused only after what the compute stream was given until then."""
        # torch has no record_stream for sparse tensors: side_waits_for_compute alone protects those.
        if tensor.layout is torch.strided:
            tensor.record_stream(self._compute())


def open_streams(device: torch.device) -> Streams | None:
    """The streams of an accelerator, or None for the CPU, where there is nothing to copy or to wait for."""
    return None if device.type == "cpu" else Streams(device)
