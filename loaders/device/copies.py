"""The batches that are being copied to the device, and the memory they are copied from and to."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # public, according to its documentation

from loaders.device.copy_timer import CopyTimer
from loaders.device.named_streams import waits_itself
from loaders.device.streams import Streams, is_plain
from loaders.errors import SlotStateError
from loaders.memory.device_reads import Event
from loaders.nested import map_tree
from loaders.report.statistics import Transfer
from loaders.timing import events


class Copies:
    """The copies of one iteration: first in, first handed out.

    Args:
        streams: of the device.
        depth: how many batches are under way besides the one that is handed out.
        buffers: the memory that the batches are copied to; None for new memory each time.
        transfer: sums of what this costs.
        readers: the streams that batches were handed to since the side stream was opened; grows.
    """

    def __init__(
        self,
        streams: Streams,
        depth: int,
        buffers: StaticBuffers | None = None,
        transfer: Transfer | None = None,
        readers: set[Any] | None = None,
    ) -> None:
        self._nbytes = 0  # of the batch whose copies are being enqueued
        self.timer = CopyTimer(streams, transfer or Transfer())
        self._streams = streams
        self._depth = depth
        self._buffers = buffers
        self._readers = set() if readers is None else readers
        self._ahead: deque[Copied] = deque()  # on the device, and not yet handed out
        self._sources: deque[_Source] = deque()  # what the device may still read

    def __len__(self) -> int:
        return len(self._ahead)

    @property
    def newest_note(self) -> Any:
        """The note of the batch whose copy was started last; None if that was handed out."""
        return self._ahead[-1].note if self._ahead else None

    def start(self, source: Any, note: Any) -> None:
        """Enqueue the copy of a batch, and keep the batch until the device has read it.

        Raises:
            SlotStateError: the static buffers whose turn it is are still in use.
        """
        since_ns, self._nbytes = time.perf_counter_ns(), 0
        source = map_tensors(self._pinned, source)
        # The copies may land in memory that the consumer has freed, and whoever wrote the source may not be done: the
        # kernels of the current stream run first, and those of all streams that batches were handed to. With
        # `record_stream` torch handles the latter itself, but not every device or allocator has it.
        self._wait_for_readers()
        target = self._buffers.next_set() if self._buffers is not None else None
        stamps = self.timer.begin_copy()
        # Kept before the first copy: it is read from then on, whatever happens to this call.
        reading = _Source(source, since_ns)
        self._sources.append(reading)
        try:
            batch = map_tensors(lambda tensor: self._copy(tensor, target), source)
        finally:  # also when the copy of a later tensor fails: those of the earlier ones are under way
            reading.nbytes = self._nbytes
            reading.event = self._streams.record_event()
            for tensor in tensors_of(source):
                waits_itself(tensor)
        self.timer.end_copy(stamps, since_ns, self._nbytes)
        self._ahead.append(Copied(batch, reading.event, target, note, stamps))
        self.release_sources(keep=self._depth + 1)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._streams.pin(_without_gaps(tensor))
        if pinned is not tensor:
            self.timer.transfer.again_nbytes += tensor.nbytes
        return pinned

    def _copy(self, tensor: torch.Tensor, target: _BufferSet | None) -> torch.Tensor:
        span = _span(tensor)
        self._nbytes += tensor.nbytes if span is not None else 0
        if span is None:
            return self._streams.copy(tensor)
        # One run of bytes, viewed with the same strides on the device: torch would make the elements of a view
        # contiguous on the host first.
        run = tensor.as_strided((span,), (1,))
        out = target.place(run, self._streams) if target is not None else None
        return self._streams.copy(run, out).as_strided(tensor.shape, tensor.stride())

    def first(self) -> Copied:
        """The oldest batch, safe to read on the current stream from here on and to free at any time."""
        copied = self._ahead[0]
        self._readers.add(self._streams.current_stream())
        self._streams.compute_waits_for(copied.event)
        self.timer.hand_out(copied.stamps)
        # torch does not own what is handed out of static buffers: it owns the buffers, which may be freed when the last
        # iterator and the last batch are gone.
        memory = copied.target.buffers if copied.target is not None else []
        for tensor in (*tensors_of(copied.batch), *memory):
            self._streams.record_stream(tensor)
        return copied

    def drop_taken(self) -> None:
        """Forget the oldest batch if it was handed out."""
        if self._ahead and self._ahead[0].batch is None:
            self._ahead.popleft()

    def close(self) -> None:
        """Wait until nothing is being read any more, and release everything."""
        self._ahead.clear()
        self.release_sources(keep=0)
        if not self._streams.records_streams:  # then the next user of the side stream, and of its freed memory, waits
            self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        for stream in {self._streams.current_stream(), *self._readers}:
            self._streams.side_waits_for(stream)

    def release_sources(self, keep: int) -> None:
        """Drop the source batches that were read; while more than `keep` remain, wait for the device."""
        while self._sources:
            source = self._sources[0]
            if source.event is None:  # left by an interrupted call
                source.event = self._streams.record_event()
            # The event, not the tensor, tells that the device has finished reading.
            if not source.event.query():
                if len(self._sources) <= keep:
                    return
                with self.timer.waiting():
                    source.event.synchronize()
            self._sources.popleft()
            if events.traces:
                events.add("device", "", "copy", source.since_ns, time.perf_counter_ns(), bytes=source.nbytes)


@dataclass
class Copied:
    """A batch on the device: the event of its arrival, its static buffers, its note, the stamps of its copy."""

    batch: Any  # None once it is handed out
    event: Event
    target: _BufferSet | None
    note: Any
    stamps: list[Any] | None
    tries: int = 0  # attempts to hand it out


@dataclass
class _Source:
    """A batch that the device reads until the event."""

    batch: Any
    since_ns: int
    nbytes: int = 0
    event: Event | None = None


class StaticBuffers:
    """Device memory that batches are copied into in turn, one set of buffers after the other.

    A set is written again `count` batches later. A caller that still holds a part of its batch then would see it
    change: that is an error. The lease is like that of a slot: what is handed out is made over an exporter of the
    buffer's bytes, which dies with the last view.
    """

    def __init__(self, count: int) -> None:
        self._sets = deque(_BufferSet() for _ in range(count))  # the next to be written comes first
        self._number = 0

    def next_set(self) -> _BufferSet:
        """The set to copy the next batch into, once the streams that batches were handed to are done with it.

        Raises:
            SlotStateError: the batch in it is still held.
        """
        latest = self._sets[-1]
        if self._number and not latest.is_held():  # an interrupted call took it, and nothing is in it
            latest.begin(latest.number)
            return latest
        chosen = self._sets[0]
        if chosen.is_held():
            raise SlotStateError(
                f"batch {chosen.number} of a prefetcher with static=True is still held, and its memory is needed for "
                f"batch {self._number}.\n  Such a batch is valid until the next one is asked for: clone what you "
                "keep for longer, or use static=False."
            )
        self._sets.rotate(-1)
        chosen.begin(self._number)
        self._number += 1
        return chosen


class _BufferSet:
    """The buffers of one batch, one for each of its tensors, grown where a batch needs more."""

    def __init__(self) -> None:
        self.number = 0
        self.buffers: list[torch.Tensor] = []  # uint8 (bytes,) each
        self._leases: list[weakref.ref[torch.UntypedStorage]] = []

    def is_held(self) -> bool:
        """Whether a view of its last batch is alive."""
        return any(lease() is not None for lease in self._leases)

    def begin(self, number: int) -> None:
        """Start on the next batch."""
        self.number = number
        self._leases.clear()

    def place(self, run: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Where the next run of the batch is copied to: as many elements of its dtype on the device."""
        place = len(self._leases)
        if place == len(self.buffers):
            self.buffers.append(streams.empty(run.nbytes))
        elif self.buffers[place].nbytes < run.nbytes:
            self.buffers[place] = streams.empty(run.nbytes)
        # Through DLPack each batch has a storage of its own over the buffer, which dies with its last view.
        view: torch.Tensor = from_dlpack(to_dlpack(self.buffers[place][: run.nbytes]))
        self._leases.append(weakref.ref(view.untyped_storage()))
        return view.view(run.dtype)


def _span(tensor: torch.Tensor) -> int | None:
    """Elements from the first to the last one in memory, both counted; None where only a plain copy is possible."""
    if not is_plain(tensor) or tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.requires_grad:
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if most of the memory that it spans is not its own, or if elements share memory."""
    span = _span(tensor)
    return tensor if span is None or tensor.numel() <= span <= 2 * tensor.numel() else tensor.contiguous()


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """A tree like `tree` with `fn` applied to the tensors in it that move to a device."""

    def on_leaf(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):  # torch wants its batch_sizes on the CPU, wherever the rest is
            order = [None if each is None else fn(each) for each in (leaf.sorted_indices, leaf.unsorted_indices)]
            return leaf._replace(data=fn(leaf.data), sorted_indices=order[0], unsorted_indices=order[1])
        return fn(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return map_tree(on_leaf, tree, is_leaf=lambda node: isinstance(node, PackedSequence))


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a batch that move to a device."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found
