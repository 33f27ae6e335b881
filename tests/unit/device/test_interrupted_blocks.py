"""Page-locked blocks where a call fails half-way, or where CUDA forbids all calls: no block is lost or given twice."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedEvent, prefetch

from loaders import DataLoader
from loaders.memory.arena import Arena
from loaders.memory.slots import SlotPool

PAGE = 4096


def locked_pool(device, ceiling=64 * PAGE):
    pool = SlotPool(Arena(1 << 24, shared=True), ceiling_nbytes=ceiling)
    pool.page_lock(device)
    return pool


def raising(error):
    def fail(*_):
        raise error

    return fail


class Numbers:
    def __init__(self, length=40):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return np.full(48, index, np.uint8)


def firsts(batches):
    return [int(batch[0, 0]) for batch in batches]


# -- calls that fail half-way


def test_pages_that_cannot_be_unlocked_are_given_back_once():
    device = SimulatedDevice(0)
    pool = locked_pool(device)
    pool.discard(pool.acquire([PAGE] * 3))
    device.page_unlock = raising(RuntimeError("CUDA error: unspecified launch failure"))
    pool.trim()
    assert pool.arena.reserved_nbytes == 0
    offsets = [block.offset for block in pool.acquire([PAGE] * 6)]
    assert len(set(offsets)) == 6


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_acquire_that_is_interrupted_while_it_locks_pages_takes_nothing(kind):
    device = SimulatedDevice(0)
    pool = locked_pool(device, ceiling=8 * PAGE)
    device.page_lock = raising(kind("CUDA error: unspecified launch failure"))
    for _ in range(20):
        with pytest.raises(kind):
            pool.acquire([PAGE, PAGE])
    del device.page_lock
    assert len(pool.acquire([PAGE] * 8)) == 8


def test_a_pool_that_is_closed_while_another_thread_looks_after_it_gives_all_back():
    device = SimulatedDevice(0)
    pool, other = locked_pool(device), locked_pool(device)
    pool.discard(pool.acquire([PAGE] * 3))
    pool.trim([PAGE] * 3)
    reclaim = pool._reclaim

    def closed_meanwhile():
        looked = reclaim()
        pool._reclaim = reclaim
        pool.close()  # its lock is taken
        return looked

    pool._reclaim = closed_meanwhile
    other.acquire([PAGE])  # which settles the one that rests
    assert pool.arena.reserved_nbytes == 0
    assert len(device._locked) == 1


# -- graphs


def test_an_acquire_inside_a_capture_does_not_end_page_locking():
    device = SimulatedDevice(0)
    pool = locked_pool(device)
    device.captures = True
    pool.discard(pool.acquire([PAGE]))
    assert not device._locked
    device.captures = False
    pool.acquire([PAGE])
    assert len(device._locked) == 1


def test_while_another_thread_captures_a_block_is_not_taken_for_read(monkeypatch):
    device = SimulatedDevice(0)
    device.let_work_run = lambda: None
    pool = locked_pool(device)
    slot = pool.acquire([PAGE])
    pool.finish(slot)
    [root] = pool.lease(slot, ["x"])
    host = torch.from_numpy(np.frombuffer(root, np.uint8))
    target = device.empty((PAGE,), torch.uint8, device.current)
    device.copy(host, target, device.current)
    del host, root
    refused = raising(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    for name in ("query", "synchronize"):
        monkeypatch.setattr(SimulatedEvent, name, refused)
    taken = [pool.acquire([PAGE])[0] for _ in range(10)]
    assert slot[0] not in taken
    monkeypatch.undo()
    device.drain()
    assert slot[0] in [pool.acquire([PAGE])[0] for _ in range(2)]


def test_a_pool_that_is_closed_during_a_capture_is_unlocked_when_it_is_over():
    device = SimulatedDevice(0)
    pool, other = locked_pool(device), locked_pool(device)
    pool.discard(pool.acquire([PAGE] * 3))
    pool.reclaim()
    device.captures = True
    pool.close()
    del pool
    gc.collect()
    assert len(device._locked) == 3  # mapped still, since they are registered
    device.captures = False
    other.acquire([PAGE])
    assert len(device._locked) == 1


def test_a_device_that_cannot_even_tell_whether_it_captures_has_failed():
    device = SimulatedDevice(0)
    pool = locked_pool(device)
    slot = pool.acquire([PAGE] * 4)
    pool.finish(slot)
    roots = pool.lease(slot, list("abcd"))
    device.is_capturing = raising(RuntimeError("CUDA error: device-side assert triggered"))
    roots.clear()
    pool.discard(pool.acquire([PAGE]))
    pool.close()
    assert pool.arena.reserved_nbytes == 0


# -- loaders


def test_an_iterator_of_kept_threads_goes_on_when_a_prefetcher_needs_other_memory():
    loader = DataLoader(Numbers(), 4, num_workers=2, worker_method="thread", persistent_workers=True)
    older = iter(loader)
    begun = firsts([next(older)])
    newer = iter(prefetch(SimulatedDevice(0), loader))
    next(newer)
    assert begun + firsts(older) == list(range(0, 40, 4))
    assert len(list(newer)) == 9


def test_the_first_epoch_of_an_unpickled_loader_is_page_locked_like_any_other():
    device = SimulatedDevice(0)
    loader = pickle.loads(pickle.dumps(DataLoader(Numbers(), 4)))
    for _ in prefetch(device, loader):
        pass
    assert len(device.host_blocks()) <= 1  # the first batch, which tells what a slot looks like
