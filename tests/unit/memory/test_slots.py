"""The pool of slots: states, growth, ceilings, and memory that goes back to the machine."""

import ctypes
import gc
import itertools
import threading

import numpy as np
import pytest

from loaders.errors import BufferMemoryError, SlotStateError
from loaders.memory import arena as arena_module
from loaders.memory.arena import PAGE, Arena
from loaders.memory.blocks import BlockState
from loaders.memory.slots import DEBUG_PATTERN, SlotPool

MB = 1 << 20


def new_pool(ceiling: int = 64 * MB, *, shared: bool = False) -> SlotPool:
    return SlotPool(Arena(256 * MB, shared=shared), ceiling_nbytes=ceiling)


@pytest.fixture
def pool():
    pool = new_pool()
    yield pool
    pool.close()


def leased(pool: SlotPool, *sizes: int) -> list:
    slot = pool.acquire(sizes)
    pool.finish(slot)
    return pool.lease(slot, [f"field {number}" for number in range(len(sizes))])


# -- states


@pytest.mark.parametrize(
    ("lead", "refused"),
    [
        ([], ["lease"]),
        (["abandon"], ["finish", "lease", "abandon"]),
        (["finish"], ["finish"]),
        (["finish", "abandon"], ["finish", "lease"]),
        (["discard"], ["finish", "lease", "abandon", "discard"]),
        (["finish", "lease"], ["finish", "lease", "abandon", "discard"]),
    ],
    ids=str,
)
def test_a_block_moves_only_along_the_arrows_of_its_life(pool, lead, refused):
    slot, held = pool.acquire([PAGE]), []
    steps = {
        "finish": lambda: pool.finish(slot),
        "abandon": lambda: pool.abandon(slot),
        "discard": lambda: pool.discard(slot),
        "lease": lambda: held.append(pool.lease(slot, ["x"])),
    }
    for step in lead:
        steps[step]()
    state = slot[0].state
    for step in refused:
        with pytest.raises(SlotStateError):
            steps[step]()
        assert slot[0].state is state


def test_a_leased_block_is_free_only_when_its_root_dies(pool):
    [root] = leased(pool, PAGE)
    [other] = pool.acquire([PAGE])
    assert pool.leased_count == 1
    del root
    pool.reclaim()
    assert (pool.leased_count, pool.leased_nbytes) == (0, 0)
    pool.discard([other])


def test_the_memory_used_last_is_used_next(pool):
    first, second = pool.acquire([PAGE]), pool.acquire([PAGE])
    pool.discard(first)
    pool.discard(second)
    assert pool.acquire([PAGE]) == second
    assert pool.acquire([PAGE]) == first


def test_blocks_of_any_size_even_none_are_whole_pages_apart(pool):
    slot = pool.acquire([0, 1, PAGE, PAGE + 1])
    assert [block.nbytes for block in slot] == [PAGE, PAGE, PAGE, 2 * PAGE]
    ends = sorted((block.offset, block.offset + block.nbytes) for block in slot)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_late_writers_keep_their_blocks_until_they_are_done(pool):
    writing = threading.Event()
    writing.set()
    slot = pool.acquire([PAGE])
    pool.discard_after(writing.is_set, slot)
    assert slot[0].state is BlockState.ABANDONED
    others = [pool.acquire([PAGE])[0] for _ in range(3)]
    assert slot[0] not in others
    writing.clear()
    assert pool.acquire([PAGE]) == slot


# -- the garbage collector


