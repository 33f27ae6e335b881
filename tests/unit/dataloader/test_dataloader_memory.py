"""Held batches cost memory, never correctness and never a hang; and the memory comes back."""

import gc
import os
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import inside

from loaders import DataLoader
from loaders.errors import BufferMemoryError
from loaders.memory import arena as arena_module
from loaders.memory.arena import PAGE
from loaders.memory.slots import SlotPool

ENGINES = {
    "inline": {"num_workers": 0},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
IMAGE = (64, 64)
IMAGES_NBYTES = 4 * 64 * 64 * 4  # of a batch of four


class Pictures:
    """Images that show their index, and labels."""

    def __init__(self, length=64):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": np.full(IMAGE, index, np.float32), "label": index}


def assert_is(batch, number):
    first = number * 4
    assert batch["label"].tolist() == [first, first + 1, first + 2, first + 3]
    assert (batch["image"] == batch["label"][:, None, None]).all()


# -- held batches


@every_engine
def test_a_list_of_all_batches_is_right_and_warns_once_naming_how_much_is_held(engine, monkeypatch):
    monkeypatch.setattr("loaders.dataloader.delivery._MUCH_HELD_NBYTES", 500_000)
    loader = DataLoader(Pictures(), batch_size=4, **engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = list(loader), list(loader)
    for epoch in (first, second):
        assert len(epoch) == 16
        for number, batch in enumerate(epoch):
            assert_is(batch, number)
    held = [warning for warning in caught if "held at once" in str(warning.message)]
    [warning] = held
    depth = inside.plan_of(loader).depth(max(1, loader.num_workers))
    many = max(8, 4 * depth) + 1
    assert f"{many} batches of this loader are held at once (" in str(warning.message)
    assert "loader.holders() lists them" in str(warning.message)
    assert warning.filename == __file__
    assert inside.pool_of(loader).leased_nbytes == 32 * (IMAGES_NBYTES + PAGE)


def test_holding_little_is_no_reason_to_warn():
    assert len(list(DataLoader(Pictures(), batch_size=1))) == 64


@every_engine
def test_keeping_the_labels_of_an_epoch_does_not_keep_its_images(engine):
    loader = DataLoader(Pictures(), batch_size=4, **engine)
    labels = [batch["label"] for batch in loader]
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader).leased_nbytes == 16 * PAGE
    assert inside.pool_of(loader).arena.reserved_nbytes < 8 * IMAGES_NBYTES
    assert torch.cat(labels).tolist() == list(range(64))


@every_engine
def test_batches_kept_from_an_epoch_outlive_their_loader(engine):
    loader = DataLoader(Pictures(24), batch_size=4, **engine)
    epoch = list(loader)
    del loader
    gc.collect()
    for number, batch in enumerate(epoch):
        assert_is(batch, number)


# -- memory comes back


@every_engine
def test_memory_comes_back_while_an_epoch_goes_on_after_a_burst_of_holding(engine):
    loader = DataLoader(Pictures(4 * 400), batch_size=4, **engine)
    batches = iter(loader)
    burst = [next(batches) for _ in range(40)]
    assert inside.pool_of(loader).arena.reserved_nbytes >= 40 * IMAGES_NBYTES
    burst.clear()
    for batch in batches:
        assert batch["image"].shape == (4, *IMAGE)
    assert inside.pool_of(loader).arena.reserved_nbytes < 10 * IMAGES_NBYTES


@every_engine
@pytest.mark.parametrize("order", ["dropped first", "ended first"])
def test_memory_comes_back_after_the_epoch_has_ended_and_all_is_dropped(engine, order):
    loader = DataLoader(Pictures(4 * 40), batch_size=4, **engine)
    batches = iter(loader)
    held = [next(batches) for _ in range(39)]
    if order == "dropped first":
        held.clear()
    held += batches
    held.clear()
    del batches
    assert inside.pool_of(loader).arena.reserved_nbytes < 8 * IMAGES_NBYTES  # what the next epoch begins with


@every_engine
def test_an_iterator_that_is_dropped_half_way_keeps_no_more_than_the_next_epoch_needs(engine):
    loader = DataLoader(Pictures(), batch_size=4, **engine)
    for _ in range(5):
        next(iter(loader))
    assert inside.pool_of(loader).arena.reserved_nbytes < 8 * IMAGES_NBYTES
    assert len(list(loader)) == 16


# -- ceilings


@every_engine
def test_above_max_buffer_bytes_the_error_says_what_is_held_and_the_same_iterator_goes_on_afterwards(engine):
    loader = DataLoader(Pictures(), batch_size=4, max_buffer_bytes=5 * (IMAGES_NBYTES + PAGE) + 100_000, **engine)
    batches = iter(loader)
    held = []
    with pytest.raises(BufferMemoryError) as raised:
        held.extend(batches)
    assert isinstance(raised.value, MemoryError)
    assert "tensor.clone()" in str(raised.value)
    assert "max_buffer_bytes allows" in str(raised.value)
    assert f"{inside.pool_of(loader).leased_nbytes:,}" in str(raised.value)
    assert len(held) >= 4
    for number, batch in enumerate(held):
        assert_is(batch, number)
    delivered = len(held)
    held.clear()
    for number, batch in enumerate(batches, delivered):
        assert_is(batch, number)
    assert number == 15


@every_engine
def test_a_ceiling_that_leaves_room_for_two_batches_only_slows_down(engine):
    loader = DataLoader(
        Pictures(), batch_size=4, prefetch_factor=None, max_buffer_bytes=3 * (IMAGES_NBYTES + PAGE) + 100_000, **engine
    )
    for number, batch in enumerate(loader):
        assert_is(batch, number)
    assert number == 15


@every_engine
def test_a_loader_whose_first_batch_finds_no_room_serves_once_there_is_some(engine, monkeypatch):
    loader = DataLoader(Pictures(8), batch_size=4, **engine)
    with monkeypatch.context() as patch:
        patch.setattr(arena_module, "available_nbytes", lambda: arena_module._HEADROOM + 50_000)
        with pytest.raises(
            BufferMemoryError, match=r"65,536 bytes was asked for, 67,158,864 bytes of memory are avail"
        ):
            next(iter(loader))
    for number, batch in enumerate(loader):
        assert_is(batch, number)
    assert number == 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="memory is reserved by posix_fallocate")
