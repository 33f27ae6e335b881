"""Each guard of the prefetcher against a device that punishes its absence, with the naive version beside ours.

Every batch has bytes of its own. Kernels note the bytes that they find when they run; each note that differs from what
the loader wrote for that batch is a wrong read.
"""

from __future__ import annotations

import functools
import gc
import random
from collections import deque

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedStreams

from loaders import DevicePrefetcher
from loaders.device import prefetcher as prefetcher_module
from loaders.device.copies import Copies

SEEDS = range(8)
STEPS = 60


@functools.cache
def pixels(step):
    return np.random.default_rng(step).integers(0, 256, 64, dtype=np.uint8)


class SlotLoader:
    """Batches in page-locked slots; a slot is overwritten as soon as the last reference to its batch is gone."""

    def __init__(self, device):
        self.device = device

    def __iter__(self):
        return (self.batch(step) for step in range(STEPS))

    def batch(self, step):
        image = self.device.empty((64,), torch.uint8, stream=None)
        image.copy_(torch.from_numpy(pixels(step)))
        return {"image": image, "meta": (torch.tensor([step]), f"photo {step}")}


class DeviceWrittenLoader(SlotLoader):
    """Batches in page-locked memory that a kernel on the loop's stream fills, such as results brought back."""

    def batch(self, step):
        image = self.device.empty((64,), torch.uint8, stream=None)
        self.device.launch(lambda array: np.copyto(array, pixels(step)), image)
        return {"image": image, "meta": (torch.tensor([step]), f"photo {step}")}


def plain_loop(seed):
    device = SimulatedDevice(seed)
    return device, SlotLoader(device), [device.current]


def device_written_sources(seed):
    device = SimulatedDevice(seed)
    return device, DeviceWrittenLoader(device), [device.current]


def allocator_that_ignores_record_stream(seed):
    device = SimulatedDevice(seed, tracks_streams=False)
    return device, SlotLoader(device), [device.current]


def loop_that_changes_its_stream_and_an_allocator_that_ignores_it(seed):
    device = SimulatedDevice(seed, tracks_streams=False)
    return device, SlotLoader(device), [device.current, device.new_stream(), device.new_stream()]


def loop_that_changes_its_stream(seed):
    device = SimulatedDevice(seed)
    return device, SlotLoader(device), [device.current, device.new_stream(), device.new_stream()]


SCENARIOS = [
    plain_loop,
    device_written_sources,
    allocator_that_ignores_record_stream,
    loop_that_changes_its_stream,
    loop_that_changes_its_stream_and_an_allocator_that_ignores_it,
]


def wrong_reads(scenario, seed, depth=2, streams_type=SimulatedStreams, transform=False, static=False):
    """Run a training loop that reads, holds and drops at random. Returns (number of wrong reads, the device).

    Static batches are let go before the next one is asked for, as their rule says.
    """
    device, loader, compute_streams = scenario(seed)
    choose = random.Random(seed)
    wrong = []
    held = deque()

    def check(image, label, step):
        wrong.append(not np.array_equal(image, pixels(step)) or label[0] != step)

    def inverted_twice(batch):
        # As a transform does: new memory from the loop's stream, the copied batch let go.
        once, twice = (device.empty((64,), torch.uint8, device.current) for _ in range(2))
        device.launch(lambda image, out: np.subtract(255, image, out=out), batch["image"], once)
        device.launch(lambda image, out: np.subtract(255, image, out=out), once, twice)
        return {"image": twice, "meta": batch["meta"]}

    prefetcher = DevicePrefetcher(loader, "cpu", depth, inverted_twice if transform else None, static)
    prefetcher._streams = streams_type(device)
    batches = iter(prefetcher)
    for step in range(STEPS):
        with device.on(choose.choice(compute_streams)):
            batch = next(batches)
            assert batch["meta"][1] == f"photo {step}"
            for _ in range(choose.randint(1, 3)):
                device.launch(
                    lambda image, label, step=step: check(image, label, step), batch["image"], batch["meta"][0]
                )
            held.append(batch)
            del batch
            while len(held) > (0 if static else choose.randint(0, 3)):
                held.popleft()
    assert next(batches, None) is None
    device.drain()
    return sum(wrong), device


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_batch_is_ever_read_before_it_came_or_after_it_was_overwritten(scenario, depth, static):
    for seed in SEEDS:
        for transform in (False, True):
            wrong, device = wrong_reads(scenario, seed, depth, transform=transform, static=static)
            assert (wrong, device.late_reads) == (0, 0), f"seed {seed}, transform {transform}"


class NoWaitForTheCopy(SimulatedStreams):
    def compute_waits_for(self, event):
        pass


class NoWaitForTheLoop(SimulatedStreams):
    def side_waits_for(self, stream):
        pass


class NoRecordStream(SimulatedStreams):
    def record_stream(self, tensor):
        pass


class OnlyCurrent(SimulatedStreams):
    def side_waits_for(self, stream):
        if stream is self.device.current:
            super().side_waits_for(stream)


class OnlyCurrentAndNoRecord(OnlyCurrent, NoRecordStream):
    pass


