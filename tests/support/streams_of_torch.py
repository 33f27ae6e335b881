"""`torch.Stream`, `torch.Event` and `torch.accelerator` with the rules of an accelerator, for tensors on the CPU.

A stream is a number, each thread has a current stream, and a stream object that is entered stores the one to return to.
Work is not delayed: `simulated_device` does that. There is neither page-locked memory nor `record_stream`.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

DEVICE = torch.device("cpu", 0)


class StreamsOfTorch:
    """Replaces torch's own while the test runs.

    Attributes:
        unreached: events that are not reached yet.
        is_late: whether newly recorded events are unreached.
    """

    is_late = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = threading.local()
        numbers = itertools.count(1)
        unreached: set[Any] = set()
        self.unreached = unreached
        simulation = self

        def current() -> int:
            return getattr(state, "stream_id", 0)

        class Event:
            def __init__(self, device: Any = None, enable_timing: bool = False) -> None:
                self.stream_id: int | None = None

            def record(self, stream: Stream) -> None:
                self.stream_id = stream.stream_id
                if simulation.is_late:
                    unreached.add(self)

            def query(self) -> bool:
                return self not in unreached

            def synchronize(self) -> None:
                unreached.discard(self)

            def elapsed_time(self, end: Event) -> float:
                if not (self.query() and end.query()):
                    raise RuntimeError("Both events must be completed before calculating elapsed time.")
                return 2.0

        class Stream:
            def __init__(self, device=None, *, stream_id=None, device_index=0, device_type=0) -> None:
                assert (device is None) != (stream_id is None)
                self.stream_id = next(numbers) if stream_id is None else stream_id
                self.device_index, self.device_type = device_index, device_type

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and other.stream_id == self.stream_id

            def __hash__(self) -> int:
                return hash(self.stream_id)

            def __enter__(self) -> Stream:
                self.before, state.stream_id = current(), self.stream_id
                return self

            def __exit__(self, *_: object) -> None:
                state.stream_id = self.before

            def wait_stream(self, other: Stream) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                pass

            def record_event(self) -> Event:
                event = Event()
                event.record(self)
                return event

        def missing(*_: object) -> None:
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from this backend.")

        monkeypatch.setattr(torch.Tensor, "record_stream", missing)
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: Stream(stream_id=current()))
