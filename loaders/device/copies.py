"""The batches that are on their way to the device, and the memory they go from and to."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # public, says its page

from loaders.device.meter import Meter
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
        depth: how many batches are on their way beside the one that is handed out.
        buffers: the memory that the batches are copied to; None for new memory each time.
        transfer: sums of what this costs.
    """

    def __init__(
        self, streams: Streams, depth: int, buffers: StaticBuffers | None, transfer: Transfer | None = None
    ) -> None:
        self._nbytes = 0  # of the batch whose copies are being enqueued
        self.meter = Meter(streams, transfer or Transfer())
        self._streams = streams
        self._depth = depth
        self._buffers = buffers
        # Batches on the device that are not yet handed out: when they arrive, their buffers, what goes with them.
        self._ahead: deque[tuple[Any, Event, _BufferSet | None, Any]] = deque()
        # What the device may still read, since when, and how many bytes.
        self._sources: deque[tuple[Any, Event, int, int]] = deque()

    def __len__(self) -> int:
        return len(self._ahead)

    def start(self, source: Any, note: Any) -> None:
        """Enqueue the copy of a batch, and keep the batch until the device has read it.

        Raises:
            SlotStateError: the static buffers whose turn it is are still in use.
        """
        since_ns, self._nbytes = time.perf_counter_ns(), 0
        source = map_tensors(self._pinned, source)
        # The copies may land in memory that the consumer has freed: the kernels that read it there go first.
        self._streams.side_waits_for(self._streams.current_stream())
        target = self._buffers.next_set(self._streams) if self._buffers is not None else None
        self.meter.begin_copy()
        try:
            batch = map_tensors(lambda tensor: self._copy(tensor, target), source)
        finally:  # also when the copy of a later tensor fails: those of the earlier ones are under way
            event = self._streams.record_event()
            self._sources.append((source, event, since_ns, self._nbytes))
            for tensor in tensors_of(source):
                waits_itself(tensor)
        self.meter.end_copy(since_ns, self._nbytes)
        self._ahead.append((batch, event, target, note))
        self.release_sources(keep=self._depth + 1)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._streams.pin(_without_gaps(tensor))
        if pinned is not tensor:
            self.meter.transfer.again_nbytes += tensor.nbytes
        return pinned

    def _copy(self, tensor: torch.Tensor, target: _BufferSet | None) -> torch.Tensor:
        span = _span(tensor)
        self._nbytes += tensor.nbytes if span is not None else 0
        if span is None:
            return self._streams.copy(tensor)
        # One run of bytes, seen with the same strides on the other side: torch would make the elements of a view
        # contiguous on the host first.
        run = tensor.as_strided((span,), (1,))
        out = target.place(run, self._streams) if target is not None else None
        return self._streams.copy(run, out).as_strided(tensor.shape, tensor.stride())

    def hand_out(self) -> tuple[Any, Any]:
        """The oldest batch, safe to read on the current stream from here on and to free at any time; and its note."""
        batch, event, target, note = self._ahead.popleft()
        self._streams.compute_waits_for(event)
        self.meter.hand_out()
        if target is not None:
            target.stream = self._streams.current_stream()
        for tensor in tensors_of(batch):
            self._streams.record_stream(tensor)
        return batch, note

    def close(self) -> None:
        """Wait until nothing is read any more, and let everything go."""
        self._ahead.clear()
        self.release_sources(keep=0)

    def release_sources(self, keep: int) -> None:
        """Drop the source batches that were read; while more than `keep` remain, wait for the device."""
        while self._sources and ((is_read := self._sources[0][1].query()) or len(self._sources) > keep):
            # The event, not the tensor, tells that the device has finished reading.
            _, event, since_ns, nbytes = self._sources[0]
            if not is_read:
                with self.meter.waiting():
                    event.synchronize()
            self._sources.popleft()
            if events.traces:
                events.add("device", "", "copy", since_ns, time.perf_counter_ns(), bytes=nbytes)


class StaticBuffers:
    """Device memory that batches are copied into in turn, one set of buffers after the other.

    A set is written again `count` batches later. Whoever still holds a part of its batch then would see it change:
    that is an error. The lease is like that of a slot: what is handed out is made over an exporter of the buffer's
    bytes, which dies with the last view.
    """

    def __init__(self, count: int) -> None:
        self._sets = deque(_BufferSet() for _ in range(count))  # the next to be written comes first
        self._number = 0

    def next_set(self, streams: Streams) -> _BufferSet:
        """The set to copy the next batch into, once the stream that its last batch was handed to is done with it.

        Raises:
            SlotStateError: somebody still holds that batch.
        """
        chosen = self._sets[0]
        if chosen.is_held():
            raise SlotStateError(
                f"batch {chosen.number} of a prefetcher with static=True is still held, and its memory is needed for "
                f"batch {self._number}.\n  Such a batch is valid until the next one is asked for: clone what you "
                "keep for longer, or use static=False."
            )
        self._sets.rotate(-1)
        if chosen.stream is not None:
            streams.side_waits_for(chosen.stream)
        chosen.begin(self._number)
        self._number += 1
        return chosen


class _BufferSet:
    """The buffers of one batch, one for each of its tensors, grown where a batch needs more."""

    def __init__(self) -> None:
        self.number = 0
        self.stream: Any = None
        self._buffers: list[torch.Tensor] = []
        self._leases: list[weakref.ref[torch.UntypedStorage]] = []

    def is_held(self) -> bool:
        """Whether a view of its last batch lives."""
        return any(lease() is not None for lease in self._leases)

    def begin(self, number: int) -> None:
        """The next batch goes in here."""
        self.number = number
        self._leases.clear()

    def place(self, run: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Where the next run of the batch is copied to: as many elements of its dtype on the device."""
        place = len(self._leases)
        if place == len(self._buffers):
            self._buffers.append(streams.empty(run.nbytes))
        elif self._buffers[place].nbytes < run.nbytes:
            self._buffers[place] = streams.empty(run.nbytes)
        # Through DLPack each batch has a storage of its own over the buffer, which dies with its last view.
        view: torch.Tensor = from_dlpack(to_dlpack(self._buffers[place][: run.nbytes]))
        self._leases.append(weakref.ref(view.untyped_storage()))
        return view.view(run.dtype)


def _span(tensor: torch.Tensor) -> int | None:
    """How many elements lie between the first and the last one, both counted; None where a plain copy has to do."""
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
