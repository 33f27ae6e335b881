"""Each guard of the collector against a device that punishes its absence, with the naive version beside ours.

Every row of the dataset has bytes of its own, which a kernel writes into the output late. Each output is dropped as
soon as it is added, and the next one is made in its memory.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedEvent, SimulatedReadback

from loaders import OutputCollector
from loaders.outputs import collector as collector_module
from loaders.outputs.collector import _RING, _Batch

SEEDS = range(12)
ROWS = 1000
FEATURES = np.random.default_rng(0).integers(0, 256, (ROWS, 6), dtype=np.uint8)


def evaluate(device, collector, order, choose, streams, device_indices):
    """A loop that adds the rows in `order`, in batches of 1 to 4, on any of its streams. Returns the steps it took."""
    compute = [device.current, *(device.new_stream() for _ in range(streams - 1))]
    steps = 0
    while len(order):
        size = choose.randint(1, 4)
        rows, order = order[:size], order[size:]
        with device.on(choose.choice(compute)):
            features = device.empty((len(rows), 6), torch.uint8, device.current)
            numbers = device.empty((len(rows),), torch.int64, device.current)
            device.launch(lambda out, rows=rows: np.copyto(out, FEATURES[rows]), features)
            device.launch(lambda out, rows=rows: np.copyto(out, rows), numbers)
            outputs = {"x": features, "numbers": numbers, "host": torch.tensor(rows)}
            index = numbers if device_indices and choose.random() < 0.5 else torch.tensor(rows)
            collector.add(outputs, index)
            if index is not numbers:
                index.fill_(-1)
            outputs["host"].fill_(-1)
            del features, numbers, outputs, index
        steps += 1
    return steps


def wrong_rows(seed, readback_type=SimulatedReadback, prepare=None, streams=1, path=None, device_indices=False):
    """How many rows came back other than they were made, the steps, and the device."""
    device, choose = SimulatedDevice(seed), random.Random(seed)
    collector = OutputCollector(ROWS, path)
    collector._readback_of = readback_type(device).of
    if prepare is not None:
        prepare(collector)
    order = np.random.default_rng(seed).permutation(ROWS)
    steps = evaluate(device, collector, order, choose, streams, device_indices)
    result = collector.result()
    assert np.array_equal(result["host"], np.arange(ROWS))
    wrong = (result["x"] != FEATURES).any(1) | (result["numbers"] != np.arange(ROWS))
    return int(wrong.sum()), steps, device


@pytest.mark.parametrize("streams", [1, 3])
def test_no_row_is_ever_read_before_it_was_made_or_after_its_memory_was_used_again(tmp_path, streams):
    total = 0
    for seed in SEEDS:
        path = tmp_path / str(seed) if seed % 3 == 0 else None
        wrong, steps, device = wrong_rows(seed, streams=streams, path=path, device_indices=True)
        assert (wrong, device.late_reads) == (0, 0), f"seed {seed}"
        total += steps
    assert total > 4000


class NoWaitForCompute(SimulatedReadback):
    def wait_for_compute(self):
        pass


def let_sources_go(collector, monkeypatch):
    monkeypatch.setattr(
        collector_module, "_Batch", lambda sources, hosts, events, buffers: _Batch([], hosts, events, buffers)
    )


def use_buffers_again_at_once(collector, monkeypatch):
    class OneForAll(list):
        def pop(self):
            return self[0]

    collector._idle = OneForAll([{}])


def read_without_waiting(collector, monkeypatch):
    monkeypatch.setattr(_Batch, "is_there", lambda batch: True)
    monkeypatch.setattr(_Batch, "wait", lambda batch: None)


@pytest.mark.parametrize("seed", SEEDS[:4])
@pytest.mark.parametrize("naive", [let_sources_go, use_buffers_again_at_once, read_without_waiting])
def test_a_collector_without_this_guard_collects_wrong_bytes(monkeypatch, naive, seed):
    wrong, _, _ = wrong_rows(seed, prepare=lambda collector: naive(collector, monkeypatch))
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_a_collector_that_does_not_wait_for_the_kernels_collects_wrong_bytes(seed):
    wrong, _, _ = wrong_rows(seed, NoWaitForCompute)
    assert wrong > 0


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_page_locked_memory_is_bounded_by_the_ring_however_long_the_dataset(seed):
    _, _, device = wrong_rows(seed)
    # Three tensors of a batch at most, each replaced as batches of 1, 2, 3 and 4 rows ask for more.
    assert sum(block.is_leased for block in device.host_blocks()) == 0
    assert len(device.host_blocks()) <= _RING * 3 * 4
    assert sum(block.memory.nbytes for block in device.host_blocks()) <= _RING * (1 + 2 + 3 + 4) * (6 + 8 + 8)


# -- waits


class Sleeping(SimulatedDevice):
    """Nothing runs but what somebody waits for."""

    def let_work_run(self):
        self._settle_freed()


@pytest.fixture
def waits(monkeypatch):
    """How long the queue was at each wait for an event that was not reached."""
    lengths = []
    synchronize = SimulatedEvent.synchronize

    def counted(event):
        if not event.reached:
            lengths.append(len(event.stream.queue))
        synchronize(event)

    monkeypatch.setattr(SimulatedEvent, "synchronize", counted)
    return lengths


class Counting(SimulatedReadback):
    made = 0

    def empty(self, shape, dtype):
        self.made += 1
        return super().empty(shape, dtype)


def sleeping_collector():
    device = Sleeping(0)
    readback = Counting(device)
    collector = OutputCollector()
    collector._readback_of = readback.of

    def add(row):
        output = device.empty((1, 6), torch.uint8, device.current)
        device.launch(lambda out: np.copyto(out, FEATURES[row]), output)
        collector.add(output, [row])

    return collector, add, readback


def test_the_host_waits_only_when_the_ring_is_full_and_then_for_the_oldest_batch(waits):
    collector, add, readback = sleeping_collector()
    for row in range(_RING):
        add(row)
    assert waits == []
    add(_RING)
    assert len(waits) == 2  # for the copy, and by it for the kernel
    assert len(collector._under_way) == _RING
    for row in range(20):
        add(row)
    assert readback.made == _RING


def test_the_result_takes_one_wait(waits):
    collector, add, _ = sleeping_collector()
    for row in range(_RING):
        add(row)
    side = collector._under_way[-1].events[0].stream
    result = collector.result()
    assert np.array_equal(result, FEATURES[:_RING])
    assert not side.queue
    # One for the last copy; the others are the device's own: each copy waits for its kernel.
    assert len(waits) == 1 + _RING


# -- where there is no readback


def test_where_there_are_no_streams_copies_wait_by_themselves():
    assert collector_module.readback_of(torch.empty(1)) is None
    assert collector_module.readback_of(torch.empty(1, device="meta")) is None
