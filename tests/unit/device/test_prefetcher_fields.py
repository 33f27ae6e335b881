"""Padded and ragged fields on their way to the device and back."""

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedStreams

from loaders import DataLoader, DevicePrefetcher, Field, Padded, Ragged, to_numpy


class Photos:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        boxes = np.full((index % 4, 4), index, np.float32)
        return {"n": index, "boxes": boxes, "crop": np.full((2 + index % 3, 5), index, np.uint8)}


FIELDS = {"boxes": Field(pad=-1), "crop": Field(ragged=True)}


def check(batch):
    assert (type(batch["boxes"]), type(batch["crop"])) == (Padded, Ragged)
    for row, index in enumerate(batch["n"].tolist()):
        assert batch["boxes"].counts[row] == index % 4
        assert (batch["boxes"].values[row][batch["boxes"].mask[row]] == index).all()
        assert batch["crop"][row].shape == (2 + index % 3, 5)
        assert (batch["crop"][row] == index).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("workers", [0, 2])
def test_they_keep_their_types_and_values_on_the_device(seed, workers):
    prefetcher = DevicePrefetcher(DataLoader(Photos(), 4, fields=FIELDS, num_workers=workers), "cpu")
    device = SimulatedDevice(seed=seed)
    prefetcher._streams = SimulatedStreams(device)
    numbers = []
    for batch in prefetcher:
        device.drain()  # so that the host may look
        check(batch)
        numbers += batch["n"].tolist()
    assert numbers == list(range(24))


def test_on_the_cpu_the_loaders_own_batches_come_through():
    for batch in DevicePrefetcher(DataLoader(Photos(), 4, fields=FIELDS), "cpu"):
        check(batch)


def test_they_come_back_as_arrays_of_ones_own():
    for batch in DataLoader(Photos(), 4, fields=FIELDS):
        arrays = to_numpy(batch)
        check(arrays)
        assert isinstance(arrays["boxes"].mask, np.ndarray)
        assert not np.shares_memory(arrays["crop"][0], batch["crop"][0].numpy())


def test_pinning_keeps_their_types(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: pinned.append(tensor) or tensor.clone())
    for batch in DataLoader(Photos(), 4, fields=FIELDS, pin_memory=True):
        check(batch)
        assert len(pinned) == 7
        pinned.clear()