def test_a_finalizer_that_runs_inside_the_pool_may_discard_trim_and_end_leases(pool, monkeypatch):
    [root] = leased(pool, PAGE)
    abandoned = pool.acquire([PAGE])
    reserve, calls = pool.arena.reserve, []

    class Iterator:
        def __del__(self):
            calls.append("collected")
            pool.discard(abandoned)
            pool.trim([PAGE])

    garbage = [Iterator(), root]
    garbage.append(garbage)
    del root, garbage

    def reserve_while_collecting(nbytes):
        gc.collect()  # as any allocation may, while this thread holds the pool's lock
        return reserve(nbytes)

    monkeypatch.setattr(pool.arena, "reserve", reserve_while_collecting)
    thread = threading.Thread(target=pool.acquire, args=([2 * PAGE],), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the finalizer waits for a lock that its own thread holds"
    assert calls == ["collected"]
    assert {block.nbytes for block in pool.acquire([PAGE, PAGE])} == {PAGE}
    assert pool.leased_count == 0


def test_a_lease_may_end_on_any_thread(pool):
    roots = [leased(pool, PAGE) for _ in range(50)]
    threads = [threading.Thread(target=roots.pop) for _ in range(len(roots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.reclaim()
    assert pool.leased_count == 0
    assert pool.arena.reserved_nbytes == 50 * PAGE


# -- growth, ceilings, a full machine


def test_the_pool_grows_when_every_block_is_held(pool):
    roots = [leased(pool, MB, PAGE) for _ in range(20)]
    assert pool.arena.reserved_nbytes == pool.leased_nbytes == 20 * (MB + PAGE)
    assert len({ctypes.addressof(root) for pair in roots for root in pair}) == 40


def test_above_the_ceiling_the_error_says_what_is_held_and_what_to_do():
    pool = new_pool(ceiling=4 * MB)
    held = [leased(pool, MB) for _ in range(3)]
    with pytest.raises(BufferMemoryError) as raised:
        pool.acquire([MB, PAGE])
    message = str(raised.value)
    assert "would take 4,198,400 bytes" in message
    assert "batches still held take 3,145,728" in message
    assert "max_buffer_bytes allows 4,194,304" in message
    assert "Let go of batches that are kept, copy what you keep (tensor.clone()), or raise max_buffer_bytes" in message
    held.pop()
    assert len(pool.acquire([MB, PAGE])) == 2


def test_a_refused_slot_takes_nothing():
    pool = new_pool(ceiling=2 * MB)
    for _ in range(100):
        with pytest.raises(BufferMemoryError):
            pool.acquire([MB, MB, PAGE])
    assert len(pool.acquire([MB, MB])) == 2


def test_idle_blocks_of_other_sizes_make_room_below_the_ceiling():
    pool = new_pool(ceiling=4 * MB)
    pool.discard(pool.acquire([MB] * 4))
    assert len(pool.acquire([2 * MB])) == 1
    assert pool.arena.reserved_nbytes <= 4 * MB


def test_idle_blocks_of_other_sizes_make_room_on_a_full_machine(pool, monkeypatch):
    pool.discard(pool.acquire([MB] * 4))
    free = arena_module._HEADROOM
    monkeypatch.setattr(arena_module, "available_nbytes", lambda: free + 4 * MB - pool.arena.reserved_nbytes)
    assert len(pool.acquire([2 * MB])) == 1
    with pytest.raises(BufferMemoryError, match="4,194,304 bytes was asked for"):
        pool.acquire([4 * MB])


def test_the_few_pages_of_an_engine_are_not_refused_by_the_ceiling():
    pool = new_pool(ceiling=MB)
    pool.acquire([MB])
    with pytest.raises(BufferMemoryError):
        pool.acquire([PAGE])
    assert len(pool.acquire([PAGE], bounded=False)) == 1


# -- memory goes back


def test_what_was_needed_only_for_a_while_is_given_back_by_going_on(pool):
    def steady(count):
        for _ in range(count):
            pool.discard(pool.acquire([MB]))

    steady(10)
    burst = [leased(pool, MB) for _ in range(30)]
    assert pool.arena.reserved_nbytes >= 30 * MB
    burst.clear()
    steady(200)
    assert pool.arena.reserved_nbytes <= 2 * MB


def test_what_is_needed_again_and_again_is_never_given_back(pool):
    blocks = set()
    for _ in range(300):
        slots = [pool.acquire([MB, PAGE]) for _ in range(4)]
        blocks.update(block for slot in slots for block in slot)
        for slot in slots:
            pool.discard(slot)
    assert len(blocks) == 8


def test_between_epochs_only_what_the_next_one_needs_is_kept_whenever_leases_end(pool):
    held = [leased(pool, MB, PAGE) for _ in range(20)]
    pool.trim([MB, PAGE] * 3)
    assert pool.arena.reserved_nbytes == 20 * (MB + PAGE)
    del held[1:]
    assert pool.arena.reserved_nbytes == 4 * (MB + PAGE)
    held.clear()
    assert pool.arena.reserved_nbytes == 3 * (MB + PAGE)


def test_an_acquired_slot_ends_the_rest(pool):
    pool.trim()
    held = [leased(pool, MB) for _ in range(3)]
    held.clear()
    pool.reclaim()
    assert pool.arena.reserved_nbytes == 3 * MB


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_that_outlives_its_pool_gives_its_own_memory_back(shared):
    pool = new_pool(shared=shared)
    arena = pool.arena
    labels, images = leased(pool, PAGE, 8 * MB)
    np.frombuffer(images, np.uint8)[:] = 7
    np.frombuffer(labels, np.uint8)[:] = 5
    pool.close()
    pool.close()
    del pool
    gc.collect()
    assert arena.reserved_nbytes == 8 * MB + PAGE
    del images
    assert arena.reserved_nbytes == PAGE
    assert np.frombuffer(labels, np.uint8).min() == 5
    assert not np.frombuffer(arena.buffer, np.uint8, 8 * MB, PAGE).any()


# -- seeing what goes on


def test_holders_say_what_is_held_how_large_and_how_long(pool):
    held = [leased(pool, MB, PAGE), leased(pool, PAGE)]
    lines = pool.holders().splitlines()
    assert [line.rsplit(" for ", 1)[0] for line in lines] == [
        "field 0: 1,048,576 bytes",
        "field 1: 4,096 bytes",
        "field 0: 4,096 bytes",
    ]
    held.clear()
    pool.reclaim()
    assert pool.holders() == ""


@pytest.mark.parametrize("shared", [True, False])
def test_debug_mode_fills_released_blocks_and_says_where_batches_were_taken(monkeypatch, shared):
    monkeypatch.setenv("LOADERS_DEBUG", "slots")
    pool = new_pool(shared=shared)
    [root] = leased(pool, PAGE)
    np.frombuffer(root, np.uint8)[:] = 1
    assert f"taken at {__file__}:" in pool.holders()
    at = ctypes.addressof(root)
    del root
    pool.reclaim()
    assert (ctypes.c_ubyte * PAGE).from_address(at)[:] == [DEBUG_PATTERN] * PAGE
    pool.close()


def test_without_debug_mode_released_blocks_are_left_alone(pool):
    [root] = leased(pool, PAGE)
    np.frombuffer(root, np.uint8)[:] = 1
    at = ctypes.addressof(root)
    del root
    pool.reclaim()
    assert (ctypes.c_ubyte * PAGE).from_address(at)[0] == 1
