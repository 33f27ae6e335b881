"""Blocks that the device may still be reading although nobody holds them any more.

`batch.to("cuda", non_blocking=True); del batch` ends a lease before the copy has run. Torch's allocator of pinned
memory tracks its own memory only, not memory page-locked by others, so events recorded here show when a block may be
written again: on the streams that were current when the batch was handed out and when it was released, and on those
named by `loaders.record_stream`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, Protocol

from loaders.errors import DeviceError
from loaders.memory.arena import Arena
from loaders.memory.blocks import Block


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether it is reached."""
        ...

    def synchronize(self) -> None:
        """Wait until it is reached."""
        ...


class Reached:
    """An event of work that is done."""

    def query(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Return."""


class PageLocker(Protocol):
    """The accelerator, as `loaders.memory.accelerator.Accelerator` has it."""

    @property
    def can_page_lock(self) -> bool:
        """Whether torch can page-lock memory for it that is not torch's own."""
        ...

    def page_lock(self, address: int, nbytes: int) -> None:
        """Let the copy engine read this memory where it lies, or raise DeviceError."""
        ...

    def page_unlock(self, address: int) -> None:
        """Undo it."""
        ...

    def current_streams(self) -> tuple[Hashable, ...]:
        """The calling thread's."""
        ...

    def is_capturing(self) -> bool:
        """Whether the calling thread is capturing a graph of work."""
        ...

    def record_event(self, stream: Any) -> Event:
        """An event at the end of what the stream was given so far."""
        ...


class DeviceReads:
    """Page-locks a pool's blocks, and tracks when the device is done with them. Called under the pool's lock."""

    def __init__(self, page_locker: PageLocker, arena: Arena) -> None:
        self._page_locker = page_locker
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(arena.buffer))
        self._locked: set[Block] = set()
        self._reading: deque[tuple[Block, list[Event]]] = deque()
        self._events: dict[Hashable, Event] = {}  # shared by the blocks that are released together
        self._refusal: str | None = None  # not the error: its traceback would keep its frames alive
        self._is_told = False
        self._pid = os.getpid()

    def lock(self, block: Block) -> None:
        """Page-lock a block if it is not locked yet; if that is refused, batches are staged in torch's own memory."""
        if not self._page_locker.can_page_lock or self._refusal is not None or block in self._locked:
            return
        if self.is_capturing():
            return
        try:
            self._page_locker.page_lock(self._base + block.offset, block.nbytes)
            self._locked.add(block)
        except DeviceError as error:
            self._refusal = str(error)

    def tell_of_refusal(self) -> None:
        """Warn once that blocks cannot be page-locked; not under the pool's lock, as a warning may raise."""
        if self._refusal is not None and not self._is_told:
            self._is_told = True
            warnings.warn(
                f"batch buffers cannot be page-locked, so each batch is copied once more into torch's pinned memory: "
                f"{self._refusal}",
                stacklevel=3,
            )

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on this thread: events must not be queried then."""
        try:
            return self._pid == os.getpid() and self._page_locker.is_capturing()
        except Exception:  # noqa: BLE001  a device that has failed captures nothing
            return False

    def unlock(self, block: Block) -> None:
        """Page-unlock a block before its memory goes back to the machine."""
        if block in self._locked and self._pid == os.getpid():
            self._locked.remove(block)
            with contextlib.suppress(Exception):  # a failed device: the pages go back anyway
                self._page_locker.page_unlock(self._base + block.offset)

    def current_streams(self) -> set[Hashable]:
        """The streams that may be reading what is handed out or released now."""
        # A forked child must not touch the device; at the end of the interpreter nothing is reused any more.
        if self._pid != os.getpid() or sys.is_finalizing():
            return set()
        return set(self._page_locker.current_streams())

    def new_round(self) -> None:
        """Start a round: the blocks released in it share one event per stream."""
        self._events.clear()

    def begin(self, block: Block, streams: Iterable[Hashable]) -> None:
        """The block was released; the work submitted to these streams so far may read it."""
        events = []
        for stream in streams:
            if stream not in self._events:
                self._events[stream] = self._event(stream)
            events.append(self._events[stream])
        self._reading.append((block, events))

    def _event(self, stream: Any) -> Event:
        try:
            return self._page_locker.record_event(stream)
        except Exception:  # noqa: BLE001  there is no event, so wait here; a device that has failed reads nothing
            with contextlib.suppress(Exception):
                stream.synchronize()
            return Reached()

    def ended(self) -> list[Block]:
        """The blocks that the device has finished reading."""
        done = [entry for entry in self._reading if all(map(_is_reached, entry[1]))]
        for entry in done:
            self._reading.remove(entry)
        return [block for block, _ in done]

    def count(self, nbytes: int) -> int:
        """How many blocks of this size are being read."""
        return sum(block.nbytes == nbytes for block, _ in self._reading)

    def wait(self, nbytes: int | None = None) -> bool:
        """Wait for the oldest block of this size, or of any; False if there is none, or if it cannot wait now."""
        if self.is_capturing():
            return False
        for block, events in self._reading:
            if nbytes is None or block.nbytes == nbytes:
                return _wait_for(events)
        return False

    def wait_for_all(self) -> None:
        """Wait until the device reads no block any more."""
        for _, events in self._reading:
            _wait_for(events)


# Querying an event of a failed device raises the device's error. The user's own calls raise it, too; for these blocks
# it means that nothing reads them any more. The error raised while another thread captures a graph, when no thread may
# query events, is not such a failure.


def _is_reached(event: Event) -> bool:
    try:
        return event.query()
    except Exception as error:  # noqa: BLE001  see above
        return not _is_of_a_capture(error)


def _wait_for(events: Iterable[Event]) -> bool:
    """Wait for the events. Returns whether they are reached."""
    for event in events:
        try:
            event.synchronize()
        except Exception as error:  # noqa: BLE001  see above
            if _is_of_a_capture(error):
                return False
    return True


def _is_of_a_capture(error: Exception) -> bool:
    # cudaErrorStreamCaptureUnsupported and the like: all of their descriptions say "capture" or "capturing".
    return "captur" in str(error)
