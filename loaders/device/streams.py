"""What the prefetcher needs from an accelerator. Tests substitute a simulated device."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from loaders.device.side_stream import SideStream, open_side_stream
from loaders.errors import DeviceError
from loaders.memory.accelerator import Accelerator, has_pinned_memory
from loaders.memory.device_reads import Event, PageLocker, Reached


class Streams(Protocol):
    """A side stream that copies, and its waits from and to other streams.

    `pin` works on the host; the other methods only enqueue, and return at once.

    Attributes:
        page_locker: reports to the slots of our own loaders how far the device has read, and page-locks them if it can;
            None where copies are done when they return.
        copies_ahead: whether copies may be enqueued before the batches are asked for.
        records_streams: whether torch has `record_stream` for the device; True until the first call shows it.
    """

    page_locker: PageLocker | None
    copies_ahead: bool
    records_streams: bool

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that the copy engine reads: itself if it lies there or on a device, else a copy."""
        ...

    def current_stream(self) -> Any:
        """The compute stream: the calling thread's current stream."""
        ...

    def side_waits_for(self, stream: Any) -> None:
        """Work enqueued on the side stream from now on runs after the work enqueued on `stream` so far."""
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
        """An event after all work enqueued on the side stream so far."""
        ...

    def compute_waits_for(self, event: Any) -> None:
        """Work enqueued on the compute stream from now on runs after `event`."""
        ...

    def record_stream(self, tensor: torch.Tensor) -> None:
        """Once freed, the memory is reused only after the work enqueued on the compute stream until then."""
        ...

    def stamp(self, *, side: bool) -> Any:
        """A timed event after all work enqueued so far on the side stream, or on the compute stream.

        None where the device keeps no time.
        """
        ...

    def between_s(self, before: Any, after: Any) -> float | None:
        """The device's seconds from one stamp to a later one; None while the later one is not reached."""
        ...


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is bytes at strides: not sparse, nested or quantised, and of no class of its own."""
    is_strided = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return is_strided and not tensor.is_nested and not tensor.is_quantized


class _TorchStreams:
    """Written over torch's device-generic `torch.Stream`, `torch.Event` and `torch.accelerator`.

    A device may lack page-locked memory: copies then read the batch's own memory, which is kept until they have. It may
    also lack `record_stream` and timed events.

    Args:
        side: the stream that copies.
    """

    copies_ahead = True

    def __init__(self, side: SideStream) -> None:
        self.device = side.device
        self._side = side
        self._pins = has_pinned_memory()
        self._keeps_time = True
        self.records_streams = True
        self.page_locker: PageLocker | None = Accelerator(side.device)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        # Others are copied as they are: the driver has read all of pageable memory when it returns.
        if not self._pins or not is_plain(tensor) or tensor.device.type != "cpu" or tensor.is_pinned():
            return tensor
        # Not tensor.pin_memory(): it keeps the strides, and cannot write into those of an expanded tensor.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def current_stream(self) -> torch.Stream:
        return self._side.current()

    def side_waits_for(self, stream: torch.Stream) -> None:
        self._side.wait_for(stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        with self._side.entered():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        with self._side.entered():
            return tensor.to(self.device, non_blocking=True) if out is None else out.copy_(tensor, non_blocking=True)

    def record_event(self) -> torch.Event:
        return self._side.record_event()

    def compute_waits_for(self, event: torch.Event) -> None:
        self.current_stream().wait_event(event)

    def record_stream(self, tensor: torch.Tensor) -> None:
        # torch has none for sparse and nested tensors: the side stream waits for this one, which protects them, and all
        # tensors on devices that have none at all.
        if not self.records_streams or tensor.layout is not torch.strided or tensor.is_nested:
            return
        try:
            tensor.record_stream(self.current_stream())
        except NotImplementedError:
            self.records_streams = False

    def stamp(self, *, side: bool) -> torch.Event | None:
        if not self._keeps_time:
            return None
        try:
            event = torch.Event(device=self.device, enable_timing=True)
            event.record(self._side.stream if side else self.current_stream())
        except RuntimeError:
            self._keeps_time = False
            return None
        return event

    def between_s(self, before: torch.Event, after: torch.Event) -> float | None:
        if not (before.query() and after.query()):  # both: they may be on two streams
            return None
        try:
            return float(before.elapsed_time(after)) / 1e3
        except RuntimeError:
            self._keeps_time = False
            return None


class _NoStreams:
    """A device that torch has no streams for: everything happens in order, and copies are done when they return."""

    page_locker: PageLocker | None = None
    copies_ahead = False
    records_streams = True  # there is nothing to record

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
        return Reached()

    def compute_waits_for(self, event: Event) -> None:
        pass

    def record_stream(self, tensor: torch.Tensor) -> None:
        pass

    def stamp(self, *, side: bool) -> None:
        return None

    def between_s(self, before: None, after: None) -> None:
        return None


def open_streams(device: torch.device) -> Streams | None:
    """The streams of an accelerator, or None for the CPU, where there is nothing to copy or wait for.

    Args:
        device: without an index, the one of its kind that is current now.

    Raises:
        DeviceError: torch cannot use the device.
        AcceleratorError, OutOfMemoryError: the device has streams or page-locked memory, and they fail.
    """
    if device.type == "cpu":
        return None
    try:
        probe = torch.ones(1, device=device)
        probe.cpu()  # which a device without memory, such as "meta", refuses
        device = probe.device  # with its index
    except Exception as error:
        says = str(error).strip().partition("\n")[0]
        says += "" if says.endswith((".", "!", "?")) else "."
        raise DeviceError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} says: {says}\n"
            '  Install a torch build that has this device and check its driver, or pass device="cpu": '
            "the same script runs there."
        ) from error
    side = open_side_stream(device)
    return _NoStreams(device) if side is None else _TorchStreams(side)