class NeitherWaitNorRecord(NoWaitForTheLoop, NoRecordStream):
    pass


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("naive", "scenario"),
    [
        (NoWaitForTheCopy, plain_loop),
        # Either of these two guards is enough in a plain loop; each has a case of its own that the other misses.
        (NeitherWaitNorRecord, plain_loop),
        (NoWaitForTheLoop, device_written_sources),
        (NoWaitForTheLoop, allocator_that_ignores_record_stream),
        (OnlyCurrentAndNoRecord, loop_that_changes_its_stream),
        (OnlyCurrent, loop_that_changes_its_stream_and_an_allocator_that_ignores_it),
    ],
)
def test_a_prefetcher_without_this_guard_reads_wrong_bytes(naive, scenario, seed):
    wrong, _ = wrong_reads(scenario, seed, streams_type=naive)
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("naive", "scenario"),
    [(NoWaitForTheCopy, plain_loop), (NoWaitForTheLoop, plain_loop), (NoWaitForTheLoop, loop_that_changes_its_stream)],
)
def test_static_buffers_without_this_guard_give_wrong_bytes(naive, scenario, seed):
    wrong, _ = wrong_reads(scenario, seed, streams_type=naive, static=True)
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_static_buffers_that_wait_for_the_current_stream_alone_give_wrong_bytes(seed):
    wrong = sum(
        wrong_reads(loop_that_changes_its_stream, 100 * seed + each, streams_type=OnlyCurrent, static=True)[0]
        for each in range(5)
    )
    assert wrong > 0


@pytest.mark.parametrize("tracks_streams", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_memory_is_not_used_again_while_the_loop_reads_it_when_prefetcher_and_batch_are_gone(static, tracks_streams):
    device = SimulatedDevice(0, tracks_streams)
    prefetcher = DevicePrefetcher([torch.full((64,), 7)], "cpu", static=static)
    streams = prefetcher._streams = SimulatedStreams(device)
    streams.records_streams = tracks_streams
    found = []
    for batch in prefetcher:
        device.let_work_run = device._settle_freed  # from here on work runs only when it is waited for
        device.launch(lambda array: found.append(int(array[0])), batch)
    del batch, prefetcher
    gc.collect()
    streams.copy(torch.zeros(64, dtype=torch.int64))  # another user of the side stream's memory
    streams.record_event().synchronize()
    device.drain()
    assert found == [7]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_prefetcher_that_lets_sources_go_early_reads_wrong_bytes(monkeypatch, seed):
    class Forgetful(Copies):
        def release_sources(self, keep):
            self._sources.clear()

    monkeypatch.setattr(prefetcher_module, "Copies", Forgetful)
    wrong, device = wrong_reads(plain_loop, seed)
    assert wrong > 0
    assert device.late_reads > 0


@pytest.mark.parametrize("depth", [1, 3])
def test_a_loader_with_depth_plus_two_slots_never_runs_short(depth):
    for seed in SEEDS:
        device, loader, _ = plain_loop(seed)
        most = 0
        batch_from_slot = loader.batch

        def counted(step, device=device, batch_from_slot=batch_from_slot):
            nonlocal most
            batch = batch_from_slot(step)
            # The label is pinned by the prefetcher: the images are the larger blocks.
            most = max(most, sum(b.is_leased and b.memory.nbytes == 64 for b in device.host_blocks()))
            return batch

        loader.batch = counted
        prefetcher = DevicePrefetcher(loader, "cpu", depth)
        prefetcher._streams = SimulatedStreams(device)
        for batch in prefetcher:
            # Work that keeps the device behind the host: nothing makes it run but those who wait.
            device.launch(lambda image: None, batch["image"])
        assert most <= depth + 2


@pytest.mark.parametrize("depth", [1, 3])
def test_device_memory_is_bounded_over_epochs_however_far_the_host_runs_ahead(depth):
    for seed in SEEDS:
        device, loader, _ = plain_loop(seed)
        prefetcher = DevicePrefetcher(loader, "cpu", depth)
        prefetcher._streams = SimulatedStreams(device)
        for _ in range(4):
            for batch in prefetcher:
                device.launch(lambda image: None, batch["image"])
            del batch
        images = [block for block in device.device_blocks() if block.memory.nbytes == 64]
        assert len(images) <= 2 * depth + 4


@pytest.mark.parametrize("seed", SEEDS)
def test_leaving_early_leaves_no_copy_under_way_and_no_source_held(seed):
    device, loader, _ = plain_loop(seed)
    prefetcher = DevicePrefetcher(loader, "cpu")
    streams = prefetcher._streams = SimulatedStreams(device)
    for _ in range(3):
        for step, batch in enumerate(prefetcher):
            device.launch(lambda image: None, batch["image"])
            if step == seed:
                break
        assert not streams.side.queue
        assert not any(block.is_leased for block in device.host_blocks())
    assert device.late_reads == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_sources_outlive_their_copies_when_a_later_copy_of_the_batch_fails(seed):
    class OutOfMemory(SimulatedStreams):
        def copy(self, tensor, out=None):
            if tensor.dtype is torch.int64:
                raise torch.OutOfMemoryError("no room")
            return super().copy(tensor, out)

    device, loader, _ = plain_loop(seed)
    prefetcher = DevicePrefetcher(loader, "cpu")
    prefetcher._streams = OutOfMemory(device)
    with pytest.raises(torch.OutOfMemoryError):
        next(iter(prefetcher))
    device.drain()
    assert device.late_reads == 0
