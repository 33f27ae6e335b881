"""What the copies of a prefetcher cost: host time for every batch, device time by events for some of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loaders.device.streams import Streams
from loaders.report.statistics import Transfer
from loaders.timing import events

# One batch in this many is timed on the device: four events cost a few microseconds each.
_STRIDE = 8


class CopyTimer:
    """Times the copies of one iteration, and the work between them.

    Args:
        streams: of the device.
        transfer: the sums to add to.
    """

    def __init__(self, streams: Streams, transfer: Transfer) -> None:
        self.transfer = transfer
        self._streams = streams
        # Stamps of a batch: copy begins, copy ended, work begins, work ended.
        self._at_work: list[Any] | None = None
        self._worker: Any = None  # the stream that the current batch was handed to
        self._timed: deque[list[Any]] = deque()  # complete, and soon reached

    def begin_copy(self) -> list[Any] | None:
        """The copies of a batch are about to be enqueued. Its stamps; None where it is not timed."""
        is_due = self.transfer.batches % _STRIDE == 0
        self.transfer.batches += 1
        stamp = self._streams.stamp(side=True) if is_due else None
        return None if stamp is None else [stamp]

    def end_copy(self, stamps: list[Any] | None, since_ns: int, nbytes: int) -> None:
        """The copies are enqueued, `nbytes` in all; the host began at `since_ns`."""
        if stamps is not None:
            stamps.append(self._streams.stamp(side=True))
        now = time.perf_counter_ns()
        self.transfer.nbytes += nbytes
        self.transfer.enqueue_ns += now - since_ns
        if events.traces:
            events.add("consumer", "", "start copy", since_ns, now, bytes=nbytes)

    def hand_out(self, stamps: list[Any] | None) -> None:
        """The compute stream starts on a batch."""
        self._at_work = None
        if stamps is not None:
            self._worker = self._streams.current_stream()
            self._at_work = [*stamps, self._streams.stamp(side=False)]

    def is_worked_on(self) -> None:
        """All work on the batch that was handed out last is enqueued on the compute stream."""
        stamps, self._at_work = self._at_work, None
        if stamps is not None and self._streams.current_stream() == self._worker:  # stamps of two streams give no time
            stamps.append(self._streams.stamp(side=False))
            if None not in stamps:
                self._timed.append(stamps)
        while self._timed:
            begun, ended, fed, done = self._timed[0]
            copy_s, compute_s = self._streams.between_s(begun, ended), self._streams.between_s(fed, done)
            if copy_s is None or compute_s is None:
                return
            self._timed.popleft()
            self.transfer.timed += 1
            self.transfer.copy_ns += int(copy_s * 1e9)
            self.transfer.compute_ns += int(compute_s * 1e9)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block the host waits for the device."""
        since_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            now = time.perf_counter_ns()
            self.transfer.wait_ns += now - since_ns
            if events.traces:
                events.add("consumer", "", "wait for the device", since_ns, now)
