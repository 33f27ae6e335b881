"""Slots of `DataLoader(pin_memory=True)` on a real CUDA device: page-locked where they lie, and read before reuse.

A spin in front of the copies puts the device behind the host by more than the host takes for all batches: a slot that
is written too early shows as wrong bytes, every time.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import warnings

import pytest
import torch
from support import inside
from support.numpy_datasets import Modules
from support.pictures import Pictures

import loaders
from loaders import DataLoader
from loaders.errors import DeviceError
from loaders.memory import accelerator
from loaders.memory.accelerator import Accelerator
from loaders.memory.blocks import BlockState
from loaders.memory.device_reads import DeviceReads
from loaders.memory.registry import lease_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

BATCH = 4
STEPS = 16
SPIN = 1_000_000_000  # clock cycles, about half a second

ENGINES = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "spawn": {"num_workers": 2, "multiprocessing_context": "spawn"},
}


def pinned_loader(engine="inline", length=STEPS * BATCH, **options):
    return DataLoader(Pictures(length), BATCH, pin_memory=True, **ENGINES[engine], **options)


def base_of(arena):
    return ctypes.addressof(ctypes.c_char.from_buffer(arena.buffer))


def lies_in(arena, tensor):
    return 0 <= tensor.data_ptr() - base_of(arena) < arena.capacity


def is_locked(arena, offset):
    return torch.frombuffer(arena.buffer, dtype=torch.uint8, count=1, offset=offset).is_pinned()


# -- page-locking


@pytest.mark.parametrize("engine", ENGINES)
def test_every_tensor_of_a_batch_is_page_locked_where_the_worker_wrote_it(engine):
    loader = pinned_loader(engine)
    for _ in range(2):
        labels = []
        for batch in loader:
            for tensor in batch.values():
                assert tensor.is_pinned()
                assert lies_in(inside.pool_of(loader).arena, tensor)
            assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
            labels += batch["label"].tolist()
        assert labels == list(range(STEPS * BATCH))


def test_slots_that_are_added_while_batches_are_held_are_page_locked_too():
    loader = pinned_loader(length=40 * BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how many are held
        held = list(loader)
    assert len({batch["image"].data_ptr() for batch in held}) == 40
    assert all(
        tensor.is_pinned() and lies_in(inside.pool_of(loader).arena, tensor)
        for each in held
        for tensor in each.values()
    )


def test_pages_are_unlocked_when_the_loader_is_gone_and_those_of_a_kept_batch_when_it_is():
    loader = pinned_loader()
    batches = list(loader)
    arena = inside.pool_of(loader).arena
    offsets = {batch["image"].data_ptr() - base_of(arena) for batch in batches}
    kept = batches[3]["image"]
    last = kept.data_ptr() - base_of(arena)
    assert all(is_locked(arena, offset) for offset in offsets)
    del batches, loader
    gc.collect()
    assert {offset for offset in offsets if is_locked(arena, offset)} == {last}
    assert kept.is_pinned()
    del kept
    gc.collect()
    assert not is_locked(arena, last)


# -- page-locking refused


@pytest.fixture
def refusing(monkeypatch):
    """The driver refuses each range, because it is registered already; afterwards it is not registered at all."""
    page_lock = Accelerator.page_lock

    def registered_twice(self, address, nbytes):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        try:
            page_lock(self, address, nbytes)
        finally:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

    monkeypatch.setattr(Accelerator, "page_lock", registered_twice)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_page_locking_is_refused_it_is_said_once_and_batches_are_staged(refusing, engine):
    loader, labels = pinned_loader(engine), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for batch in loader:
                for tensor in batch.values():
                    assert tensor.is_pinned()
                    assert not lies_in(inside.pool_of(loader).arena, tensor)
                assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
                labels += batch["label"].tolist()
    assert labels == 2 * list(range(STEPS * BATCH))
    [said] = [str(each.message) for each in caught if "page-locked" in str(each.message)]
    assert "cudaHostRegister says" in said
    # The refusal is not raised by whoever uses the device next.
    assert torch.ones(8, device="cuda").sum().item() == 8


@pytest.mark.parametrize("forgets", [True, False])
def test_a_refusal_is_forgotten_or_the_next_kernel_raises_it(monkeypatch, forgets):
    if not forgets:
        monkeypatch.setattr(accelerator, "_forget_last_error", lambda: None)
    torch.ones(1, device="cuda")
    memory = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    try:
        with pytest.raises(DeviceError, match="cudaHostRegister says"):
            Accelerator(torch.device("cuda")).page_lock(memory.data_ptr(), memory.nbytes)
        if not forgets:
            with pytest.raises(RuntimeError, match="CUDA error"):
                torch.ones(1, device="cuda")
        assert torch.ones(8, device="cuda").sum().item() == 8
    finally:
        torch.cuda.check_error(cudart.cudaHostUnregister(memory.data_ptr()))


# -- users' own copies


class NoEvents(DeviceReads):
    def begin(self, block, streams):
        super().begin(block, ())


def wrong_batches(engine="inline", stream=None, names_stream=False):
    """Copy every batch, drop it at once. Returns (how many arrived wrong, whether the host was ahead of the device)."""
    loader = pinned_loader(engine)
    for batch in loader:  # page-locking may wait for the device: from here on there is little of it
        del batch
    found = torch.zeros(STEPS, BATCH, 128, 128, 3, dtype=torch.uint8, device="cuda")
    copies_on = stream or torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(copies_on):
        torch.cuda._sleep(SPIN)
    step = 0
    for batch in loader:
        with torch.cuda.stream(copies_on):
            found[step].copy_(batch["image"], non_blocking=True)
        if names_stream:
            loaders.record_stream(batch, stream)
        del batch
        step += 1
    was_ahead = not copies_on.query()
    torch.cuda.synchronize()
    assert step == STEPS
    expected = torch.arange(STEPS * BATCH, device="cuda").reshape(STEPS, BATCH, 1, 1, 1)
    return int((found != expected).flatten(1).any(1).sum()), was_ahead


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slot_is_not_written_before_the_device_has_read_it(engine):
    wrong, _ = wrong_batches(engine)
    assert wrong == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_without_events_slots_are_overwritten_before_they_are_read(monkeypatch, engine):
    monkeypatch.setattr("loaders.memory.slots.DeviceReads", NoEvents)
    wrong, was_ahead = wrong_batches(engine)
    assert was_ahead
    assert wrong > 0


@pytest.mark.parametrize("names_stream", [True, False])
def test_a_stream_that_is_never_current_is_waited_for_if_it_is_named_and_only_then(names_stream):
    wrong, was_ahead = wrong_batches(stream=torch.cuda.Stream(), names_stream=names_stream)
    if names_stream:
        assert wrong == 0
    else:
        assert was_ahead
        assert wrong > 0


def test_a_block_is_device_reading_from_its_last_view_until_its_copy_is_done():
    loader = pinned_loader()
    batches = iter(loader)
    image = next(batches)["image"]
    block = lease_at(image.data_ptr()).block
    target = torch.empty_like(image, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN)
    target.copy_(image, non_blocking=True)
    assert block.state is BlockState.LEASED
    del image
    inside.pool_of(loader).reclaim()
    assert block.state is BlockState.DEVICE_READING
    torch.cuda.synchronize()
    inside.pool_of(loader).reclaim()
    assert block.state is BlockState.FREE


# -- workers


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_no_context_on_the_device(method):
    torch.ones(1, device="cuda")
    loader = DataLoader(Pictures(64 * BATCH), BATCH, pin_memory=True, num_workers=4, multiprocessing_context=method)
    for batch in loader:  # what this process needs for it is taken
        del batch
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    least = free_before
    for batch in loader:
        least = min(least, torch.cuda.mem_get_info()[0])
        del batch
    # A context takes some hundred MB; four workers would have four.
    assert free_before - least < 100 << 20


def test_spawned_workers_of_a_pinning_loader_import_no_torch():
    loader = DataLoader(Modules(), 2, pin_memory=True, num_workers=2, multiprocessing_context="spawn")
    heavy = [name for batch in loader for name in batch["heavy"]]
    assert len(heavy) == 4
    assert not any("torch" in name for name in heavy)
