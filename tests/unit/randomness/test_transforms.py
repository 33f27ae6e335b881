import copy
import logging
import pickle
import threading
from collections import namedtuple
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
from support.numpy_datasets import Noise
from torch.utils.data import ConcatDataset, Subset, random_split

from loaders import Albumentations, DataLoader
from loaders.datasets.wrapped import bases, describe, reads_batches, resolve
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.randomness.transforms import KeyedTransforms, with_own_transforms

# torch warns of more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Steps = namedtuple("Steps", "before after")


class Plain:
    """A dataset with whatever attributes it is given."""

    def __init__(self, length=4, **attributes):
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index

    def describe(self, index):
        return f"{self.length}/{index}"


class Seeded:
    """A transform that takes a seed and nothing else."""

    def set_random_seed(self, seed):
        self.seed = seed


def places(noise):
    """Datasets that hold `noise` in every place where a transform may be."""
    wrapper = SimpleNamespace(inner=SimpleNamespace(steps=[str.upper, noise]))
    yield "an attribute", Plain(transform=noise)
    yield "an attribute of any name", Plain(_aug=noise)
    yield "a list", Plain(transforms=[str.upper, noise])
    yield "a tuple", Plain(transforms=(noise,))
    yield "a namedtuple", Plain(transforms=Steps(None, noise))
    yield "a dict", Plain(transforms={"train": noise, "val": None})
    yield "an object of the user's", Plain(pipeline=wrapper)
    yield "a subset", Subset(Plain(transform=noise), [2, 1])
    yield "a concatenation", ConcatDataset([Plain(), Subset(Plain(transform=noise), [0])])
    yield "a wrapper with another name for its dataset", Plain(base=Plain(dataset=Plain(transform=noise)))
    yield "the dataset itself", noise


PLACES = [name for name, _ in places(None)]


@pytest.mark.parametrize("place", PLACES)
def test_a_transform_is_keyed_wherever_the_dataset_holds_it(place):
    noise = Noise()
    transforms = KeyedTransforms(dict(places(noise))[place])
    assert transforms
    transforms.rekey(1, 2, 3)
    first = noise()
    transforms.rekey(1, 2, 4)
    assert noise() != first
    transforms.rekey(1, 2, 3)
    assert noise() == first


@pytest.mark.parametrize("place", PLACES)
def test_a_thread_gets_a_transform_of_its_own_wherever_the_dataset_holds_it(place):
    noise = Noise()
    dataset = dict(places(noise))[place]
    mine, _, shared = with_own_transforms(dataset)
    assert not shared
    assert type(mine) is type(dataset)
    KeyedTransforms(dataset).rekey(1, 2, 3)
    KeyedTransforms(mine).rekey(1, 2, 4)
    expected = KeyedGenerator().rekey(Domain.TRANSFORM, 1, 2, 3)
    expected.bit_generator.random_raw()
    assert noise()[0] == expected.random()


def test_everything_but_the_transforms_is_shared_by_threads():
    images, paths = np.zeros((4, 2)), ["a"] * 5000
    lock = threading.Lock()  # cannot be copied
    dataset = Plain(images=images, paths=paths, lock=lock, wrapped=SimpleNamespace(noise=Noise(), images=images))
    mine = with_own_transforms(Subset(dataset, [0]))[0].dataset
    assert mine is not dataset
    assert mine.wrapped is not dataset.wrapped
    assert (mine.images, mine.paths, mine.lock, mine.wrapped.images) == (
        images,
        paths,
        lock,
        images,
    ) or mine.images is images
    assert mine.wrapped.noise is not dataset.wrapped.noise


def test_a_dataset_without_transforms_is_shared_whole():
    dataset = Subset(Plain(images=np.zeros(3), transform=str.upper, logger=logging.getLogger("x")), [0])
    assert with_own_transforms(dataset)[0] is dataset
    assert not KeyedTransforms(dataset)


def test_a_transform_held_twice_is_keyed_once_and_stays_one():
    noise = Noise()
    dataset = ConcatDataset([Plain(transform=noise), Plain(transform=noise, again=[noise])])
    assert len(KeyedTransforms(dataset)._found) == 1
    mine, _, shared = with_own_transforms(dataset)
    assert not shared
    assert mine.datasets[0].transform is mine.datasets[1].transform is mine.datasets[1].again[0]


def test_transforms_of_one_dataset_draw_apart():
    one, other = Noise(), Noise()
    KeyedTransforms(Plain(a=one, b=[other])).rekey(1, 2, 3)
    assert one() != other()


def test_a_transform_that_takes_a_seed_gets_one():
    seeded = Seeded()
    transforms = KeyedTransforms(Plain(transform=seeded))
    seeds = []
    for position in (0, 1, 0):
        transforms.rekey(1, 2, position)
        seeds.append(seeded.seed)
    assert seeds[0] == seeds[2] != seeds[1]
    assert 0 <= min(seeds) <= max(seeds) < 2**32


def test_objects_that_answer_to_any_name_are_no_transforms():
    class Proxy:
        def __getattr__(self, name):
            return lambda *arguments: 1 / 0

    dataset = Plain(proxy=Proxy(), kind=Noise)
    assert not KeyedTransforms(dataset)
    assert with_own_transforms(dataset)[0] is dataset


def test_a_dataset_that_refers_to_itself_is_looked_through_once():
    dataset = Plain(transform=Noise())
    dataset.me = dataset
    dataset.children = [SimpleNamespace(parent=dataset)]
    assert len(KeyedTransforms(dataset)._found) == 1
    assert with_own_transforms(dataset)[0].transform is not dataset.transform


