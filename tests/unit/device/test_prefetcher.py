"""What the prefetcher promises apart from the hazards: structure, order, ends, delegation, one script for both."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from support.batches import CountingLoader, Pair, Sample
from support.simulated_device import SimulatedDevice, SimulatedStreams, prefetch
from torch.utils.data import DataLoader, TensorDataset

from loaders import DevicePrefetcher
from loaders.device import prefetcher as prefetcher_module
from loaders.device.streams import _NoStreams
from loaders.errors import DeviceError


@pytest.fixture
def device():
    return SimulatedDevice(seed=0)


def values(device, batches):
    """What kernels see of each batch."""
    seen = []
    for batch in batches:
        device.launch(lambda array: seen.append(int(array[0])), batch)
    device.drain()
    return seen


# -- on the CPU ------------------------------------------------------------------------------------------------------


def test_on_the_cpu_the_loaders_own_batches_come_through():
    batches = [{"image": torch.zeros(2)}, "anything"]
    assert all(ours is own for ours, own in zip(DevicePrefetcher(batches, "cpu"), batches, strict=True))


def test_on_the_cpu_the_transform_is_applied_and_nothing_is_pulled_ahead():
    loader = CountingLoader(5)
    batches = iter(DevicePrefetcher(loader, torch.device("cpu"), transform=lambda batch: batch + 10))
    assert next(batches).item() == 10
    assert loader.pulled == 1


# -- batches ---------------------------------------------------------------------------------------------------------


def test_tensors_move_wherever_they_sit_and_anything_else_is_the_same_object(device):
    array = np.arange(3)
    batch = {
        "pair": Pair(torch.tensor([1, 2]), ["a", None]),
        "list": [torch.tensor([[3.5]]), (array,)],
        "sample": Sample(torch.tensor([True]), "cat"),
    }
    [moved] = prefetch(device, [batch])
    device.drain()
    assert type(moved["pair"]) is Pair
    assert isinstance(moved["sample"], Sample)
    for ours, own in (
        (moved["pair"].image, batch["pair"].image),
        (moved["list"][0], batch["list"][0]),
        (moved["sample"].image, batch["sample"].image),
    ):
        assert device.block_of(ours).stream is not None
        assert ours.dtype == own.dtype
        assert torch.equal(ours, own)
    assert moved["pair"].label == ["a", None]
    assert moved["list"][1][0] is array
    assert moved["sample"].name == "cat"


def test_a_tensor_that_is_pinned_is_read_where_it_lies(device):
    pinned = device.empty((4,), torch.uint8, stream=None).fill_(7)
    list(prefetch(device, [pinned]))
    assert len(device.host_blocks()) == 1


def test_a_tensor_that_is_on_the_device_is_handed_out_as_it_is(device):
    resident = device.empty((4,), torch.uint8, device.current)
    [batch] = prefetch(device, [resident])
    assert batch.data_ptr() == resident.data_ptr()


def test_the_transform_gets_the_copied_batch_on_the_stream_of_the_loop(device):
    seen = []

    def transform(batch):
        device.launch(lambda array: seen.append(array.tolist()), batch)
        return "transformed"

    assert list(prefetch(device, [torch.tensor([5])], transform=transform)) == ["transformed"]
    device.drain()
    assert seen == [[5]]


# -- how far ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_batches_are_on_their_way_while_one_is_in_use(device, depth):
    loader = CountingLoader(20)
    for step, _ in enumerate(prefetch(device, loader, depth=depth)):
        assert loader.pulled == min(20, step + 1 + depth)


@pytest.mark.parametrize("depth", [0, -1, 1.5, None])
def test_a_depth_that_is_no_positive_integer_is_refused(depth):
    with pytest.raises(ValueError, match=r"depth=.*1 or more"):
        DevicePrefetcher([], "cpu", depth=depth)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_every_batch_comes_once_and_in_order_in_every_epoch(device, n):
    prefetcher = prefetch(device, CountingLoader(n))
    for _ in range(3):
        assert values(device, prefetcher) == list(range(n))


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_at", [0, 1, 4])
def test_an_error_of_the_loader_comes_after_the_batches_before_it(device, error_at):
    batches = iter(prefetch(device, CountingLoader(9, error_at)))
    assert [next(batches) is not None for _ in range(error_at)] == [True] * error_at
    with pytest.raises(OSError, match=f"batch {error_at} cannot be read"):
        next(batches)
    assert next(batches, None) is None


def test_a_failed_transform_raises_at_its_batch_and_leaves_nothing_under_way(device):
    prefetcher = prefetch(device, CountingLoader(9), transform=lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(prefetcher))
    assert not prefetcher._streams.side.queue


def test_an_interrupt_of_the_loader_is_not_put_off(device):
    def interrupted():
        yield torch.tensor([0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(iter(prefetch(device, interrupted())))


def test_no_reference_to_a_batch_or_to_the_loaders_iterator_stays_behind(device):
    class Batches:
        def __init__(self):
            self.left = 3

        def __iter__(self):
            return self

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise OSError("the end")
            return torch.tensor([self.left])

    class Loader:
        def __iter__(self):
            batches = Batches()
            self.last = weakref.ref(batches)
            return batches

    loader = Loader()
    prefetcher = prefetch(device, loader)
    gc.disable()  # what only the collector frees would keep a loader's slots for long
    try:
        for batch in prefetcher:
            handed_out = weakref.ref(batch)
            break
        del batch
        assert handed_out() is None
        assert loader.last() is None
        with pytest.raises(OSError, match="the end"):
            list(prefetcher)
        assert loader.last() is None
    finally:
        gc.enable()


def test_the_batch_in_use_is_referred_to_by_its_user_alone(device):
    batches = iter(prefetch(device, CountingLoader(9)))
    batch = next(batches)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None


def test_nested_loops_over_one_prefetcher_are_independent(device):
    prefetcher = prefetch(device, [torch.tensor([step]) for step in range(4)])
    seen = []
    for outer in prefetcher:
        device.launch(lambda array: seen.append(("outer", int(array[0]))), outer)
        for inner in prefetcher:
            device.launch(lambda array: seen.append(("inner", int(array[0]))), inner)
    device.drain()
    assert seen == [pair for step in range(4) for pair in [("outer", step), *[("inner", i) for i in range(4)]]]


def test_there_is_one_side_stream_for_all_epochs(device):
    prefetcher = prefetch(device, CountingLoader(3))
    before = len(device._streams)
    for _ in range(3):
        list(prefetcher)
    assert len(device._streams) == before


# -- as frameworks see it --------------------------------------------------------------------------------------------


def test_the_constructor_arguments_are_attributes():
    def transform(batch):
        return batch

    loader = CountingLoader(2)
    prefetcher = DevicePrefetcher(loader, "cpu", depth=4, transform=transform)
    assert (prefetcher.loader, prefetcher.depth, prefetcher.transform) == (loader, 4, transform)
    assert prefetcher.device == torch.device("cpu")


def test_length_epoch_and_the_attributes_frameworks_read_are_the_loaders():
    stock = DataLoader(TensorDataset(torch.arange(10)), batch_size=4)
    prefetcher = DevicePrefetcher(stock, "cpu")
    assert len(prefetcher) == 3
    for name in ("dataset", "batch_size", "sampler", "batch_sampler", "num_workers", "collate_fn", "drop_last"):
        assert getattr(prefetcher, name) is getattr(stock, name)

    loader = CountingLoader(2)
    DevicePrefetcher(loader, "cpu").set_epoch(7)
    assert loader.epoch == 7


def test_a_loader_without_length_still_makes_a_list():
    prefetcher = DevicePrefetcher((step for step in range(3)), "cpu")
    assert list(prefetcher) == [0, 1, 2]
    with pytest.raises(TypeError):
        len(prefetcher)


def test_a_missing_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = DevicePrefetcher([], "cpu").no_such_name


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copied_or_pickled_prefetcher_works_and_opens_streams_of_its_own(device, monkeypatch, duplicate):
    monkeypatch.setattr(prefetcher_module, "open_streams", lambda _: SimulatedStreams(device))
    prefetcher = DevicePrefetcher([torch.tensor([5])], "cpu", depth=3)
    twin = duplicate(prefetcher)
    assert (twin.depth, twin.device) == (3, torch.device("cpu"))
    assert twin._streams is not prefetcher._streams
    assert values(device, twin) == [5]


def test_private_names_of_the_loader_stay_the_loaders():
    class OwnCopy(list):
        def __deepcopy__(self, memo):
            return self

    assert type(copy.deepcopy(DevicePrefetcher(OwnCopy(), "cpu"))) is DevicePrefetcher


# -- devices that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:99", "xpu:99", "meta"])
def test_a_device_that_is_not_there_is_refused_with_what_torch_says_and_what_to_do(name):
    with pytest.raises(DeviceError, match=rf'{name}.*torch .* says: [^\n]+\n.*device="cpu"') as caught:
        DevicePrefetcher([], name)
    assert caught.value.__cause__ is not None


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(DeviceError, match="'gpu' is unknown"):
        DevicePrefetcher([], "gpu")


def test_a_device_without_streams_gets_each_batch_by_a_plain_copy(monkeypatch):
    # The CPU stands in for one: torch has no side streams for it either.
    monkeypatch.setattr(prefetcher_module, "open_streams", lambda device: _NoStreams(device))
    batches = [{"image": torch.full((2, 3), step), "name": f"photo {step}"} for step in range(5)]
    for static in (False, True):
        ours = DevicePrefetcher(batches, "cpu", transform=lambda batch: batch["image"] + 1, static=static)
        assert [batch[0, 0].item() for batch in ours] == [1, 2, 3, 4, 5]