def test_a_machine_that_fills_up_in_an_epoch_is_an_error_and_no_hang(monkeypatch):
    loader = DataLoader(Pictures(), batch_size=4, **ENGINES["process"])
    batches = iter(loader)
    held = [next(batches)]

    def full(fd, offset, nbytes):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(BufferMemoryError, match="No space left on device: a batch buffer of"):
            held.extend(batches)
    for number, batch in enumerate(held):
        assert_is(batch, number)
    held.clear()
    epoch = [batch["label"][0].item() for batch in loader]
    assert epoch == list(range(0, 64, 4))


def test_without_memory_for_a_task_the_error_comes_in_its_turn_and_is_no_hang(monkeypatch):
    loader = DataLoader(Pictures(), batch_size=4, **ENGINES["process"])
    batches, held, acquire = iter(loader), [], SlotPool.acquire

    def refuse_tasks(pool, sizes, *, bounded=True):
        if not bounded:
            raise BufferMemoryError("the machine is full")
        return acquire(pool, sizes)

    held.append(next(batches))
    with monkeypatch.context() as patch:
        patch.setattr(SlotPool, "acquire", refuse_tasks)
        with pytest.raises(BufferMemoryError, match="the machine is full"):
            held.extend(batches)
    for number, batch in enumerate(held):
        assert_is(batch, number)
    del batches
    assert len(list(loader)) == 16


# -- where the bytes are


