"""Blocks that the device may still be reading, although nobody holds them any more.

`batch.to("cuda", non_blocking=True); del batch` ends a lease while the copy is still to come. Torch's allocator of
pinned memory tracks its own memory only, not what was page-locked from outside, so events of ours tell when a block may
be written again: on the streams that were current when the batch was handed out and when it was let go, and on those
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

from loaders.batching.arena import Arena
from loaders.batching.blocks import Block
from loaders.errors import DeviceError


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether it is reached."""
        ...

    def synchronize(self) -> None:
        """Wait until it is reached."""
        ...


class Reader(Protocol):
    """The accelerator, as `loaders.accelerator.Accelerator` has it."""

    def page_lock(self, address: int, nbytes: int) -> None:
        """Let the copy engine read this memory where it lies, or raise DeviceError."""
        ...

    def page_unlock(self, address: int) -> None:
        """Undo it."""
        ...

    def current_streams(self) -> tuple[Hashable, ...]:
        """The calling thread's."""
        ...

    def record_event(self, stream: Any) -> Event:
        """An event at the end of what the stream was given so far."""
        ...


class DeviceReads:
    """Page-locks the blocks of a pool, and says when the device is done with them. The pool calls it under its lock."""

    def __init__(self, reader: Reader, arena: Arena) -> None:
        self._reader = reader
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(arena.buffer))
        self._locked: set[Block] = set()
        self._reading: deque[tuple[Block, list[Event]]] = deque()
        self._events: dict[Hashable, Event] = {}  # of the blocks that are let go together
        self._refused = False
        self._pid = os.getpid()

    def lock(self, block: Block) -> None:
        """Page-lock a new block; where that is refused, say so once, and batches are staged in torch's own memory."""
        if self._refused:
            return
        try:
            self._reader.page_lock(self._base + block.offset, block.nbytes)
            self._locked.add(block)
        except DeviceError as error:
            self._refused = True
            warnings.warn(
                f"batch buffers cannot be page-locked, so each batch is copied once more into torch's pinned memory: "
                f"{error}",
                stacklevel=2,
            )

    def unlock(self, block: Block) -> None:
        """Before its memory goes back to the machine."""
        if block in self._locked and self._pid == os.getpid():
            self._locked.remove(block)
            self._reader.page_unlock(self._base + block.offset)

    def current_streams(self) -> set[Hashable]:
        """Those that may be reading what is handed out or let go here and now."""
        # A forked child must not touch the device; at the end of the interpreter nothing is reused any more.
        if self._pid != os.getpid() or sys.is_finalizing():
            return set()
        return set(self._reader.current_streams())

    def new_round(self) -> None:
        """Blocks that were let go before now may share events from here on."""
        self._events.clear()

    def begin(self, block: Block, streams: Iterable[Hashable]) -> None:
        """The block was let go; what these streams were given so far may read it."""
        for stream in streams:
            if stream not in self._events:
                self._events[stream] = self._reader.record_event(stream)
        self._reading.append((block, [self._events[stream] for stream in streams]))

    def ended(self) -> list[Block]:
        """The blocks that were read."""
        done = [entry for entry in self._reading if all(event.query() for event in entry[1])]
        for entry in done:
            self._reading.remove(entry)
        return [block for block, _ in done]

    def count(self, nbytes: int) -> int:
        """How many blocks of this size are being read."""
        return sum(block.nbytes == nbytes for block, _ in self._reading)

    def wait(self, nbytes: int | None = None) -> bool:
        """Wait for the oldest block of this size, or of any; False if there is none."""
        for block, events in self._reading:
            if nbytes is None or block.nbytes == nbytes:
                for event in events:
                    event.synchronize()
                return True
        return False

    def wait_for_all(self) -> None:
        """Wait until nothing is read any more. A device that has failed reads nothing."""
        for _, events in self._reading:
            for event in events:
                with contextlib.suppress(Exception):
                    event.synchronize()
