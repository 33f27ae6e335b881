"""Padded and ragged fields on their way to the device and back."""

import dataclasses

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedStreams
from torch.nn.utils.rnn import pack_sequence

from loaders import DataLoader, DevicePrefetcher, Field, Padded, Ragged, to_numpy
from loaders.device import streams as streams_module


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
    monkeypatch.setattr("loaders.dataloader.loader.open_accelerator", lambda: None)  # there is none after all
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: pinned.append(tensor) or tensor.clone())
    for batch in DataLoader(Photos(), 4, fields=FIELDS, pin_memory=True):
        check(batch)
        assert len(pinned) == 7
        pinned.clear()


class Tagged(torch.Tensor):
    """A tensor of a class of its own, as torchvision has them."""


class Notes:
    """No tensor and no container, but it can be pinned."""

    pinned = False

    def pin_memory(self):
        notes = Notes()
        notes.pinned = True
        return notes


@dataclasses.dataclass
class Graph:
    """A container of ours and a leaf of torch's, because it pins itself."""

    nodes: torch.Tensor
    pinned: bool = False

    def pin_memory(self):
        return Graph(self.nodes, pinned=True)


AWKWARD = {
    "packed": lambda: pack_sequence([torch.ones(3, 2), torch.ones(5, 2)], enforce_sorted=False),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "subclass": lambda: torch.ones(3).as_subclass(Tagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conj": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", AWKWARD)
def test_tensors_that_are_more_than_bytes_at_strides_are_left_to_torch(kind, monkeypatch):
    copied = []

    class Streams(SimulatedStreams):
        _pins = True
        pin = streams_module._TorchStreams.pin

        def copy(self, tensor, out=None):
            assert out is None
            copied.append(tensor)
            return tensor

        def record_stream(self, tensor):
            pass

    source = AWKWARD[kind]()
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory=False: real(tensor))
    prefetcher = DevicePrefetcher([source], "cpu")
    prefetcher._streams = Streams(SimulatedDevice(0))
    [moved] = prefetcher
    assert type(moved) is type(source)
    if kind == "packed":
        assert moved.batch_sizes is source.batch_sizes  # torch wants it on the CPU
        assert len(copied) == 3
    else:
        assert copied == [moved] if kind not in ("conj", "requires grad") else len(copied) == 1


def test_what_can_pin_itself_is_asked_to(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("loaders.dataloader.loader.open_accelerator", lambda: None)  # there is none after all
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    samples = [torch.tensor(1)]
    loader = DataLoader(
        samples, pin_memory=True, collate_fn=lambda _: [Notes(), Graph(torch.tensor(5)), {"n": torch.tensor(7)}, "text"]
    )
    [[notes, graph, named, text]] = loader
    assert notes.pinned
    assert graph.pinned
    assert (int(graph.nodes), int(named["n"]), text) == (5, 8, "text")