class Addresses:
    """Writes into the rows it is given and says where they are."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"image": np.full(IMAGE, index, np.float32), "address": 0, "writes": 0}

    def read_into(self, index, out):
        out["image"][...] = index
        out["address"][...] = out["image"].__array_interface__["data"][0]
        out["writes"][...] += 1


@every_engine
def test_a_batch_is_the_memory_that_the_worker_wrote_once_and_the_buffers_are_a_constant_set(engine):
    loader = DataLoader(Addresses(), batch_size=4, **engine)
    seen = set()
    for number, batch in enumerate(loader):
        rows = [batch["image"][row].data_ptr() for row in range(4)]
        if number > 0:  # the samples of the first batch come before the layout of its rows is known
            # A forked worker has the slots mapped at the consumer's own addresses.
            assert batch["address"].tolist() == rows
        assert batch["image"][:, 0, 0].tolist() == list(range(4 * number, 4 * number + 4))
        seen.add(rows[0])
    assert len(seen) <= 5


@every_engine
def test_every_field_lies_inside_the_slot_in_a_range_of_its_own(engine):
    loader = DataLoader(Pictures(), batch_size=4, **engine)
    base = None
    for batch in loader:
        base = base or np.frombuffer(inside.pool_of(loader).arena.buffer, np.uint8).__array_interface__["data"][0]
        leased = {(block.offset, block.nbytes) for block in list(inside.pool_of(loader)._leases)}
        for tensor in batch.values():
            at = tensor.data_ptr() - base
            assert any(start <= at and at + tensor.nbytes <= start + nbytes for start, nbytes in leased)
            assert at % 64 == 0
        assert batch["image"].untyped_storage().data_ptr() != batch["label"].untyped_storage().data_ptr()


# -- seeing what goes on


def test_debug_mode_says_who_holds_what_from_where_and_fills_what_is_released(monkeypatch):
    monkeypatch.setenv("LOADERS_DEBUG", "slots")
    loader = DataLoader(Pictures(), batch_size=4)
    assert loader.holders() == ""
    batches = iter(loader)
    image = next(batches)["image"]
    next(batches)
    lines = loader.holders().splitlines()
    assert [line.split(",")[0] for line in lines] == ["batch 0"]
    assert "'image', taken at " in lines[0]
    assert f"{__file__}:" in lines[0]
    assert f"{IMAGES_NBYTES:,} bytes for" in lines[0]
    address, image = image.data_ptr(), None
    inside.pool_of(loader).reclaim()
    base = np.frombuffer(inside.pool_of(loader).arena.buffer, np.uint8)
    at = address - base.__array_interface__["data"][0]
    assert (base[at : at + IMAGES_NBYTES] == 0xDB).all()
    for number, batch in enumerate(batches, 2):
        assert_is(batch, number)


# -- late writers, threads, other loaders


class Slow(Pictures):
    """One sample is late: it goes on only when it is told to."""

    def __init__(self):
        super().__init__()
        self.late, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, index):
        if index == 9 and not self.late.is_set():
            self.late.set()
            self.go_on.wait(30)
            return {"image": np.full(IMAGE, -1, np.float32), "label": -1}
        return super().__getitem__(index)


def test_a_thread_that_is_late_writes_into_no_batch_of_the_next_epoch(monkeypatch):
    monkeypatch.setattr("loaders.workers.threads._GRACE_S", 0.05)
    dataset = Slow()
    loader = DataLoader(dataset, batch_size=4, **ENGINES["thread"])
    batches = iter(loader)
    next(batches)
    next(batches)
    assert dataset.late.wait(30)
    del batches
    epoch = list(loader)
    dataset.go_on.set()
    deadline_s = time.monotonic() + 30
    while any(thread.name.startswith("loaders-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    for number, batch in enumerate(epoch):
        assert_is(batch, number)
    epoch.clear()
    del batch
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader)._late == []  # its slot is used again now
    assert inside.pool_of(loader).arena.reserved_nbytes < 8 * IMAGES_NBYTES


def test_a_loader_serves_a_thread_other_than_the_one_that_made_it():
    for engine in ENGINES.values():
        loader = DataLoader(Pictures(), batch_size=4, **engine)
        epoch = []
        thread = threading.Thread(
            target=lambda loader=loader, epoch=epoch: epoch.extend(b["label"].sum() for b in loader)
        )
        thread.start()
        thread.join(60)
        assert sum(epoch) == sum(range(64))


@every_engine
def test_two_loaders_at_once_do_not_meet(engine):
    first, second = (DataLoader(Pictures(), batch_size=4, **engine) for _ in range(2))
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        assert_is(one, number)
        assert_is(other, number)
        assert one["image"].data_ptr() != other["image"].data_ptr()


@every_engine
def test_iterators_of_one_loader_on_several_threads_do_not_meet(engine):
    loader = DataLoader(Pictures(), batch_size=4, **engine)
    interval = sys.getswitchinterval()

    def work():
        for number, batch in enumerate(loader):
            assert_is(batch, number)
        return number

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            assert [each.result(60) for each in [threads.submit(work) for _ in range(3)]] == [15] * 3
    finally:
        sys.setswitchinterval(interval)