def test_long_lists_are_data():
    class Counts(list):
        walks = 0

        def __iter__(self):
            Counts.walks += 1
            return super().__iter__()

    dataset = Plain(samples=Counts([SimpleNamespace()] * 100_000))
    KeyedTransforms(dataset)
    with_own_transforms(dataset)
    assert Counts.walks == 0


# -- our adaptor, and albumentations itself

COLUMNS = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
IMAGE = np.stack([COLUMNS, COLUMNS.T, np.zeros_like(COLUMNS)], axis=2)  # a pixel says where it came from


class Crops:
    """A dataset as people write it, with the pipeline as an attribute."""

    def __init__(self, length=40):
        self.length = length
        self.transform = A.Compose([A.RandomCrop(8, 8), A.HorizontalFlip(p=0.5)])

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.transform(image=IMAGE)["image"]


class Adapted(Crops):
    def __init__(self):
        super().__init__()
        self.transform = Albumentations(self.transform)

    def __getitem__(self, index):
        return self.transform({"image": IMAGE})["image"]


def test_the_adaptor_keys_its_own_pipeline():
    assert not KeyedTransforms(Adapted())


def test_a_thread_gets_an_adaptor_with_a_pipeline_and_generators_of_its_own():
    dataset = Adapted()
    mine, _, shared = with_own_transforms(dataset)
    assert not shared
    assert mine.transform is not dataset.transform
    assert mine.transform.transform is not dataset.transform.transform
    assert mine.transform._keyed is not dataset.transform._keyed
    assert mine.transform._keyed.numpy is not dataset.transform._keyed.numpy
    assert mine.transform.image == dataset.transform.image


def corners(dataset, seed=3, epochs=2, **arguments):
    import torch

    loader = DataLoader(dataset, 8, generator=torch.Generator().manual_seed(seed), **arguments)
    return [[tuple(crop[0, 0, :2].tolist()) for batch in loader for crop in batch] for _ in range(epochs)]


@pytest.mark.parametrize("make", [Crops, Adapted])
def test_a_plain_pipeline_crops_every_sample_of_every_epoch_elsewhere(make):
    crops = [corner for epoch in corners(make(), num_workers=2) for corner in epoch]
    # 80 of 37,249 places: by chance one pair or two at most agree.
    assert len(set(crops)) > 75


@pytest.mark.parametrize("make", [Crops, Adapted])
@pytest.mark.parametrize(
    "arguments",
    [{"num_workers": 1}, {"num_workers": 3}, {"num_workers": 3, "worker_method": "thread"}],
    ids=["a process", "processes", "threads"],
)
def test_crops_are_the_same_whoever_makes_them(make, arguments):
    inline = corners(make())
    assert corners(make(), **arguments) == inline
    assert corners(make(), seed=4) != inline


def test_the_pipeline_in_the_users_hands_is_not_touched_by_threads():
    dataset = Crops()
    dataset.transform.set_random_seed(1)
    before = pickle.dumps(dataset.transform.random_generator.bit_generator.state)
    corners(dataset, num_workers=2, worker_method="thread")
    assert pickle.dumps(dataset.transform.random_generator.bit_generator.state) == before


# -- looking through torch's wrappers


def test_an_index_leads_to_the_dataset_that_holds_the_sample():
    one, two = Plain(3), Plain(5)
    both = ConcatDataset([one, Plain(0), two])
    for key in range(-8, 8):
        base, index = resolve(both, key)
        assert (base, index) == ((one, key % 8) if key % 8 < 3 else (two, key % 8 - 3))
    nested = Subset(ConcatDataset([Subset(both, [7, 0]), one]), [2, 0])
    assert resolve(nested, 0) == (one, 0)
    assert resolve(nested, 1) == (two, 4)
    assert resolve(one, 99) == (one, 99)


@pytest.mark.parametrize("key", [8, 100, -9])
def test_an_index_outside_fails_as_it_does_in_torch(key):
    both = ConcatDataset([Plain(3), Plain(5)])
    with pytest.raises((IndexError, ValueError)) as theirs:
        both[key]
    with pytest.raises(theirs.type):
        resolve(both, key)


def test_wrappers_of_the_users_own_are_not_looked_through():
    class Shifted(Subset):
        def __getitem__(self, index):
            return self.dataset[self.indices[index]] + 1

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    shifted = Shifted(Plain(), [1, 2])
    assert resolve(shifted, 0) == (shifted, 0)
    assert list(bases(shifted)) == [shifted]


def test_all_the_datasets_that_samples_may_come_from_are_found():
    one, two = Plain(3), Plain(5)
    parts = random_split(ConcatDataset([one, Subset(two, [1])]), [2, 2])
    assert list(bases(parts[0])) == [one, two]


def test_a_sample_is_described_by_the_dataset_that_holds_it_or_not_at_all():
    both = ConcatDataset([Plain(3), Subset(Plain(5), [4, 2])])
    assert describe(both, 4) == "5/2"
    assert describe([1, 2, 3], 0) is None
    assert describe(both, 99) is None
    assert describe(both, "text") is None


def test_a_dataset_reads_batches_if_it_says_so():
    class Reads(Plain):
        def __getitems__(self, keys):
            return keys

    assert reads_batches(Reads())
    assert reads_batches(Subset(Reads(), [0]))
    assert not reads_batches(Subset(Plain(), [0]))
    assert not reads_batches(ConcatDataset([Reads()]))


def test_a_copy_of_a_noise_is_a_noise():
    # What `with_own_transforms` relies on: generators copy with their state.
    noise = Noise()
    KeyedTransforms(Plain(transform=noise)).rekey(1, 2, 3)
    assert copy.deepcopy(noise)() == noise()
