"""What the prefetcher needs of an accelerator. Tests put a simulated device in its place."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from loaders.errors import DeviceError
from loaders.memory.accelerator import Accelerator
from loaders.memory.device_reads import Event, PageLocker


class Streams(Protocol):
    """A side stream that copies, and its waits from and to other streams.

    `pin` works on the host; the other methods only enqueue, and return at once.

    Attributes:
        reader: what page-locks the slots of our own loaders, or None where that cannot be done.
    """

    reader: PageLocker | None

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that the copy engine reads: itself if it lies there or on a device, else a copy."""
        ...

    def current_stream(self) -> Any:
        """The compute stream: whichever the calling thread gives its work to."""
        ...

    def side_waits_for(self, stream: Any) -> None:
        """What the side stream is given from now on runs after what `stream` was given so far."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """uint8 (nbytes,) on the device, in memory that belongs to the side stream."""
        ...

    def copy(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor on the device, copied on the side stream, into `out` where that is given.

        The source may change once a later event is reached.
        """
        ...

    def record_event(self) -> Event:
        """An event at the end of what the side stream was given so far."""
        ...

    def compute_waits_for(self, event: Any) -> None:
        """What the compute stream is given from now on runs after `event`."""
        ...

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Once freed, the memory is reused only after what the compute stream was given until then."""
        ...

    def stamp(self, *, side: bool) -> Any:
        """An event with a time at the end of what the side stream, else the compute stream, was given so far.

        None where the device keeps no time.
        """
        ...

    def between_s(self, before: Any, after: Any) -> float | None:
        """The device's seconds from one stamp to a later one; None while that is not reached."""
        ...


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is bytes at strides: not sparse, nested or quantised, and of no class of its own."""
    is_strided = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return is_strided and not tensor.is_nested and not tensor.is_quantized


class _TorchStreams:
    """Written over torch's device-generic `torch.Stream`, `torch.Event` and `torch.accelerator`.

    Args:
        device: with its index.

    Raises:
        RuntimeError, NotImplementedError: torch has no streams for this device, or no memory that they read late.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._keeps_time = True
        self._side = torch.Stream(device=device)
        self.current_stream()
        # Elsewhere torch offers nothing to page-lock memory with that is not its own.
        self.reader: PageLocker | None = Accelerator(device) if device.type == "cuda" else None
        torch.empty(1, device="cpu", pin_memory=True)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        # Others go as they are: of pageable memory the driver has read all when it returns.
        if not is_plain(tensor) or tensor.device.type != "cpu" or tensor.is_pinned():
            return tensor
        # Not tensor.pin_memory(): it keeps the strides, and cannot write into those of an expanded tensor.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def current_stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def side_waits_for(self, stream: torch.Stream) -> None:
        self._side.wait_stream(stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        with self._side:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        with self._side:
            return tensor.to(self.device, non_blocking=True) if out is None else out.copy_(tensor, non_blocking=True)

    def record_event(self) -> torch.Event:
        return self._side.record_event()

    def compute_waits_for(self, event: torch.Event) -> None:
        self.current_stream().wait_event(event)

    def record_stream(self, tensor: torch.Tensor) -> None:
        # torch has none for sparse and nested tensors: that the side stream waits for this one protects those.
        if tensor.layout is torch.strided and not tensor.is_nested:
            tensor.record_stream(self.current_stream())

    def stamp(self, *, side: bool) -> torch.Event | None:
        if not self._keeps_time:
            return None
        try:
            event = torch.Event(device=self.device, enable_timing=True)
            event.record(self._side if side else self.current_stream())
        except (RuntimeError, NotImplementedError):
            self._keeps_time = False
            return None
        return event

    def between_s(self, before: torch.Event, after: torch.Event) -> float | None:
        return float(before.elapsed_time(after)) / 1e3 if after.query() else None


class _NoStreams:
    """A device that torch has no streams for: everything happens in order, and copies are done when they return."""

    reader: PageLocker | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def current_stream(self) -> None:
        return None

    def side_waits_for(self, stream: None) -> None:
        pass

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.to(self.device) if out is None else out.copy_(tensor)

    def record_event(self) -> Event:
        return _Reached()

    def compute_waits_for(self, event: Event) -> None:
        pass

    def record_stream(self, tensor: torch.Tensor) -> None:
        pass

    def stamp(self, *, side: bool) -> None:
        return None

    def between_s(self, before: None, after: None) -> None:
        return None


class _Reached:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def open_streams(device: torch.device) -> Streams | None:
    """The streams of an accelerator, or None for the CPU, where there is nothing to copy or to wait for.

    Args:
        device: without an index, the one of its kind that is current now.

    Raises:
        DeviceError: torch cannot use the device.
        RuntimeError: what CUDA says against memory that is page-locked.
    """
    if device.type == "cpu":
        return None
    try:
        probe = torch.ones(1, device=device)
        probe.cpu()  # which a device without memory, such as "meta", refuses
        device = probe.device  # with its index
    except Exception as error:
        says = str(error).strip().partition("\n")[0].rstrip(".")
        raise DeviceError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} says: {says}.\n"
            '  Install a torch build that has this device and check its driver, or pass device="cpu": '
            "the same script runs there."
        ) from error
    try:
        return _TorchStreams(device)
    except (RuntimeError, NotImplementedError):
        if device.type == "cuda":  # which has them: this is an error of the device's
            raise
    return _NoStreams(device)
