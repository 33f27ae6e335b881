"""What the copies of a prefetcher cost: the host by its clock, the device by its own events, now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loaders.device.streams import Streams
from loaders.report.statistics import Transfer
from loaders.timing import events

# Of so many batches one is timed on the device: four events cost a few microseconds each.
_STRIDE = 8


class Meter:
    """Measures the copies of one iteration.

    Args:
        streams: of the device.
        transfer: the sums to add to.
    """

    def __init__(self, streams: Streams, transfer: Transfer) -> None:
        self.transfer = transfer
        self._streams = streams
        # Stamps of batches on their way: [copy begins, copy ended, work begins, work ended]; None for those untimed.
        self._ahead: deque[list[Any] | None] = deque()
        self._at_work: list[Any] | None = None
        self._timed: deque[list[Any]] = deque()  # complete, and soon reached

    def begin_copy(self) -> None:
        """The copies of a batch are about to be enqueued."""
        is_due = self.transfer.batches % _STRIDE == 0
        stamp = self._streams.stamp(side=True) if is_due else None
        self._ahead.append(None if stamp is None else [stamp])
        self.transfer.batches += 1

    def end_copy(self, since_ns: int, nbytes: int) -> None:
        """They are enqueued, `nbytes` in all; the host has been at it since then."""
        if (stamps := self._ahead[-1]) is not None:
            stamps.append(self._streams.stamp(side=True))
        now = time.perf_counter_ns()
        self.transfer.nbytes += nbytes
        self.transfer.enqueue_ns += now - since_ns
        if events.traces:
            events.add("consumer", "", "start copy", since_ns, now, bytes=nbytes)

    def hand_out(self) -> None:
        """The compute stream goes on with the oldest batch."""
        stamps = self._at_work = self._ahead.popleft()
        if stamps is not None:
            stamps.append(self._streams.stamp(side=False))

    def is_worked_on(self) -> None:
        """The compute stream was given all the work there is with the batch that was handed out last."""
        stamps, self._at_work = self._at_work, None
        if stamps is not None:
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
        """The host waits for the device meanwhile."""
        since_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            now = time.perf_counter_ns()
            self.transfer.wait_ns += now - since_ns
            if events.traces:
                events.add("consumer", "", "wait for the device", since_ns, now)
