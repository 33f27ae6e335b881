"""`read_into` is taken only where it writes what indexing gives: it is that class's own."""

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from loaders import DataLoader, DecodedCache, ImageFiles, ImageFolder
from loaders.datasets.protocol import IndexedDataset
from loaders.datasets.read_into import own_read_into
from loaders.datasets.wrapped import describe
from loaders.images.crops import CenterCrop, RandomResizedCrop

NORMALIZE = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def root(tmp_path):
    for number in range(6):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"), pixels)
    return tmp_path / "photos"


MAKE = {
    "crop": lambda kind, root, tmp: kind[0](root, crop=CenterCrop(8, resize=10)),
    "normalize": lambda kind, root, tmp: kind[0](root, normalize=NORMALIZE),
    "cache": lambda kind, root, tmp: kind[1](ImageFolder(root), 1 << 20),
    "cache with a crop": lambda kind, root, tmp: kind[1](ImageFolder(root), 1 << 20, crop=CenterCrop(8, resize=10)),
    "cache in a file": lambda kind, root, tmp: kind[1](ImageFolder(root), 1 << 20, path=tmp / "cache"),
}
BASES = (ImageFolder, DecodedCache)


def inverted(sample):
    return {**sample, "image": 255 - sample["image"]}


def subclass(base):
    class Inverted(base):
        def __getitem__(self, index):
            return inverted(super().__getitem__(index))

    return Inverted


def subclass_of_subclass(base):
    class Below(subclass(base)):
        pass

    return Below


def mixin(base):
    class Mixin:
        def __getitem__(self, index):
            return inverted(super().__getitem__(index))

    return type("Mixed", (Mixin, base), {})


def other_read(base):
    class Inverted(base):
        def _read(self, index):
            return inverted(super()._read(index))

    return Inverted


class Wrapper:
    """Changes samples, and passes on everything else."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return inverted(self.dataset[index])

    def __getattr__(self, name):
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class Mirror(Wrapper):
    """Passes everything on, whatever the name."""

    def __getattribute__(self, name):
        if name in ("dataset", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(self.dataset, name)


def loaded(dataset, **how):
    return torch.cat([batch["image"] for batch in DataLoader(dataset, 3, **how)])


def indexed(dataset):
    return torch.from_numpy(np.stack([dataset[index]["image"] for index in range(len(dataset))]))


@pytest.mark.parametrize("how", [{}, {"num_workers": 1}, {"num_workers": 1, "worker_method": "thread"}])
@pytest.mark.parametrize("change", [subclass, subclass_of_subclass, mixin, other_read])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_subclass_that_reads_in_its_own_way_is_asked_for_its_samples(root, tmp_path, make, change, how):
    plain = indexed(make(BASES, root, tmp_path))
    dataset = make([change(base) for base in BASES], root, tmp_path)
    for _ in range(2):
        found = loaded(dataset, **how)
        assert torch.equal(found, indexed(dataset))
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("wrapper", [Wrapper, Mirror])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_wrapper_that_passes_attributes_on_is_asked_for_its_samples(root, tmp_path, make, wrapper):
    dataset = wrapper(make(BASES, root, tmp_path))
    for each in (dataset, Subset(dataset, range(6)), ConcatDataset([dataset])):
        assert torch.equal(loaded(each), indexed(dataset))


def test_a_wrapper_in_another_order_names_no_wrong_file(root):
    class Reversed(Wrapper):
        def __getitem__(self, index):
            return self.dataset[len(self) - 1 - index]

    dataset = ImageFolder(root)
    assert describe(Subset(dataset, [4]), 0) == dataset.describe(4)
    assert describe(Reversed(dataset), 0) is None


def test_read_into_of_a_cache_that_is_called_by_hand_writes_what_indexing_gives(root):
    cache = subclass(DecodedCache)(ImageFolder(root), 1 << 20)
    row = {"image": np.empty((30, 40, 3), np.uint8), "label": np.empty((), np.int64)}
    cache.read_into(1, row)
    np.testing.assert_array_equal(row["image"], cache[1]["image"])


def test_the_short_way_is_taken_where_it_is_the_classes_own(root):
    class Named(ImageFolder):
        def describe(self, index):
            return "mine"

    class Both(subclass(ImageFolder)):
        def read_into(self, index, out):
            sample = self[index]
            out["image"][...], out["label"][...] = sample["image"], sample["label"]

    crop = CenterCrop(8, resize=10)
    for dataset in (ImageFolder(root, crop=crop), Named(root, crop=crop), Both(root), DecodedCache([1], 1 << 20)):
        assert own_read_into(dataset) is not None
    for dataset in (ImageFolder(root), subclass(ImageFolder)(root, crop=crop), [1], Wrapper(Both(root))):
        assert own_read_into(dataset) is None


def test_a_subclass_may_build_its_own_short_way_on_that_of_its_base(root):
    class Inverted(subclass(ImageFolder)):
        def read_into(self, index, out):
            super().read_into(index, out)
            out["image"][...] = 255 - out["image"]

    dataset = Inverted(root, crop=CenterCrop(8, resize=10))
    assert torch.equal(loaded(dataset), indexed(dataset))


class Inverting(CenterCrop):
    """Changes what the crop gave, in memory of its own."""

    def read(self, *arguments, **options):
        return 255 - super().read(*arguments, **options)

    def apply(self, *arguments):
        return 255 - super().apply(*arguments)


def test_a_crop_that_gives_other_memory_than_it_was_passed_is_heard(root):
    crop = Inverting(8, resize=10)
    for dataset in (ImageFolder(root, crop=crop), DecodedCache(ImageFolder(root), 1 << 20, crop=crop)):
        for _ in range(2):
            assert torch.equal(loaded(dataset), indexed(dataset))


def test_files_in_a_list_are_no_other_than_a_folders(root):
    class Inverted(ImageFiles):
        def __getitem__(self, index):
            return inverted(super().__getitem__(index))

    dataset = Inverted(sorted(root.glob("*/*.png")), crop=RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1)))
    assert own_read_into(dataset) is None
    assert issubclass(Inverted, IndexedDataset)
