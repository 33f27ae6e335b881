"""Slots: the reused memory of batches, and the leases that say when it may be used again.

A slot is the blocks of one open batch, one block per field, so that keeping the labels of an epoch does not keep its
images. The states of a block are in `loaders.memory.blocks`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loaders.errors import BufferMemoryError, SlotStateError
from loaders.memory import registry
from loaders.memory.arena import Arena, round_up
from loaders.memory.blocks import Block, BlockState
from loaders.memory.device_reads import DeviceReads, PageLocker
from loaders.memory.fork_holds import ForkHolds
from loaders.memory.leases import Lease

# What a released block is filled with under LOADERS_DEBUG=slots: a reader that outlived its lease shows at once.
DEBUG_PATTERN = 0xDB
_WINDOW = 64
# How many blocks of a size may wait for the device before `acquire` waits for one of them: a consumer that runs ahead
# of its device must not fill the memory with batches that are still to be read.
_READ_BEHIND = 6


def _caller() -> str:
    """`, taken at train.py:31`: the innermost line that is not the library's."""
    package = os.path.dirname(os.path.dirname(__file__))
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(package):
            return f", taken at {frame.filename}:{frame.lineno}"
    return ""


class SlotPool:
    """Blocks of an arena, handed out, leased and taken back. One thread at a time fills it; leases may end on any.

    A signal handler may call any method at any point. One that raises may leave a change half made: the pool is then
    not intact, and only takes back what readers still hold.

    Args:
        arena: where the blocks lie.
        ceiling_nbytes: the most bytes all blocks together may take.
        asked_nbytes: the ceiling that the user gave, or None.
        others: called with this pool; returns the bytes of the ceiling that other pools take.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        ceiling_nbytes: int,
        asked_nbytes: int | None = None,
        others: weakref.WeakMethod[Callable[[SlotPool], int]] | None = None,
    ) -> None:
        self.arena = arena
        self.ceiling_nbytes = ceiling_nbytes
        self.asked_nbytes = asked_nbytes
        self._others = others
        self.leased_nbytes = 0
        self.waited_ns = 0  # in total, for the device to finish reading blocks that are needed again
        self._free: dict[int, list[Block]] = {}
        self._leases: dict[Block, Lease] = {}
        # Blocks on their way to FREE. It is filled by finalizers, which run inside the garbage collector, on any thread
        # and at any point: they append, and never wait for the lock.
        self._ended: deque[Block] = deque()
        self._reads: DeviceReads | None = None
        self._late: list[tuple[Callable[[], bool], list[Block]]] = []
        self._keep: Counter[int] | None = None  # how many FREE blocks of each size to keep while nothing is acquired
        self._lock = threading.RLock()  # a signal handler may run while its own thread has it
        self._inside = False  # somebody is between taking and releasing the lock
        self._intact = True  # no change was interrupted
        self._fork_holds = ForkHolds()
        self._pid = os.getpid()
        self._closed = False
        if arena.shared:
            registry.shared[id(self)] = self
        self._in_use: dict[int, int] = {}
        self._peaks: dict[int, tuple[int, int]] = {}  # per size: most in use in the last window, and in this one
        self._acquired = 0
        self._debug = "slots" in os.environ.get("LOADERS_DEBUG", "").split(",")

    def page_lock(self, page_locker: PageLocker) -> None:
        """Let an accelerator read the blocks that are handed out from now on in place. For shared memory only.

        A fork would copy private pages, and the device would continue to read pages that now belong to the child.
        """
        with self._lock:
            if self._reads is None and self.arena.shared:
                self._reads = DeviceReads(page_locker, self.arena)
                registry.locked[id(self)] = self

    def acquire(self, sizes: Sequence[int], *, bounded: bool = True) -> list[Block]:
        """A slot: one FILLING block for each of `sizes` (bytes), recently used memory first.

        Args:
            bounded: False for an engine's own few pages, which the ceiling must not refuse.

        Raises:
            BufferMemoryError: the ceiling or the machine's memory is reached. Nothing was taken.
        """
        slot: list[Block] = []
        try:
            with self._lock:
                intact = self._intact
                self._inside, self._intact = True, False
                try:
                    self._keep = None
                    self._reclaim()
                    slot.extend(self._take(round_up(max(size, 1)), bounded) for size in sizes)
                    if self._reads is not None:
                        for block in slot:
                            self._reads.lock(block)
                    self._acquired += 1
                    if self._acquired % _WINDOW == 0:
                        self._trim()
                    self._intact = intact
                except BufferMemoryError:
                    self._intact = intact
                    raise
                finally:
                    self._inside = False
            if self._reads is not None:
                self._reads.tell_of_refusal()
                for pool in (*registry.alive(registry.locked), *tuple(registry.unsettled)):
                    pool.settle()  # blocks of unused pools that the device has finished reading
        except BaseException:
            self.discard(slot)
            raise
        return slot

    def finish(self, slot: Iterable[Block]) -> None:
        """Every row is written: FILLING → READY."""
        for block in slot:
            block.become(BlockState.READY)

    def abandon(self, slot: Iterable[Block]) -> None:
        """Nobody will read this slot, but somebody may still write into it: → ABANDONED until `discard`."""
        for block in slot:
            block.become(BlockState.ABANDONED)

    def discard(self, slot: Iterable[Block]) -> None:
        """Nobody reads or writes these blocks any more: → FREE. Never waits, so finalizers may call it."""
        for block in slot:
            if block.state is BlockState.LEASED:
                raise SlotStateError("a block that is leased is free when its last view dies, and cannot be discarded.")
            block.become(BlockState.FREE)
            self._ended.append(block)
        self.settle()

    def discard_after(self, is_written: Callable[[], bool], slot: Iterable[Block]) -> None:
        """Discard blocks once `is_written` returns False, possibly now; until then they are ABANDONED."""
        if not is_written():
            return self.discard(slot)
        late = list(slot)
        for block in late:
            if block.state is not BlockState.ABANDONED:
                block.become(BlockState.ABANDONED)
        self._late.append((is_written, late))

    def lease(self, slot: Sequence[Block], labels: Sequence[str]) -> list[Any]:
        """Hand READY blocks to a reader, each as the object that exports its bytes.

        A block is FREE again when its exporter is gone. Every array, tensor, view, storage, memoryview or capsule over
        the block keeps the exporter alive; there is nothing to call.

        Returns:
            One ctypes array of `block.nbytes` bytes per block: build arrays with `numpy.ndarray(…, buffer=root)`.
        """
        roots = []
        now = time.monotonic()
        where = _caller() if self._debug else ""
        streams = self._reads.current_streams() if self._reads is not None else None
        with self._lock:
            intact, self._intact = self._intact, False
            for block, label in zip(slot, labels, strict=True):
                block.become(BlockState.LEASED)
                # The root of every alias. An ndarray or tensor would be released too early: `.base` collapses, and
                # detach(), numpy() and view(dtype) make new objects over the same bytes.
                root: Any = (ctypes.c_char * block.nbytes).from_buffer(self.arena.buffer, block.offset)
                root.pool = self  # batches may outlive the loader; their memory still goes back to the machine
                lease = Lease(root, self._end)
                lease.block, lease.label, lease.since_s = block, label + where, now
                lease.address = ctypes.addressof(root)
                lease.streams = set(streams) if streams is not None else None
                lease.named = set()
                self._leases[block] = lease
                self.leased_nbytes += block.nbytes
                roots.append(root)
            self._intact = intact
        return roots

    def reclaim(self) -> None:
        """Take back the blocks whose leases have ended."""
        with self._lock:
            self._reclaim_unless_inside()

    def is_intact(self) -> bool:
        """Whether no change was interrupted, and none is in progress further down this thread's stack."""
        with self._lock:
            return self._intact and not self._inside

    @property
    def is_closed(self) -> bool:
        """Whether the pool is closed, so that nothing can be acquired."""
        return self._closed

    def is_alive(self) -> bool:
        """Whether it is not closed, or a reader still holds some of it."""
        return not self._closed or bool(self._leases)

    def trim(self, keep: Iterable[int] = ()) -> None:
        """Give FREE blocks back to the machine, except one for each size (bytes) in `keep`.

        Until the next `acquire`, blocks that become free are given back in the same way. Never waits.
        """
        self._keep = Counter(round_up(max(size, 1)) for size in keep if not self._closed)
        self.settle()

    def close(self) -> None:
        """Allow no further `acquire`: every block goes back to the machine when its last view dies."""
        self._closed = True
        self.trim()
        self.arena.close()

    def lease_at(self, address: int) -> Lease | None:
        """The lease of the block that this byte lies in."""
        leases = list(self._leases.values())
        return next((lease for lease in leases if 0 <= address - lease.address < lease.block.nbytes), None)

    @property
    def leased_count(self) -> int:
        """The number of blocks that readers hold, or held at the last reclaim."""
        return len(self._leases)

    def holders(self) -> str:
        """The blocks that readers hold, one line each: what it is, how large, for how long.

        Under LOADERS_DEBUG=slots a line also says where in the reader's code the batch was taken.
        """
        now = time.monotonic()
        leases = sorted(self._leases.values(), key=lambda lease: lease.since_s)
        return "\n".join(f"{each.label}: {each.block.nbytes:,} bytes for {now - each.since_s:.1f} s" for each in leases)

    def _take(self, size: int, bounded: bool) -> Block:
        if self._reads is not None:
            since_ns = time.perf_counter_ns()
            while not self._free.get(size) and self._reads.count(size) >= _READ_BEHIND and self._reads.wait(size):
                self._reclaim()
            self.waited_ns += time.perf_counter_ns() - since_ns
        free = self._free.get(size)
        block = free.pop() if free else self._grow(size, bounded)
        block.become(BlockState.FILLING)
        in_use = self._in_use[size] = self._in_use.get(size, 0) + 1
        before, now = self._peaks.get(size, (0, 0))
        if in_use > now:
            self._peaks[size] = (before, in_use)
        return block

    def _grow(self, size: int, bounded: bool) -> Block:
        while bounded and self._reserved_nbytes() + size > self.ceiling_nbytes:
            if not self._release_all_free():
                raise BufferMemoryError(
                    f"batch buffers would take {self._reserved_nbytes() + size:,} bytes, of which batches still "
                    f"held take {self.leased_nbytes:,}; max_buffer_bytes allows {self.ceiling_nbytes:,}.\n"
                    "  Let go of batches that are kept, copy what you keep (tensor.clone()), or raise max_buffer_bytes."
                )
        while True:
            try:
                block = Block(self.arena.reserve(size), size)
                break
            except BufferMemoryError:
                # Idle blocks of other sizes may take up the room.
                if not self._release_all_free():
                    raise
        return block

    def _reserved_nbytes(self) -> int:
        others = self._others() if self._others is not None else None
        return self.arena.reserved_nbytes + (others(self) if others is not None else 0)

    def _release_all_free(self) -> bool:
        """Give all FREE blocks back to the machine, or else one that the device reads; False if there is neither."""
        if not any(self._free.values()):
            if self._reads is None or not self._reads.wait():
                return False
            self._reclaim()
        for size in list(self._free):
            self._release_free(size, keep=0)
        return True

    def _end(self, lease: Lease, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():  # the names of this module may be gone already
            return
        block: Block | None = getattr(lease, "block", None)
        if block is None:  # an exception interrupted its making: the pool is not used again
            return
        try:
            if getattr(lease, "streams", None) is not None and self._reads is not None:
                lease.streams |= self._reads.current_streams()  # type: ignore[operator]
        finally:
            self._ended.append(block)
        self.settle()

    def settle(self) -> None:
        """Between `trim` and `acquire`: reclaim and trim, unless another call is doing so; repeat if more has ended."""
        while (keep := self._keep) is not None and self._pid == os.getpid():
            taken: list[bool] = []
            try:
                # Taken and noted in one step: an exception right after it still releases the lock.
                taken.extend(map(self._lock.acquire, (False,)))
                has_looked = taken[0] and self._reclaim_unless_inside()
            finally:
                if taken and taken[0]:
                    self._lock.release()
            if not has_looked or (not self._ended and self._keep is keep):
                return

    def _reclaim_unless_inside(self) -> bool:
        """Reclaim. Returns False in a signal handler or a finalizer that interrupted the pool's own work."""
        if self._inside:
            return False
        intact = self._intact
        self._inside, self._intact = True, False
        try:
            has_looked = self._reclaim()
            self._intact = intact
            return has_looked
        finally:
            self._inside = False

    def before_fork(self) -> None:
        """This process is about to be forked."""
        # Held across the fork: the child must not find it locked, and no batch may be handed out unnoticed.
        self._lock.acquire()
        try:
            self._reclaim_unless_inside()
        finally:
            self._fork_holds.before_fork(self._leases)

    def after_fork(self, *, in_child: bool) -> None:
        """This process was forked."""
        if in_child:
            registry.shared.pop(id(self), None)  # the parent's: nothing is taken back or given to the machine here
            self._fork_holds.after_fork_in_child()
        else:
            self._fork_holds.after_fork_in_parent()
        self._lock.release()

    def _reclaim(self) -> bool:
        """Reclaim. Returns False if that has to wait because a CUDA graph is being captured."""
        if self._reads is not None and self._reads.is_capturing():
            registry.unsettled.add(self)  # pages are still locked: the next acquire of any pool tries again
            return False
        registry.unsettled.discard(self)
        if self._late:
            for entry in [entry for entry in self._late if not entry[0]()]:
                self._late.remove(entry)
                self.discard(entry[1])
        if self._fork_holds.are_any:
            self._ended.extend(self._fork_holds.ended())
        # What other threads release meanwhile gets a round of its own: an event must follow all the work it covers.
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        if self._reads is not None:
            self._reads.new_round()
        for block in ended:
            if self._fork_holds.are_any and self._fork_holds.claim(block):
                continue
            lease = self._leases.pop(block, None)
            if lease is None:
                self._take_back(block)
                continue
            self.leased_nbytes -= block.nbytes
            if self._reads is not None and (streams := lease.named.union(lease.streams or ())):
                block.become(BlockState.DEVICE_READING)
                self._reads.begin(block, streams)
            else:
                block.become(BlockState.FREE)
                self._take_back(block)
        if self._reads is not None:
            if self._closed:
                self._reads.wait_for_all()
            for block in self._reads.ended():
                block.become(BlockState.FREE)
                self._take_back(block)
        if (keep := self._keep) is not None:
            for size in list(self._free):
                self._release_free(size, keep[size])
        return True

    def _take_back(self, block: Block) -> None:
        self._in_use[block.nbytes] -= 1
        if self._debug:
            at = ctypes.c_char.from_buffer(self.arena.buffer, block.offset)
            ctypes.memset(ctypes.addressof(at), DEBUG_PATTERN, block.nbytes)
        self._free.setdefault(block.nbytes, []).append(block)

    def _trim(self) -> None:
        # Blocks beyond the peak use of the last two windows are idle. The oldest go: the newest are in the cache.
        for size, (before, now) in list(self._peaks.items()):
            self._release_free(size, keep=max(before, now) - self._in_use.get(size, 0))
            self._peaks[size] = (now, self._in_use.get(size, 0))

    def _release_free(self, size: int, keep: int) -> None:
        free = self._free.get(size, [])
        for _ in range(len(free) - max(keep, 0)):
            block = free.pop(0)
            if self._reads is not None:
                self._reads.unlock(block)
            self.arena.release(block.offset, block.nbytes)
