"""The prefetcher over whole loaders on a real CUDA device: ours with every engine, torch's pinned and not, static."""

from __future__ import annotations

import gc

import pytest
import torch
from support.pictures import Pictures

import loaders
from loaders import CutMix, DevicePrefetcher, MixUp, Normalize, OutputCollector, ScalarLog
from loaders.errors import SlotStateError
from loaders.memory.registry import lease_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

BATCH = 4
STEPS = 24
SPIN = 20_000_000  # clock cycles, about 10 ms: many times the copy of a batch


def ours(**options):
    return loaders.DataLoader(Pictures(STEPS * BATCH), BATCH, **options)


def torchs(**options):
    return torch.utils.data.DataLoader(Pictures(STEPS * BATCH), BATCH, **options)


LOADERS = {
    "ours inline": ours,
    "ours threads": lambda: ours(num_workers=2, worker_method="thread"),
    "ours fork": lambda: ours(num_workers=2, multiprocessing_context="fork"),
    "ours spawn": lambda: ours(num_workers=2, multiprocessing_context="spawn"),
    "ours pinned": lambda: ours(pin_memory=True),
    "torch": lambda: torchs(num_workers=2),
    "torch pinned": lambda: torchs(num_workers=2, pin_memory=True),
}


def seen(prefetcher):
    """Per batch the labels, the least and the greatest pixel of each image, as the device sees them when it is late."""
    found = []
    for batch in prefetcher:
        assert all(tensor.is_cuda for tensor in batch.values())
        torch.cuda._sleep(SPIN)
        pixels = batch["image"].flatten(1)[:, ::3].to(torch.int64)
        found.append(torch.stack([batch["label"], pixels[:, 0], pixels[:, -1]], dim=1))
        del batch, pixels
    return torch.cat(found).tolist()


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_device_that_is_late_sees_every_batch_as_it_was_written(loader, static):
    prefetcher = DevicePrefetcher(LOADERS[loader](), "cuda", static=static)
    for _ in range(2):
        found = seen(prefetcher)
        assert [row[0] for row in found] == list(range(STEPS * BATCH))
        assert all(first == label % 256 for label, first, _ in found)


@pytest.mark.parametrize("loader", [name for name in LOADERS if name.startswith("ours")])
def test_the_copy_engine_reads_the_slots_themselves(loader):
    prefetcher = DevicePrefetcher(LOADERS[loader](), "cuda")
    pin, staged = prefetcher._streams.pin, []

    def watched(tensor):
        staged.append(not tensor.is_pinned() or lease_at(tensor.data_ptr()) is None)
        return pin(tensor)

    prefetcher._streams.pin = watched
    for _ in prefetcher:
        pass
    assert sum(staged) <= 2  # fields of the first batch, which tells what a slot looks like


def test_static_batches_feed_a_graph_for_each_address():
    graphs, outs, sums = {}, {}, []
    prefetcher = DevicePrefetcher(ours(num_workers=2), "cuda", static=True, depth=2)
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for batch in prefetcher:
        address = batch["image"].data_ptr()
        if address not in graphs:
            image = batch["image"]
            torch.cuda.synchronize()
            graphs[address] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[address]):
                outs[address] = image.sum(dtype=torch.int64)
            del image
        graphs[address].replay()
        sums.append(outs[address].clone())
        total += batch["image"].sum(dtype=torch.int64)
        del batch
    assert len(graphs) <= 4 + 1  # the first batch may have grown its buffers
    assert int(torch.stack(sums).sum()) == int(total)


def test_whoever_holds_a_static_batch_is_told():
    with pytest.raises(SlotStateError, match="still held"):
        [batch["image"][0] for batch in DevicePrefetcher(ours(), "cuda", static=True)]


def test_batches_that_are_kept_stay_as_they_are():
    kept = list(DevicePrefetcher(ours(num_workers=2), "cuda"))
    assert [int(batch["label"][0]) for batch in kept] == list(range(0, STEPS * BATCH, BATCH))
    assert len({batch["image"].data_ptr() for batch in kept}) == STEPS


def test_leaving_early_and_again_leaves_nothing_in_flight_and_the_next_epoch_whole():
    loader = ours(num_workers=2)
    prefetcher = DevicePrefetcher(loader, "cuda")
    for stop in (1, 5):
        for step, _ in enumerate(prefetcher, start=1):
            torch.cuda._sleep(SPIN)
            if step == stop:
                break
        assert prefetcher._streams._side.stream.query()
    gc.collect()
    assert [row[0] for row in seen(prefetcher)] == list(range(STEPS * BATCH))


def test_a_capture_beside_a_resting_loader_is_not_disturbed_by_batches_that_are_dropped():
    loader = ours(pin_memory=True)
    kept = list(loader)
    copies = [batch["image"].to("cuda", non_blocking=True) for batch in kept]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = copies[0].sum(dtype=torch.int64)
        kept.clear()
    graph.replay()
    assert int(out) == int(copies[0].sum(dtype=torch.int64))


# -- what runs beside the model


class NoWait:
    """Inside, whatever waits for the device is an error."""

    def __enter__(self):
        self.before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode(self.before)


TRANSFORMS = {
    "Normalize": lambda: Normalize((0.5,) * 3, (0.25,) * 3),
    "MixUp": lambda: MixUp(num_classes=STEPS * BATCH),
    "CutMix": lambda: CutMix(num_classes=STEPS * BATCH),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_wait_for_nothing_after_their_first_call(name):
    transform = TRANSFORMS[name]()
    [batch, *_] = DevicePrefetcher(
        ours(), "cuda", transform=None if name == "Normalize" else Normalize((0.5,) * 3, (0.25,) * 3)
    )
    for _ in range(3):
        transform(batch)
    torch.cuda.synchronize()
    with NoWait():
        for _ in range(5):
            transform(batch)


def test_logs_and_collectors_wait_for_nothing_between_their_readings():
    log, collector = ScalarLog(every=1000), OutputCollector()
    loss, output = torch.ones((), device="cuda"), torch.ones(BATCH, 8, device="cuda")
    for step in range(8):  # its buffers are made
        log.add({"loss": loss})
        collector.add(output, torch.arange(step * BATCH, (step + 1) * BATCH))
    torch.cuda.synchronize()
    with NoWait():
        for step in range(8, 10):
            log.add({"loss": loss})
            collector.add(output, torch.arange(step * BATCH, (step + 1) * BATCH))
    assert collector.result().shape == (10 * BATCH, 8)
