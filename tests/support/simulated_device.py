"""A simulated accelerator: only code that waits gets the right bytes, and freed memory is reused at once.

There is no thread. Work is queued per stream, and every call that reaches the device first lets it run a random part of
that work: in order within a stream, in any order across streams, in bursts. Now and then streams fall asleep: they run
only what is waited for, so that one may be far behind while another is done. That is more hostile than a thread, which
shows only the interleavings that its host happens to schedule, and a seed reproduces it.

Device tensors are CPU tensors over blocks of a caching allocator. Like a kernel's arguments, queued work holds
addresses, not references: it reads and writes whatever is there when it runs.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loaders import DevicePrefetcher


@dataclass(eq=False)
class SimulatedEvent:
    device: SimulatedDevice
    stream: Stream
    reached: bool = False

    def query(self) -> bool:
        assert not self.device.captures, "operation not permitted when stream is capturing"
        self.device.let_work_run()
        return self.reached

    def synchronize(self) -> None:
        """Run only the work that this event depends on, on any stream."""
        while not self.reached:
            needed = self.stream.queue[0][0]
            if needed is not None:
                needed.synchronize()
            self.stream.run_next()


@dataclass(eq=False)
class Stream:
    """A queue of (event to wait for, work): the work at its head runs once the event is reached."""

    device: SimulatedDevice
    queue: deque[tuple[SimulatedEvent | None, Callable[[], None]]] = field(default_factory=deque)
    is_awake: bool = True

    def record_event(self) -> SimulatedEvent:
        return self.device.record(self)

    def is_runnable(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] is None or self.queue[0][0].reached)

    def run_next(self) -> None:
        self.queue.popleft()[1]()


@dataclass(eq=False)
class Block:
    """Memory of the device (of the stream it was allocated on) or page-locked memory of the host (stream None)."""

    memory: np.ndarray  # uint8 (nbytes,), never freed: only its lease ends
    stream: Stream | None
    is_leased: bool = True
    users: set[Stream] = field(default_factory=set)  # the streams named by record_stream
    storage: int = 0  # of the tensor made from it: as in torch, other storages over the same bytes are foreign memory


class SimulatedDevice:
    """Streams, events, kernels and two allocators, one for the device and one for page-locked host memory.

    Attributes:
        current: the stream that kernels are launched on, called the compute stream.
        late_reads: how many copies began to read a host block after its lease had ended.
        tracks_streams: whether the allocator heeds record_stream; some pluggable allocators do not.
        can_page_lock: whether memory that is not its own can be page-locked for it.
    """

    can_page_lock = True

    def __init__(self, seed: int, tracks_streams: bool = True) -> None:
        self.late_reads = 0
        self.captures = False  # a graph: no event may be queried meanwhile
        self.tracks_streams = tracks_streams
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self._blocks: dict[int, Block] = {}  # by address
        self._freed: deque[Block] = deque()  # leases that ended since the last call
        self._locked: dict[int, int] = {}  # address → bytes
        self._leaving: list[tuple[Block, list[SimulatedEvent]]] = []  # freed, but other streams may still use them
        self._free: list[Block] = []
        self.current = self.new_stream()

    # -- streams ---------------------------------------------------------------------------------------------------

    def new_stream(self) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def enqueue(self, stream: Stream, work: Callable[[], None], after: SimulatedEvent | None = None) -> None:
        self.let_work_run()
        stream.queue.append((after, work))

    def record(self, stream: Stream) -> SimulatedEvent:
        event = SimulatedEvent(self, stream)
        self.enqueue(stream, lambda: setattr(event, "reached", True))
        return event

    def wait(self, stream: Stream, event: SimulatedEvent) -> None:
        self.enqueue(stream, lambda: None, after=event)

    def let_work_run(self) -> None:
        """Run bursts of random length on random streams that are awake; often nothing at all."""
        self._settle_freed()
        if self._random.random() < 0.01:
            for stream in self._streams:
                stream.is_awake = self._random.random() < 0.5
        while self._random.random() < 0.4:
            stream = self._random.choice(self._streams)
            burst = self._random.choice((1, 3, 30)) if stream.is_awake else 0
            while burst and stream.is_runnable():
                stream.run_next()
                burst -= 1

    def drain(self) -> None:
        """Run everything, in any order that the waits allow."""
        while runnable := [stream for stream in self._streams if stream.is_runnable()]:
            self._random.choice(runnable).run_next()

    # -- memory ----------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Stream | None) -> torch.Tensor:
        """A tensor in device memory of `stream`, or in page-locked host memory for None; it has old bytes in it."""
        self.let_work_run()
        like = torch.empty(shape, dtype=dtype)
        block = self._take_block(like.nbytes, stream)
        array = block.memory.view(like.numpy().dtype).reshape(shape)
        # from_numpy keeps this array alive as long as any view of the storage.
        weakref.finalize(array, self._end_lease, block)
        tensor = torch.from_numpy(array)
        block.storage = tensor.untyped_storage()._cdata
        return tensor

    def page_lock(self, address: int, nbytes: int) -> None:
        """Page-lock memory that is not the device's own: from now on copies read it late."""
        self._locked[address] = nbytes

    def page_unlock(self, address: int) -> None:
        del self._locked[address]

    def is_locked(self, tensor: torch.Tensor) -> bool:
        return self._range_of(tensor) is not None

    def _range_of(self, tensor: torch.Tensor) -> int | None:
        address = tensor.data_ptr()
        return next((start for start, nbytes in self._locked.items() if start <= address < start + nbytes), None)

    def current_streams(self) -> tuple[Stream, ...]:
        return (self.current,)

    def record_event(self, stream: Stream) -> SimulatedEvent:
        return stream.record_event()

    def is_capturing(self) -> bool:
        return self.captures

    def host_blocks(self) -> list[Block]:
        return [block for block in self._blocks.values() if block.stream is None]

    def device_blocks(self) -> list[Block]:
        return [block for block in self._blocks.values() if block.stream is not None]

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        return self._blocks.get(tensor.untyped_storage().data_ptr())

    def _take_block(self, nbytes: int, stream: Stream | None) -> Block:
        for position in reversed(range(len(self._free))):  # last freed, first reused
            block = self._free[position]
            if block.stream is stream and block.memory.nbytes == nbytes:
                del self._free[position]
                block.is_leased = True
                return block
        block = Block(np.full(nbytes, 0xA5, np.uint8), stream)
        self._blocks[block.memory.ctypes.data] = block
        return block

    def _end_lease(self, block: Block) -> None:
        block.is_leased = False
        if block.stream is None:
            block.memory.fill(0xEE)  # the producer is fast: a host block is overwritten as soon as it is freed
        self._freed.append(block)

    def _settle_freed(self) -> None:
        while self._freed:
            block = self._freed.popleft()
            events = []
            for stream in block.users:
                event = SimulatedEvent(self, stream)
                stream.queue.append((None, lambda event=event: setattr(event, "reached", True)))
                events.append(event)
            block.users.clear()
            self._leaving.append((block, events))
        self._free += [block for block, events in self._leaving if all(event.reached for event in events)]
        self._leaving = [entry for entry in self._leaving if not all(event.reached for event in entry[1])]

    # -- work ------------------------------------------------------------------------------------------------------

    def launch(self, kernel: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Queue `kernel(*arrays)` on the current stream; the arrays are what the tensors hold when it runs."""
        arrays = [self._raw(tensor) for tensor in tensors]
        self.enqueue(self.current, lambda: kernel(*arrays))

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream) -> None:
        """Queue a copy. As with CUDA, pageable memory is read before the call returns."""
        block, locked = self.block_of(source), self._range_of(source)
        if block is not None:
            read = self._raw(source)
        elif locked is not None:
            # An array without an owner: like the copy engine, it keeps nothing alive.
            memory = (ctypes.c_char * source.nbytes).from_address(source.data_ptr())
            read = np.frombuffer(memory, source.detach().numpy().dtype).reshape(tuple(source.shape))
        else:
            read = source.detach().numpy().copy()
        write = self._raw(target)

        def work() -> None:
            if block is not None and block.stream is None and not block.is_leased:
                self.late_reads += 1
            if locked is not None and locked not in self._locked:
                self.late_reads += 1
                write.view(np.uint8).fill(0xEE)  # it may not even be mapped any more
            else:
                np.copyto(write, read)

        self.enqueue(stream, work)

    def _raw(self, tensor: torch.Tensor) -> np.ndarray:
        block = self.block_of(tensor)
        assert block is not None, "not memory of this device"
        assert tensor.is_contiguous()
        nbytes = tensor.nbytes
        return block.memory[:nbytes].view(tensor.detach().numpy().dtype).reshape(tuple(tensor.shape))


class SimulatedStreams:
    """`loaders.device.streams.Streams` over a SimulatedDevice."""

    copies_ahead = True
    records_streams = True

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.side = device.new_stream()
        self.page_locker = device

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("streams belong to one process and cannot be copied")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.block_of(tensor) is not None or self.device.is_locked(tensor):
            return tensor
        return self.device.empty(tuple(tensor.shape), tensor.dtype, stream=None).copy_(tensor)

    def current_stream(self) -> Stream:
        return self.device.current

    def side_waits_for(self, stream: Stream) -> None:
        self.device.wait(self.side, self.device.record(stream))

    def empty(self, nbytes: int) -> torch.Tensor:
        return self.device.empty((nbytes,), torch.uint8, stream=self.side)

    def copy(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        block = self.device.block_of(tensor)
        if block is not None and block.stream is not None:
            return tensor
        target = self.device.empty(tuple(tensor.shape), tensor.dtype, stream=self.side) if out is None else out
        self.device.copy(tensor, target, self.side)
        return target

    def record_event(self) -> SimulatedEvent:
        return self.device.record(self.side)

    def compute_waits_for(self, event: Any) -> None:
        self.device.wait(self.device.current, event)

    def record_stream(self, tensor: torch.Tensor) -> None:
        self.device.let_work_run()
        block = self.device.block_of(tensor)
        assert block is not None
        is_own = block.storage == tensor.untyped_storage()._cdata
        if is_own and self.device.tracks_streams and block.stream is not self.device.current:
            block.users.add(self.device.current)

    def stamp(self, *, side: bool) -> None:
        return None  # it measures no time

    def between_s(self, before: None, after: None) -> None:
        return None


class SimulatedReadback:
    """`loaders.outputs.collector.Readback` over a SimulatedDevice."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.side = device.new_stream()

    def of(self, tensor: torch.Tensor) -> SimulatedReadback | None:
        """Replaces `readback_of`."""
        block = self.device.block_of(tensor)
        return self if block is not None and block.stream is not None else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.device.empty(tuple(shape), dtype, stream=None)

    def wait_for_compute(self) -> None:
        self.device.wait(self.side, self.device.record(self.device.current))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        read, write = (self._bytes(tensor) for tensor in (source, target))
        block = self.device.block_of(source)

        def work() -> None:
            self.device.late_reads += block is not None and not block.is_leased
            np.copyto(write, read)

        self.device.enqueue(self.side, work)

    def record_event(self) -> SimulatedEvent:
        return self.device.record(self.side)

    def _bytes(self, tensor: torch.Tensor) -> np.ndarray:
        """The memory without a reference to its lease: the start of a block, or a copy of pageable memory."""
        assert tensor.is_contiguous()
        assert tensor.storage_offset() == 0
        block = self.device.block_of(tensor)
        if block is None:
            return np.frombuffer(tensor.numpy().tobytes(), np.uint8)
        return block.memory[: tensor.nbytes]


def prefetch(device: SimulatedDevice, loader: Any, **options: Any) -> DevicePrefetcher:
    """A prefetcher over the simulated device."""
    prefetcher = DevicePrefetcher(loader, "cpu", **options)
    prefetcher._streams = SimulatedStreams(device)
    return prefetcher
