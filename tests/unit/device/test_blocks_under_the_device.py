"""What happens to page-locked blocks where the device, the order of things or the user is awkward."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from support import inside
from support.simulated_device import SimulatedDevice, SimulatedEvent, SimulatedStreams, prefetch
from support.waiting import run_in_child

import loaders
from loaders import DataLoader, DevicePrefetcher
from loaders.errors import DeviceError
from loaders.memory import registry
from loaders.memory.accelerator import Accelerator, open_accelerator
from loaders.memory.arena import Arena
from loaders.memory.slots import SlotPool

BATCH = 4
KEPT = 4 * 4096  # for the next epoch


class Photos:
    def __init__(self, batches=100):
        self.batches = batches

    def __len__(self):
        return self.batches * BATCH

    def __getitem__(self, index):
        return {"image": np.full(48, index % 251, np.uint8)}


def loader_read_by(device, **options):
    loader = DataLoader(Photos(), BATCH, **options)
    loader.page_lock_with(device)  # as pin_memory=True does where there is a CUDA device
    return loader


def busy(device):
    """The current stream has work, and runs none of it before it is drained."""
    device.let_work_run = lambda: None
    device.enqueue(device.current, lambda: None)


# -- streams that a user names


def test_a_stream_that_was_named_before_a_prefetcher_got_the_batch_still_protects_it():
    device = SimulatedDevice(3)
    mine = device.new_stream()
    copies = []

    def also_copied_by_me():
        for batch in loader_read_by(device):
            if device.is_locked(batch["image"]):
                copy = device.empty((BATCH, 48), torch.uint8, mine)
                copies.append((copy, batch["image"].clone()))
                device.copy(batch["image"], copy, mine)
                loaders.record_stream(batch, mine)
            yield batch
            mine.is_awake = False

    for _ in prefetch(device, also_copied_by_me()):
        pass
    device.drain()
    assert len(copies) > 90
    assert all(torch.equal(copy, expected) for copy, expected in copies)


# -- memory that goes back


def test_page_locked_batches_that_are_dropped_between_epochs_go_back_when_any_loader_goes_on():
    device = SimulatedDevice(0)
    loader, other = loader_read_by(device), loader_read_by(device)
    kept = list(loader)
    busy(device)
    kept.clear()
    assert inside.pool_of(loader).arena.reserved_nbytes > 90 * 4096  # the device may still be reading
    del device.let_work_run
    device.drain()
    batches = iter(other)
    next(batches)
    next(batches)
    assert inside.pool_of(loader).arena.reserved_nbytes <= KEPT


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
        {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
    ],
    ids=["inline", "fork", "fork, persistent", "thread, persistent"],
)
def test_a_loader_that_was_looked_into_before_is_page_locked_from_the_next_epoch_on(options):
    device = SimulatedDevice(0)
    loader = DataLoader(Photos(), BATCH, **options)
    look = iter(loader)
    held, first_pool = deque([next(look), next(look)]), inside.pool_of(loader)
    del look
    prefetcher = prefetch(device, loader)
    staged = []
    pin = prefetcher._streams.pin
    prefetcher._streams.pin = lambda tensor: staged.append(not device.is_locked(tensor)) or pin(tensor)
    for _ in prefetcher:
        held.clear()
    staged.clear()
    for _ in prefetcher:
        pass
    assert not any(staged)
    assert inside.pool_of(loader) is first_pool or first_pool.arena.reserved_nbytes == 0


# -- a device that fails


@pytest.fixture
def failing(monkeypatch):
    """Call it, and whatever asks an event from then on gets the device's error."""

    def fail(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def let_it_fail():
        for name in ("query", "synchronize"):
            monkeypatch.setattr(SimulatedEvent, name, fail)
        monkeypatch.setattr(SimulatedDevice, "record_event", fail)

    return let_it_fail


def test_a_failed_device_reads_nothing_any_more_so_all_memory_goes_back(failing):
    device = SimulatedDevice(0)
    loader = loader_read_by(device)
    batches = iter(loader)
    held = [next(batches) for _ in range(4)]
    pool = inside.pool_of(loader)
    busy(device)
    del held[:2]
    pool.reclaim()
    failing()
    held.clear()  # their events cannot even be made
    del batches, loader
    gc.collect()
    assert pool.arena.reserved_nbytes == 0
    assert pool.arena._fd == -1
    assert not device._locked


def test_a_loop_goes_on_without_a_device_that_failed(failing):
    device = SimulatedDevice(0)
    labels = []
    for batch in loader_read_by(device):
        labels.append(int(batch["image"][0, 0]))
        if len(labels) == 20:
            failing()
    assert labels == [BATCH * number % 251 for number in range(100)]


def test_an_error_of_one_pool_before_a_fork_leaves_no_pool_locked(monkeypatch):
    pools = [SlotPool(Arena(1 << 20, shared=True), ceiling_nbytes=1 << 20) for _ in range(3)]

    def fail():
        raise RuntimeError("at a bad moment")

    def is_free(pool):
        # Asked by another thread: its own may take the lock again.
        answers = []

        def ask():
            answers.append(pool._lock.acquire(blocking=False))
            if answers[0]:
                pool._lock.release()

        asker = threading.Thread(target=ask)
        asker.start()
        asker.join()
        return answers == [True]

    monkeypatch.setattr(pools[1], "_reclaim", fail)
    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    assert run_in_child(lambda: all(map(is_free, pools)))
    assert all(map(is_free, pools))
    assert [str(each.exc_value) for each in unraisable] == ["at a bad moment"]


# -- page-locking that is refused


class Refusing(SimulatedDevice):
    def page_lock(self, address, nbytes):
        raise DeviceError("cudaHostRegister says: out of memory.")


def test_a_refusal_that_a_filter_turns_into_an_error_leaks_no_block():
    loader = loader_read_by(Refusing(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = iter(loader)
        with pytest.raises(UserWarning, match="cannot be page-locked"):
            for _ in batches:
                pass
    del batches
    gc.collect()
    labels = [int(batch["image"][0, 0]) for batch in loader]
    assert labels == [BATCH * number % 251 for number in range(100)]
    pool = inside.pool_of(loader)
    pool.reclaim()
    assert sum(pool._in_use.values()) == 0
    assert pool.arena.reserved_nbytes == sum(size * len(free) for size, free in pool._free.items())


# -- graphs


def test_while_a_graph_is_captured_no_event_is_asked_and_nothing_is_lost():
    device = SimulatedDevice(0)
    loader = loader_read_by(device)
    kept = list(loader)
    reserved = inside.pool_of(loader).arena.reserved_nbytes
    device.captures = True
    kept.clear()  # would be looked after at once: the loader rests
    assert inside.pool_of(loader).arena.reserved_nbytes == reserved
    device.captures = False
    device.drain()
    inside.pool_of(loader).reclaim()
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader).arena.reserved_nbytes <= KEPT


def test_a_loop_inside_a_capture_takes_new_memory_rather_than_wait():
    device = SimulatedDevice(0)
    batches = iter(loader_read_by(device))
    next(batches)
    busy(device)
    for _ in range(30):
        next(batches)
    device.captures = True
    labels = [int(batch["image"][0, 0]) for batch in batches]
    assert labels == [BATCH * number % 251 for number in range(31, 100)]
    device.captures = False
    del device.let_work_run
    next(iter(loader_read_by(device)))  # which looks after the blocks of the other, too


# -- pools of other threads


def test_pools_that_come_and_go_meanwhile_disturb_no_look_at_all_of_them():
    def new_pool():
        return SlotPool(Arena(1 << 16, shared=True), ceiling_nbytes=1 << 16)

    mine = [new_pool() for _ in range(3)]
    for _ in registry.alive(registry.shared):
        mine.append(new_pool())
        del mine[0]
    assert set(mine) <= set(registry.alive(registry.shared))


# -- what CUDA is asked


class Cudart:
    """`torch.cuda.cudart()`, of a driver that says `status`."""

    def __init__(self, status=0):
        self.status = status
        self.calls = []

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802  CUDA's
        self.calls.append(("register", address, nbytes, flags))
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802  CUDA's
        self.calls.append(("unregister", address))
        return self.status

    def cudaGetErrorString(self, status):  # noqa: N802  CUDA's
        return f"error {status}"


@pytest.fixture
def cuda(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(Accelerator, "_forget_last_error", lambda self: cudart.calls.append("forget"))
    entered = cudart.devices = []

    class OnDevice:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("torch.cuda.device", OnDevice)
    return cudart


def test_pages_are_locked_for_all_devices_and_unlocked_on_the_device_that_locked_them(cuda):
    accelerator = Accelerator(torch.device("cuda:1"))
    accelerator.page_lock(4096, 8192)
    accelerator.page_unlock(4096)
    assert cuda.calls == [("register", 4096, 8192, 1), ("unregister", 4096)]
    assert cuda.devices == [torch.device("cuda:1")] * 2


def test_what_the_driver_refuses_is_a_device_error_and_no_kernel_of_torchs_meets_it(cuda):
    cuda.status = 2
    with pytest.raises(DeviceError, match="cudaHostRegister says: error 2"):
        Accelerator(torch.device("cuda")).page_lock(0, 4096)
    Accelerator(torch.device("cuda")).page_unlock(0)
    assert cuda.calls.count("forget") == 2


def test_memory_is_page_locked_only_where_torch_offers_it():
    assert Accelerator(torch.device("cuda")).can_page_lock
    assert not Accelerator(torch.device("xpu")).can_page_lock
    with pytest.raises(DeviceError, match="for xpu"):
        Accelerator(torch.device("xpu")).page_lock(0, 4096)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_every_accelerator_is_asked_how_far_it_has_read(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda index: f"stream of {index}")
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index != 1, raising=False)
    streams = open_accelerator().current_streams()
    used = [0, 2] if kind == "cuda" else [0, 1, 2]  # of others torch does not tell
    assert streams == tuple(f"stream of {index}" for index in used)


@pytest.mark.parametrize("is_capturing", [False, True])
def test_a_graph_of_any_accelerator_is_noticed(monkeypatch, is_capturing):
    class Stream:
        def is_capturing(self):
            return is_capturing

    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    assert Accelerator(torch.device("mps")).is_capturing() is is_capturing
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    assert Accelerator(torch.device("cuda")).is_capturing() is is_capturing


def test_blocks_that_cannot_be_page_locked_wait_for_the_device_all_the_same():
    device = SimulatedDevice(0)
    device.can_page_lock = False
    device.page_lock = lambda *_: pytest.fail("asked to page-lock")
    loader = loader_read_by(device)
    batches = iter(loader)
    next(batches)
    batch = next(batches)
    busy(device)
    del batch
    pool = inside.pool_of(loader)
    pool.reclaim()
    assert pool._reads._reading


def test_a_forked_child_asks_nothing_of_the_device_of_its_parent():
    device = SimulatedDevice(0)
    loader = loader_read_by(device)
    batches = iter(loader)
    held = [next(batches) for _ in range(4)]
    parent = os.getpid()

    def in_child():
        assert os.getpid() != parent

        def fail(*_):
            raise AssertionError("the device was asked")

        for name in ("page_unlock", "current_streams", "record_event", "is_capturing"):
            setattr(device, name, fail)
        held.clear()
        inside.pool_of(loader).trim()
        return [int(batch["image"][0, 0]) for batch in loader] == [BATCH * number % 251 for number in range(100)]

    assert run_in_child(in_child)


# -- what is not locked, and does not travel


def test_private_memory_is_not_page_locked_since_a_fork_would_copy_it_from_under_the_device():
    device = SimulatedDevice(0)
    pool = SlotPool(Arena(1 << 20, shared=False), ceiling_nbytes=1 << 20)
    pool.page_lock(device)
    pool.discard(pool.acquire([4096]))
    assert not device._locked


def test_a_pickled_loader_is_read_by_nothing_yet():
    loader = loader_read_by(SimulatedDevice(0))
    next(iter(loader))
    twin = pickle.loads(pickle.dumps(loader))
    assert inside.page_locker_of(twin) is None
    assert int(next(iter(twin))["image"][1, 0]) == 1


@pytest.mark.parametrize(
    ("source", "copied_nbytes"),
    [
        (torch.arange(24).reshape(4, 6)[:, :3], 21 * 8),  # most of the run is its own: one copy of all of it
        (torch.arange(40).reshape(4, 10)[:, :3], 12 * 8),  # most is not
        (torch.ones(1, 6).expand(4, 6), 24 * 4),  # its elements share memory, which no device tensor's may
        (torch.arange(24).reshape(4, 6).t(), 24 * 8),
    ],
    ids=["few gaps", "many gaps", "expanded", "transposed"],
)
def test_a_view_travels_as_one_run_unless_most_of_it_is_not_its_own(source, copied_nbytes):
    copied = []

    class Streams(SimulatedStreams):
        def pin(self, tensor):
            return tensor

        def copy(self, tensor, out=None):
            copied.append(tensor.nbytes)
            return super().copy(tensor, out)

    device = SimulatedDevice(0)
    prefetcher = DevicePrefetcher([source], "cpu")
    prefetcher._streams = Streams(device)
    [moved] = prefetcher
    device.drain()
    assert copied == [copied_nbytes]
    assert torch.equal(moved, source)
