"""The prefetcher's guards on a real CUDA device.

Kernels are slowed down with a spin, so that the host is far ahead of the device and freed memory is reused while it is
still to be read: a missing wait shows as wrong values.
"""

from __future__ import annotations

import gc
import mmap
import pickle
import weakref

import numpy as np
import pytest
import torch

from loaders import DevicePrefetcher
from loaders.device.copies import Copies
from loaders.device.streams import open_streams
from loaders.errors import DeviceError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

STEPS = 40
SIZE = 1 << 20
SPIN = 20_000_000  # clock cycles, about 10 ms: many times the copy of a batch


class SlotLoader:
    """Batches in page-locked slots; a slot is overwritten as soon as the last reference to its batch is gone."""

    def __init__(self):
        # Whole pages each: no page can be registered twice.
        self.slots = [np.frombuffer(mmap.mmap(-1, SIZE * 4), np.int32) for _ in range(4)]
        self.free = list(self.slots)
        for slot in self.slots:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(slot.ctypes.data, slot.nbytes, 0))

    def close(self):
        for slot in self.slots:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(slot.ctypes.data))

    def __iter__(self):
        return (self.batch(step) for step in range(STEPS))

    def batch(self, step):
        slot = self.free.pop()
        slot.fill(step)
        lease = slot[:]
        weakref.finalize(lease, self.let_go, slot)
        return {"image": torch.from_numpy(lease), "label": torch.tensor([step]), "name": f"photo {step}"}

    def let_go(self, slot):
        slot.fill(-1)
        self.free.append(slot)


@pytest.fixture
def loader():
    loader = SlotLoader()
    yield loader
    gc.collect()
    torch.cuda.synchronize()
    loader.close()


def test_every_batch_reads_as_it_was_written_while_the_host_runs_ahead(loader):
    found = []
    for step, batch in enumerate(DevicePrefetcher(loader, "cuda")):
        assert batch["name"] == f"photo {step}"
        torch.cuda._sleep(SPIN)
        found.append(torch.stack([batch["image"].min(), batch["image"].max(), batch["label"][0]]))
        del batch
    assert torch.stack(found).tolist() == [[step] * 3 for step in range(STEPS)]


def test_a_loop_that_changes_its_stream_reads_right_too(loader):
    streams = [torch.cuda.Stream() for _ in range(3)]
    batches = iter(DevicePrefetcher(loader, "cuda"))
    found = []
    for step in range(STEPS):
        with torch.cuda.stream(streams[step % 3]):
            image = next(batches)["image"]
            torch.cuda._sleep(SPIN)
            found.append(torch.stack([image.min(), image.max()]))
            del image
    torch.cuda.synchronize()
    assert torch.stack(found).tolist() == [[step] * 2 for step in range(STEPS)]


def test_sources_that_the_device_itself_writes_are_copied_after_they_were_written():
    def brought_back():
        for step in range(STEPS):
            torch.cuda._sleep(SPIN)
            on_device = torch.full((SIZE,), step, device="cuda")
            yield torch.empty(SIZE, dtype=on_device.dtype, pin_memory=True).copy_(on_device, non_blocking=True)

    found = [torch.stack([batch.min(), batch.max()]) for batch in DevicePrefetcher(brought_back(), "cuda")]
    assert torch.stack(found).tolist() == [[step] * 2 for step in range(STEPS)]


def test_the_transform_runs_on_the_device_and_its_draws_do_not_depend_on_the_depth():
    def noisy(batch):
        return batch.float().mul_(2).add_(torch.rand(3, device="cuda"))

    def epoch(depth):
        torch.manual_seed(0)
        loader = [torch.arange(3) for _ in range(5)]
        out = []
        for batch in DevicePrefetcher(loader, "cuda", depth, noisy):
            assert batch.is_cuda
            out.append(batch + torch.rand(3, device="cuda"))
        return torch.stack(out)

    assert torch.equal(epoch(1), epoch(4))


LAYOUTS = {
    "plain": lambda: torch.arange(12).reshape(3, 4),
    "transposed": lambda: torch.arange(12).reshape(3, 4).t(),
    "strided": lambda: torch.arange(12).reshape(3, 4)[:, ::2],
    "expanded": lambda: torch.ones(3, 1).expand(3, 4),
    "empty": lambda: torch.empty(0, 3),
    "0-d": lambda: torch.tensor(7),
    "channels last": lambda: torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "bfloat16": lambda: torch.eye(3, dtype=torch.bfloat16),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives_with_the_same_values(layout):
    tensor = LAYOUTS[layout]()
    [moved] = DevicePrefetcher([tensor], "cuda")
    assert moved.is_cuda
    assert moved.layout is tensor.layout
    assert torch.equal(moved.cpu().to_dense(), tensor.to_dense())


def test_pinned_sources_are_read_where_they_lie_and_pageable_ones_are_staged(loader):
    streams = DevicePrefetcher([], "cuda")._streams
    pinned, registered, pageable = torch.ones(3).pin_memory(), loader.batch(0)["image"], torch.ones(3)
    assert streams.pin(pinned) is pinned
    assert streams.pin(registered) is registered
    assert streams.pin(pageable).is_pinned()


def test_device_memory_does_not_grow_from_epoch_to_epoch(loader):
    prefetcher = DevicePrefetcher(loader, "cuda")
    before = torch.cuda.memory_reserved()
    for _ in range(8):
        for batch in prefetcher:
            torch.cuda._sleep(SPIN // 10)
            batch["image"].sum()
        del batch
    # 8 blocks of 4 MiB at worst, in segments of 20 MiB. A new stream in each epoch would take eight times as much.
    assert torch.cuda.memory_reserved() - before <= 64 << 20


def test_leaving_early_leaves_the_side_stream_idle(loader):
    prefetcher = DevicePrefetcher(loader, "cuda")
    for _ in prefetcher:
        torch.cuda._sleep(SPIN)
        break
    assert prefetcher._streams._side.stream.query()


def test_the_next_batch_is_copied_while_the_device_computes():
    copies = Copies(open_streams(torch.device("cuda")), depth=1)
    copies.start(torch.ones(SIZE, pin_memory=True), None)
    copies.start(torch.ones(SIZE, pin_memory=True), None)
    copies.first().batch = None
    copies.drop_taken()
    torch.cuda._sleep(20 * SPIN)
    computed = torch.cuda.Event()
    computed.record()
    copies._ahead[0].event.synchronize()
    assert not computed.query()
    torch.cuda.synchronize()


def test_a_pickled_prefetcher_still_works():
    twin = pickle.loads(pickle.dumps(DevicePrefetcher([torch.ones(1)], "cuda")))
    assert next(iter(twin)).is_cuda


def test_an_index_beyond_the_last_device_is_refused():
    with pytest.raises(DeviceError, match="cuda:99"):
        DevicePrefetcher([], "cuda:99")
