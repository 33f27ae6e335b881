"""A stream of the library's own, for copies that run in parallel with the computation of the loop."""

from __future__ import annotations

import torch


class SideStream:
    """A stream of one accelerator, over torch's device-generic interface. Any number of threads may use it at a time.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device=device)
        self.wait_for(self.current())  # a device without events shows it here

    def current(self) -> torch.Stream:
        """The calling thread's current stream."""
        return torch.accelerator.current_stream(self.device)

    def wait_for(self, stream: torch.Stream) -> None:
        """Work enqueued on this stream from now on runs after the work enqueued on `stream` so far."""
        self.stream.wait_stream(stream)

    def record_event(self) -> torch.Event:
        """An event after all work enqueued on this stream so far."""
        return self.stream.record_event()

    def entered(self) -> torch.Stream:
        """A context manager: work the thread enqueues inside goes to this stream. A new object each time.

        torch keeps the stream and device to go back to in the object that is entered. One object for several threads
        would leave a thread with the stream of another.
        """
        stream = self.stream
        return torch.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )


def open_side_stream(device: torch.device) -> SideStream | None:
    """A new stream of the device; None where torch has no streams with events for it.

    Raises:
        AcceleratorError, OutOfMemoryError: torch has them, and the device has failed.
    """
    try:
        return SideStream(device)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError):
        return None
