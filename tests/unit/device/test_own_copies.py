"""Users' own non_blocking copies out of the slots of a DataLoader, on a device that reads late and in any order.

Every sample has bytes of its own. The device notes what it copied; a note that differs from what the dataset gave for
that batch is a wrong read.
"""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from support import inside
from support.simulated_device import SimulatedDevice, SimulatedStreams

import loaders
from loaders import DataLoader, DevicePrefetcher
from loaders.errors import DeviceError
from loaders.memory import device_reads
from loaders.memory.blocks import BlockState
from loaders.memory.device_reads import DeviceReads

STEPS = 800
BATCH = 4


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, 48, dtype=np.uint8)


class Photos:
    def __init__(self, length=STEPS * BATCH):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": pixels(index), "label": index}


ENGINES = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
}


def loader_for(device, engine="inline", steps=STEPS, **options):
    loader = DataLoader(Photos(steps * BATCH), batch_size=BATCH, **ENGINES[engine], **options)
    loader.page_lock_with(device)  # as pin_memory=True does where there is a CUDA device
    return loader


def wrong_reads(seed, engine="inline", *, streams=1, names_streams=True, steps=STEPS):
    """Copy, hold and drop batches at random, on one or several streams. Returns (number of wrong reads, the device)."""
    device, choose = SimulatedDevice(seed), random.Random(seed)
    mine = [device.current, *(device.new_stream() for _ in range(streams - 1))]
    wrong, held = [], deque()

    def check(image, step):
        expected = np.stack([pixels(index) for index in range(step * BATCH, (step + 1) * BATCH)])
        wrong.append(not np.array_equal(image.reshape(expected.shape), expected))

    for step, batch in enumerate(loader_for(device, engine, steps)):
        stream = choose.choice(mine)
        with device.on(stream):
            target = device.empty((BATCH, 48), torch.uint8, stream)
            if device.is_locked(batch["image"]):
                device.copy(batch["image"], target, stream)
                device.launch(lambda image, step=step: check(image, step), target)
        if stream is not device.current and names_streams:
            loaders.record_stream(batch, stream)
        if choose.random() < 0.3:
            held.append(batch["label"])  # a field of the batch, not the one that is read
        del batch
        while len(held) > choose.randint(0, 3):
            held.popleft()
    device.drain()
    assert len(wrong) > 0.9 * steps
    return sum(wrong), device


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_slot_is_not_written_before_the_device_has_read_it(engine, streams):
    for seed in range(5 if engine == "inline" else 1):
        wrong, _ = wrong_reads(seed, engine, streams=streams)
        assert wrong == 0, f"seed {seed}"


class NoEvents(DeviceReads):
    def begin(self, block, streams):
        super().begin(block, ())


@pytest.mark.parametrize("seed", range(4))
def test_without_events_batches_are_overwritten_before_they_are_read(monkeypatch, seed):
    monkeypatch.setattr("loaders.memory.slots.DeviceReads", NoEvents)
    wrong, _ = wrong_reads(seed, steps=300)
    assert wrong > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_is_never_named_is_not_waited_for(seed):
    wrong, _ = wrong_reads(seed, streams=3, names_streams=False, steps=300)
    assert wrong > 0


def wrong_reads_of_another_stream(where):
    """Batches that a stream reads which is current only where they are handed out, or only where they are let go."""
    wrong = []
    for seed in range(10):
        device = SimulatedDevice(seed)
        other = device.new_stream()

        def check(image, step):
            wrong.append(not np.array_equal(image.reshape(BATCH, 48)[0], pixels(step * BATCH)))

        batches = iter(loader_for(device, steps=40))
        for step in range(40):
            with device.on(other if where == "handed out" else device.current):
                batch = next(batches)
            target = device.empty((BATCH, 48), torch.uint8, other)
            device.copy(batch["image"], target, other)
            with device.on(other):
                device.launch(lambda image, step=step, check=check: check(image, step), target)
            with device.on(other if where == "let go" else device.current):
                del batch
        device.drain()
    assert len(wrong) == 400
    return sum(wrong)


@pytest.mark.parametrize("where", ["handed out", "let go"])
def test_the_streams_current_at_hand_out_and_at_release_need_not_be_named(monkeypatch, where):
    assert wrong_reads_of_another_stream(where) == 0
    asks = {"handed out": "lease", "let go": "_end"}[where]
    current_streams = DeviceReads.current_streams

    def forgets_one(self):
        return set() if sys._getframe(1).f_code.co_name == asks else current_streams(self)

    monkeypatch.setattr(DeviceReads, "current_streams", forgets_one)
    assert wrong_reads_of_another_stream(where) > 0


def test_record_stream_finds_the_slot_of_views_arrays_and_containers_and_ignores_other_memory():
    device = SimulatedDevice(0)
    batches = iter(loader_for(device, steps=8))
    next(batches)  # made before there was a slot
    batch = next(batches)
    [stream] = [device.new_stream()]
    leases = {lease.label: lease for lease in inside.dispatch_of(batches).pool._leases.values()}
    image = next(lease for label, lease in leases.items() if "image" in label)
    for part in (
        batch["image"][1:, 5:],
        [{"deep": batch["image"].detach()}],
        batch["image"].numpy()[2:],
        batch["image"].view(torch.int32),
    ):
        loaders.record_stream(part, stream)
        assert image.named == {stream}
        image.named.clear()
    loaders.record_stream({"else": torch.zeros(3), "text": "a", "array": np.zeros(2)}, stream)
    assert not any(lease.named for lease in leases.values())
    with pytest.raises(TypeError, match=r"stream='side'.*expected a torch.Stream"):
        loaders.record_stream(batch, "side")


