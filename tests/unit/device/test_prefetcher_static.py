"""Batches in fixed device buffers: where they lie, how long they are valid, what they may be."""

from __future__ import annotations

import pytest
import torch
from support.batches import CountingLoader
from support.simulated_device import SimulatedDevice, prefetch

from loaders.errors import SlotStateError


@pytest.fixture
def device():
    return SimulatedDevice(seed=0)


def addresses(batches):
    """Where each batch lies."""
    found = []
    for batch in batches:
        found.append(batch.data_ptr())
        del batch
    return found


@pytest.mark.parametrize("depth", [1, 3])
def test_static_batches_lie_at_the_same_few_addresses_in_every_epoch(device, depth):
    prefetcher = prefetch(device, CountingLoader(20), depth=depth, static=True)
    first = addresses(prefetcher)
    assert len(set(first)) == depth + 2
    assert all(address in first for address in addresses(prefetcher))
    blocks = len(device.device_blocks())
    addresses(prefetcher)
    assert len(device.device_blocks()) == blocks


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch,
        lambda batch: batch[:1],
        lambda batch: batch.detach(),
        lambda batch: batch.view(torch.float64),
        lambda batch: batch.untyped_storage(),
        lambda batch: {"deep": [batch.reshape(1, 1)]},
    ],
    ids=["itself", "a slice", "detached", "another dtype", "its storage", "in containers"],
)
def test_whoever_holds_a_static_batch_until_its_memory_is_needed_is_told(device, keep):
    batches = iter(prefetch(device, CountingLoader(20), depth=2, static=True))
    held = keep(next(batches))
    with pytest.raises(SlotStateError, match=r"batch 0 .* static=True is still held.*needed for batch 4") as caught:
        list(batches)
    assert "clone" in str(caught.value)
    assert held is not None


def test_a_static_batch_that_the_loop_variable_still_names_is_no_mistake(device):
    seen = []
    for _ in range(2):
        for batch in prefetch(device, CountingLoader(9), static=True):
            image = batch  # a second name, that lives until the next round
            device.launch(lambda array: seen.append(int(array[0])), image)
    device.drain()
    assert seen == [*range(9), *range(9)]


@pytest.mark.parametrize("static", [False, True])
def test_batches_may_differ_in_size_strides_and_structure(device, static):
    batches = [
        torch.arange(6).reshape(2, 3),
        torch.arange(20).reshape(4, 5),
        [torch.arange(3), {"a": torch.arange(2.0)}],
        torch.arange(0),
        torch.arange(3)[:1],
        torch.tensor(7),
        torch.arange(40).reshape(4, 10)[:, :7],
        torch.arange(400).reshape(4, 100)[:, ::25],
        torch.zeros(3, requires_grad=True),
        torch.arange(24).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(3).expand(4, 3),
    ]
    for ours, own in zip(prefetch(device, batches, static=static), batches, strict=True):
        device.drain()
        for a, b in zip(*(torch.utils._pytree.tree_leaves(tree) for tree in (ours, own)), strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a, b)
            assert a.stride() == b.stride() or not b.is_contiguous()


@pytest.mark.parametrize("depth", [1, 3])
def test_two_iterators_of_a_static_prefetcher_are_independent_and_their_buffers_stay(device, depth):
    prefetcher = prefetch(device, CountingLoader(20), static=True, depth=depth)
    seen = []
    for _ in range(3):
        for one, other in zip(prefetcher, prefetcher, strict=True):
            assert one.data_ptr() != other.data_ptr()
            device.launch(lambda *arrays: seen.append([int(array[0]) for array in arrays]), one, other)
        del one, other
    device.drain()
    assert seen == [[number, number] for number in range(20)] * 3
    assert len(device.device_blocks()) == 2 * (depth + 2)  # the same memory in every epoch


def test_a_static_iterator_that_is_left_early_gives_its_buffers_to_the_next(device):
    prefetcher = prefetch(device, CountingLoader(20), static=True)
    for _ in range(5):
        for _ in prefetcher:
            break
    assert len(device.device_blocks()) == 4
