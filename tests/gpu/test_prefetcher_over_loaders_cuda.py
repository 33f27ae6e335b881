"""The prefetcher on a real CUDA device over our loader and torch's: what it copies from, what it copies to, its ends."""

from __future__ import annotations

import gc

import pytest
import torch
from support.pictures import Pictures

from loaders import DataLoader, DevicePrefetcher, SlotStateError
from loaders.device.streams import _TorchStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

BATCH = 4
STEPS = 24
SPIN = 10_000_000  # clock cycles, about 5 ms: many times the copy of a batch

OURS = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
    "pinning": {"num_workers": 2, "multiprocessing_context": "fork", "pin_memory": True},
    "persistent": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}
STOCK = {
    "inline": {},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "inline, pinned": {"pin_memory": True},
    "fork, pinned": {"num_workers": 2, "multiprocessing_context": "fork", "pin_memory": True},
}


def ours(name="inline", steps=STEPS):
    return DataLoader(Pictures(steps * BATCH), BATCH, **OURS[name])


def stock(name, steps=STEPS):
    return torch.utils.data.DataLoader(Pictures(steps * BATCH), BATCH, **STOCK[name])


def seen(batches, spin=SPIN):
    """What slow kernels see of each batch: the least and the largest pixel of the first and of the last picture."""
    found = []
    for batch in batches:
        image = batch["image"]
        torch.cuda._sleep(spin)
        ends = torch.stack([image[0].min(), image[0].max(), image[-1].min(), image[-1].max()])
        found.append(torch.cat([ends.long(), batch["label"][[0, -1]]]))
        del batch, image
    return torch.stack(found).tolist()


def expected(steps=STEPS):
    firsts = range(0, steps * BATCH, BATCH)
    return [[first, first, first + BATCH - 1, first + BATCH - 1, first, first + BATCH - 1] for first in firsts]


@pytest.fixture
def sources(monkeypatch):
    """(tensor of the loader, where the copy engine reads it) of every tensor."""
    found = []
    pin = _TorchStreams.pin

    def noted(self, tensor):
        pinned = pin(self, tensor)
        found.append((tensor.data_ptr(), pinned.data_ptr(), pinned.is_pinned()))
        return pinned

    monkeypatch.setattr(_TorchStreams, "pin", noted)
    return found


# -- what is read


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("name", OURS)
def test_over_our_loader_the_slots_themselves_are_read_and_every_batch_is_right(name, static, sources):
    prefetcher = DevicePrefetcher(ours(name), "cuda", static=static)
    for _ in range(2):
        assert seen(prefetcher) == expected()
    assert len(sources) == 2 * 2 * STEPS
    assert all(theirs == read and is_pinned for theirs, read, is_pinned in sources)


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("name", STOCK)
def test_over_torchs_loader_what_is_not_pinned_is_staged_and_every_batch_is_right(name, static, sources):
    prefetcher = DevicePrefetcher(stock(name), "cuda", static=static)
    for _ in range(2):
        assert seen(prefetcher) == expected()
    assert all(is_pinned for *_, is_pinned in sources)
    assert all((theirs == read) == ("pinned" in name) for theirs, read, _ in sources)


@pytest.mark.parametrize("depth", [1, 4])
def test_without_a_slow_device_and_at_other_depths_every_batch_is_right(depth):
    assert seen(DevicePrefetcher(ours("fork"), "cuda", depth), spin=0) == expected()


# -- static buffers


def test_static_batches_replay_one_graph_per_address_in_every_epoch():
    prefetcher, graphs = DevicePrefetcher(ours("fork"), "cuda", static=True), {}
    for _ in range(3):
        found = []
        for batch in prefetcher:
            address = batch["image"].data_ptr(), batch["label"].data_ptr()
            if address not in graphs:
                graphs[address] = captured(batch)
            graph, out = graphs[address]
            torch.cuda._sleep(SPIN)
            graph.replay()
            found.append(out.clone())
            del batch
        assert torch.stack(found).tolist() == [[first, last, first + last] for first, *_, last in expected()]
    assert len(graphs) == prefetcher.depth + 2


def captured(batch):
    """A graph that reads the first and the last picture of a batch where it lies, and its output."""

    def kernels():
        first, last = batch["image"][0].max().long(), batch["image"][-1].min().long()
        return torch.stack([first, last, batch["label"][0] + batch["label"][-1]])

    kernels()  # what a first call sets up is not to be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels()
    return graph, out


def test_static_batches_take_no_new_memory_after_the_first_epoch():
    prefetcher = DevicePrefetcher(ours(), "cuda", static=True)
    seen(prefetcher)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for batch in prefetcher:
        del batch
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_whoever_holds_a_static_batch_until_its_memory_is_needed_is_told():
    batches = iter(DevicePrefetcher(ours(), "cuda", static=True))
    held = next(batches)["image"].detach()
    with pytest.raises(SlotStateError, match=r"batch 0 .* static=True is still held"):
        for batch in batches:
            del batch
    assert held[0].min().item() == held[0].max().item() == 0


# -- ends


@pytest.mark.parametrize("name", ["inline", "thread", "fork"])
def test_leaving_early_leaves_no_copy_under_way_and_no_slot_held(name):
    loader = ours(name)
    prefetcher = DevicePrefetcher(loader, "cuda")
    for step in (0, 3):
        for number, batch in enumerate(prefetcher):
            torch.cuda._sleep(20 * SPIN)
            batch["image"].sum()
            del batch
            if number == step:
                break
        assert prefetcher._streams._side.query()
        gc.collect()
        loader._pool.reclaim()
        assert loader._pool.leased_count == 0
    assert seen(prefetcher) == expected()


def test_batches_that_are_held_stay_as_they_are():
    held = list(DevicePrefetcher(ours("fork"), "cuda"))
    torch.cuda.synchronize()
    assert seen(held, spin=0) == expected()