def test_a_device_that_never_gets_on_stops_the_pool_from_growing_and_not_the_loop():
    device = SimulatedDevice(3)
    loader = loader_for(device, steps=200)
    for batch in loader:
        if device.is_locked(batch["image"]):
            device.copy(batch["image"], device.empty((BATCH, 48), torch.uint8, device.current), device.current)
            device.current.is_awake = False
        del batch
    # What is in work, what the device may be behind by, and two fields that share a size.
    assert inside.pool_of(loader).arena.reserved_nbytes <= 4096 * 16


def test_memory_that_the_device_reads_is_waited_for_before_the_ceiling_refuses():
    device = SimulatedDevice(0)
    for batch in loader_for(device, steps=100, max_buffer_bytes=4096 * 4):
        if device.is_locked(batch["image"]):
            device.copy(batch["image"], device.empty((BATCH, 48), torch.uint8, device.current), device.current)
        del batch


def test_a_block_is_device_reading_between_its_last_view_and_the_event():
    device = SimulatedDevice(0)
    loader = loader_for(device, steps=8)
    batches = iter(loader)
    next(batches)
    batch = next(batches)
    block = next(iter(inside.pool_of(loader)._leases))
    assert block.state is BlockState.LEASED
    device.let_work_run = lambda: None  # it sleeps
    device.enqueue(device.current, lambda: None)
    del batch
    inside.pool_of(loader).reclaim()
    assert block.state is BlockState.DEVICE_READING
    device.drain()
    inside.pool_of(loader).reclaim()
    assert block.state is BlockState.FREE


def test_every_page_is_unlocked_before_it_goes_back_and_all_when_the_loader_is_gone():
    device = SimulatedDevice(0)
    loader = loader_for(device, steps=30)
    kept = list(loader)[-2:]
    assert device._locked
    held = {kept[0]["image"].data_ptr(), kept[1]["label"].data_ptr()}
    kept = [kept[0]["image"], kept[1]["label"]]
    del loader
    gc.collect()
    assert set(device._locked) == held  # what outlives the loader stays readable where it lies
    kept.clear()
    gc.collect()
    assert not device._locked


def test_where_page_locking_is_refused_it_is_said_once_and_batches_come_all_the_same():
    class Refusing(SimulatedDevice):
        def page_lock(self, address, nbytes):
            raise DeviceError("cudaHostRegister says: out of memory.")

    device = Refusing(0)
    with pytest.warns(UserWarning, match=r"cannot be page-locked.*once more.*out of memory") as caught:
        labels = [label for batch in loader_for(device, steps=30) for label in batch["label"].tolist()]
    assert len(caught) == 1
    assert labels == list(range(30 * BATCH))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"static": True}], ids=["", "static"])
def test_the_prefetcher_reads_the_slots_themselves_and_never_late(engine, options):
    device = SimulatedDevice(1)
    loader = DataLoader(Photos(60 * BATCH), batch_size=BATCH, **ENGINES[engine])
    prefetcher = DevicePrefetcher(loader, "cpu", **options)
    prefetcher._streams = SimulatedStreams(device)
    prefetcher._idle.append(loaders.device.copies.StaticBuffers(4))
    seen = []
    for _ in range(2):
        for batch in prefetcher:
            device.launch(lambda *arrays: seen.append([array.copy() for array in arrays]), *batch.values())
            del batch
    device.drain()
    assert [label.ravel().tolist() for _, label in seen] == 2 * np.arange(60 * BATCH).reshape(60, BATCH).tolist()
    for image, label in seen:
        assert np.array_equal(image.reshape(BATCH, 48), [pixels(index) for index in label.ravel()])
    # Only the first batch of all, which tells what a slot looks like, was made elsewhere and pinned.
    assert len(device.host_blocks()) <= 2


def test_a_block_that_the_prefetcher_let_go_waits_for_nobody_elses_work():
    device = SimulatedDevice(1)
    loader = loader_for(device, steps=20)
    prefetcher = DevicePrefetcher(loader, "cpu", depth=1)
    prefetcher._streams = SimulatedStreams(device)
    for batch in prefetcher:
        device.launch(lambda image: None, batch["image"])
        device.current.is_awake = False  # the model takes its time
        inside.pool_of(loader).reclaim()
        reads = inside.pool_of(loader)._reads
        assert reads is None or not reads._reading


def test_a_forked_child_leaves_the_device_alone(monkeypatch):
    device = SimulatedDevice(0)
    loader = loader_for(device, steps=8)
    batches = iter(loader)
    next(batches)
    batch = next(batches)
    monkeypatch.setattr(device_reads.os, "getpid", lambda: -1)
    monkeypatch.setattr(device, "current_streams", lambda: pytest.fail("a forked child asked the device"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del batch
        gc.collect()
    monkeypatch.undo()
