"""The real pool against a simple model: whatever the order of events, no byte that is in use changes."""

import ctypes
import itertools
from collections import Counter

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from loaders.errors import BufferMemoryError
from loaders.memory.arena import PAGE, Arena
from loaders.memory.blocks import BlockState
from loaders.memory.slots import SlotPool

CEILING = 24 * PAGE
SIZES = st.lists(st.sampled_from([1, PAGE, 2 * PAGE, 3 * PAGE - 5, 5 * PAGE]), min_size=1, max_size=3)


class SlotPools(RuleBasedStateMachine):
    """Slots are acquired, written, leased, viewed, abandoned and discarded in every order that the states allow.

    Every block is filled with a stamp of its own when it is acquired, and again by late writers. The model: the state
    of each block, and per leased block how many views of it are alive.
    """

    filling = Bundle("filling")  # slots: (blocks, stamps)
    ready = Bundle("ready")
    abandoned = Bundle("abandoned")
    views = Bundle("views")  # [block, stamp, alias]: emptied by drop

    shared = False

    def __init__(self):
        super().__init__()
        self.pool = SlotPool(Arena(4 * CEILING, shared=self.shared), ceiling_nbytes=CEILING)
        self.stamps = itertools.count(1)
        self.states = {}  # block → the state it must have, for all that are not free
        self.alive = {}  # leased block → how many views of it are alive
        self.seen = set()  # every block that was ever acquired
        self.resting = None

    def teardown(self):
        self.pool.close()

    def write(self, blocks):
        stamps = []
        for block in blocks:
            stamps.append(next(self.stamps) % 251 + 1)
            np.frombuffer(self.pool.arena.buffer, np.uint8, block.nbytes, block.offset)[:] = stamps[-1]
        return stamps

    def become(self, blocks, state):
        for block in blocks:
            self.states[block] = state

    def forget(self, blocks):
        for block in blocks:
            del self.states[block]

    @rule(target=filling, sizes=SIZES)
    def acquire(self, sizes):
        wanted = sum(-(-size // PAGE) * PAGE for size in sizes)
        taken = sum(block.nbytes for block in self.states)
        self.resting = None
        try:
            blocks = self.pool.acquire(sizes)
        except BufferMemoryError:
            assert taken + wanted > CEILING, "refused though there was room"
            return [], []
        assert [block.nbytes for block in blocks] == [-(-size // PAGE) * PAGE for size in sizes]
        assert not self.states.keys() & set(blocks), "handed out a block that is in use"
        self.seen.update(blocks)
        self.become(blocks, BlockState.FILLING)
        return blocks, self.write(blocks)

    @rule(target=ready, slot=consumes(filling))
    def finish(self, slot):
        self.pool.finish(slot[0])
        self.become(slot[0], BlockState.READY)
        return slot

    @rule(target=abandoned, slot=st.one_of(consumes(filling), consumes(ready)))
    def abandon(self, slot):
        self.pool.abandon(slot[0])
        self.become(slot[0], BlockState.ABANDONED)
        return slot

    @rule(slot=abandoned)
    def write_late(self, slot):
        if all(self.states.get(block) is BlockState.ABANDONED for block in slot[0]):
            self.write(slot[0])

    @rule(slot=st.one_of(consumes(filling), consumes(ready), consumes(abandoned)))
    def discard(self, slot):
        self.pool.discard(slot[0])
        self.forget(slot[0])

    @rule(slot=st.one_of(consumes(filling), consumes(abandoned)), late=st.booleans())
    def discard_once_the_last_writer_is_done(self, slot, late):
        answers = iter([late])
        self.pool.discard_after(lambda: next(answers, False), slot[0])
        self.forget(slot[0])

    @rule(target=views, slot=consumes(ready), data=st.data())
    def lease(self, slot, data):
        blocks, stamps = slot
        if not blocks:
            return [None, 0, None]
        roots = self.pool.lease(blocks, [f"field {number}" for number in range(len(blocks))])
        self.become(blocks, BlockState.LEASED)
        kept = data.draw(st.integers(0, len(blocks) - 1))
        for number, block in enumerate(blocks):
            if number == kept:
                self.alive[block] = 1
            else:
                self.forget([block])
        return [blocks[kept], stamps[kept], np.frombuffer(roots[kept], np.uint8)]

    @rule(target=views, view=views, way=st.sampled_from(["slice", "memoryview", "array", "root"]))
    def view_again(self, view, way):
        block, stamp, alias = view
        if block is None:
            return [None, 0, None]
        whole = np.asarray(alias)
        self.alive[block] += 1
        make = {
            "slice": lambda: whole[PAGE // 2 :],
            "memoryview": lambda: memoryview(whole),
            "array": lambda: np.frombuffer(whole, np.uint16),
            "root": lambda: np.frombuffer(root_of(whole), np.uint8),
        }
        return [block, stamp, make[way]()]

    @rule(view=consumes(views))
    def drop(self, view):
        block = view[0]
        view[:] = [None, 0, None]
        if block is not None:
            self.alive[block] -= 1
            if not self.alive[block]:
                del self.alive[block]
                self.forget([block])

    @rule()
    def reclaim(self):
        self.pool.reclaim()

    @rule(keep=st.lists(st.sampled_from([PAGE, 2 * PAGE, 5 * PAGE]), max_size=3))
    def trim(self, keep):
        self.pool.trim(keep)
        self.resting = Counter(keep)

    @precondition(lambda self: self.resting is not None)
    @invariant()
    def a_resting_pool_keeps_only_what_it_was_told_to(self):
        late = sum(block.nbytes for _, blocks in self.pool._late for block in blocks)
        busy = sum(block.nbytes for block in self.states)
        kept = sum(size * count for size, count in self.resting.items())
        assert self.pool.arena.reserved_nbytes <= busy + late + kept

    @invariant()
    def states_are_those_of_the_model(self):
        for block, state in self.states.items():
            assert block.state is state

    @invariant()
    def no_two_blocks_overlap(self):
        ranges = sorted((block.offset, block.offset + block.nbytes) for block in self.states)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ranges))

    @invariant()
    def memory_is_accounted_for_and_below_the_ceiling(self):
        free = sum(nbytes for _, nbytes in self.pool.arena._free)
        assert self.pool.arena.reserved_nbytes == self.pool.arena.capacity - free
        assert sum(block.nbytes for block in self.states) <= self.pool.arena.reserved_nbytes <= CEILING

    @rule(view=views)
    def look(self, view):
        block, stamp, alias = view
        if block is not None:
            assert (np.asarray(alias).view(np.uint8) == stamp).all(), "a leased block was written to"

    @rule()
    def everything_that_is_not_in_use_is_free(self):
        self.pool.reclaim()
        self.pool.reclaim()  # late writers were asked for the second time whether they still write
        assert self.pool.leased_count == len(self.alive)
        assert self.pool.leased_nbytes == sum(block.nbytes for block in self.alive)
        in_use = Counter(block.nbytes for block in self.states)
        assert Counter({size: count for size, count in self.pool._in_use.items() if count}) == in_use
        for size, blocks in self.pool._free.items():
            assert all(block.state is BlockState.FREE and block.nbytes == size for block in blocks)
            assert len(set(blocks)) == len(blocks)
            assert not self.states.keys() & set(blocks)


def root_of(array: np.ndarray) -> ctypes.Array:
    """The object that exports the buffer."""
    base = array
    while not isinstance(base, ctypes.Array):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base


class SharedSlotPools(SlotPools):
    """The same over memory that is shared with workers."""

    shared = True


SlotPools.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
SharedSlotPools.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSlotPools = SlotPools.TestCase
TestSharedSlotPools = SharedSlotPools.TestCase
