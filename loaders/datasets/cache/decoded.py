"""A dataset's samples kept in shared memory, or in a file, as they are first read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

from loaders.datasets.cache.file import fingerprint_of
from loaders.datasets.cache.records import ABSENT, FULL, MACHINE_FULL, SharedRecords
from loaders.datasets.protocol import Dataset, IndexedDataset, in_range
from loaders.datasets.read_into import copy_into, owns_read_into, settle, without_image
from loaders.datasets.wrapped import bases, describe
from loaders.errors import DatasetError, FieldNameError, describe_sample
from loaders.images.crops import Crop
from loaders.nested import map_tree
from loaders.randomness.transforms import KeyedTransforms
from loaders.timing.stages import AUGMENT, READ


class DecodedCache(IndexedDataset):
    """The samples of another dataset, each read once: `DecodedCache(ImageFolder("train"), 40 << 30, augment)`.

    Whoever reads a sample first keeps a copy of it for all: threads, worker processes however they are started, later
    epochs. Workers may be killed at any moment: a sample is there once it is complete. Two that read the same sample
    at once both get it.

    Nothing is thrown out: when `nbytes` are reached, or the machine has no more memory, the samples that found no
    place are read from the dataset each time. Memory is reserved as it is needed, and given back when this object and
    all workers are gone; it has no name under /dev/shm.

    With `path` the samples lie in a file that outlives the run, and that any number of runs may fill and read at
    once: the ranks of one machine, say. It is opened again only for the same number of samples and the same `nbytes`,
    and if nothing that the dataset is made of has changed: everything that pickling it would save (paths, labels,
    settings, not the code of functions), and size and modification time of up to 256 of its files, evenly spaced.
    Anything else is refused, never overwritten, as is a file that others than this user may write; it is made readable
    by this user alone. Each record carries a checksum, verified when a process first reads it. A path under /dev/shm is
    memory that no limit but `nbytes` protects.

    In a file samples are plain data, and nothing that stands in one is ever run: None, numbers, str, bytes, NumPy
    scalars, arrays without Python objects (of subclasses only `np.memmap`, which comes back as an ndarray), tensors,
    and dict, OrderedDict, list, tuple, namedtuples and dataclasses of these. Of samples with classes of your own each
    process reads one from the dataset, which shows it the class. In memory samples are anything that can be pickled.

    Samples must be the same each time they are read: random crops and flips belong into `crop` and `transform`, behind
    the cache. `crop` reads the pixels it needs where they are kept, and writes them where the batch is. Datasets that
    are seen to have a transform or a random crop are refused; of others that draw random numbers the first draw is kept
    for ever. A `crop` that is not random, such as `Resize`, belongs to the dataset: what it leaves takes less room.

    Args:
        dataset: samples by number; arrays are kept as their bytes, of views only what they show.
        nbytes: at most so many bytes, table included (8 per sample).
        transform: sample → sample, applied to a copy each time.
        crop: `RandomResizedCrop(224, flip=0.5)`: what is seen of each sample's "image", before the transform.
        path: the file, on a local disk or in memory; made if there is none.

    Sample:
        as the dataset's; its arrays are writable and belong to the reader.

    Raises:
        DatasetError: the dataset transforms its samples, `nbytes` is too little, or the file is of something else.
            On reading: a sample that cannot be kept, or the file is damaged or was cut short while in use. On pickling
            outside the start of a worker: it has no path.
    """

    def __init__(
        self,
        dataset: Dataset,
        nbytes: int,
        transform: Callable[[Any], Any] | None = None,
        *,
        crop: Crop | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(transform)
        self.dataset = dataset
        self.crop = crop
        if _transforms(dataset):
            raise DatasetError(
                f"the {type(dataset).__name__} has a transform or a random crop: its first result would be kept.\n"
                "  Put it behind the cache: DecodedCache(dataset, nbytes, transform, crop=crop)."
            )
        self._length = len(dataset)
        fingerprint = bytes(32) if path is None else fingerprint_of(dataset, self._length)
        self._records = SharedRecords(self._length, nbytes, path, fingerprint)

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> Any:
        if self.crop is not None:
            sample = self._kept(index)
            image = self._image(sample, index)
            rest = map_tree(_own, without_image(sample))
            with AUGMENT:
                image = self.crop.apply(image)
            return {name: image if name == "image" else rest[name] for name in sample}
        with READ:
            sample = self._records.get(index)
        self._records.count_read(sample is not ABSENT)
        return map_tree(_own, self._read_first(index)) if sample is ABSENT else sample

    def _kept(self, index: int) -> Any:
        """The sample, to be looked at: its arrays are those that are kept."""
        sample = self._records.view(index)
        self._records.count_read(sample is not ABSENT)
        return self._read_first(index) if sample is ABSENT else sample

    def _read_first(self, index: int) -> Any:
        sample = self.dataset[index]
        try:
            self._records.put(index, sample)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            if self._records.path is None:
                kept = "what can be pickled: arrays, numbers, text, and containers of these"
            else:
                kept = (
                    "plain data in its file: arrays, numbers, text and bytes, in dicts, lists, tuples, namedtuples and "
                    "dataclasses.\n  Give the sample as these, or leave path= out: memory keeps what can be pickled"
                )
            raise DatasetError(
                f"{self._named(index)} cannot be kept: {error}.\n  DecodedCache keeps {kept}."
            ) from error
        return sample

    def _image(self, sample: Any, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        image = sample.get("image") if isinstance(sample, dict) else None
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise FieldNameError(
                f'{self._named(index)}: crop= needs samples with a uint8 "image" of shape (H, W, 3) in a dict.',
                index=index,
                source=self.describe(index),
                field="image",
            )
        return image

    def read_into(self, index: SupportsIndex, out: Any) -> None:
        """Write the sample into the arrays of `out`, which has its structure: one copy, from the cache to there.

        Raises:
            FieldNameError, FieldShapeError, FieldDtypeError: the sample is not like `out`. Nothing is cast.
        """
        position = in_range(index, len(self))
        as_ours = owns_read_into(type(self))
        if not as_ours or self.transform is not None or (self.crop is not None and self.crop.shape is None):
            return copy_into(out, self[position], position, self.describe)
        sample = self._kept(position)
        if self.crop is not None:
            settle(self.crop.apply(self._image(sample, position), out["image"]), out["image"])
            sample, out = without_image(sample), without_image(out)
        copy_into(out, sample, position, self.describe)

    def describe(self, index: SupportsIndex) -> str:
        """What the dataset says the sample is."""
        return describe(self.dataset, index) or ""

    def _named(self, index: int) -> str:
        return describe_sample(index, self.describe(index))

    @property
    def cached_count(self) -> int:
        """Number of samples that are kept."""
        return self._records.count

    @property
    def cached_nbytes(self) -> int:
        """Bytes in use, table included; never more than `nbytes`."""
        return self._records.used_nbytes

    @property
    def hit_rate(self) -> float:
        """Reads served from the cache / all reads, by all processes, since it was made or opened; nan before any.

        Threads, and processes whose numbers differ by a multiple of 64, may lose each other's counts.
        """
        return self._records.hit_rate

    def __getattr__(self, name: str) -> Any:
        # `classes` and the like, but not `__getitems__`: it would read past the cache.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        state = {FULL: ", full", MACHINE_FULL: ", stopped: the machine has no more room"}.get(self._records.refused, "")
        used, room = self.cached_nbytes / 2**20, self._records.nbytes / 2**20
        kept = f"{self.cached_count} of {len(self)} samples in {used:,.1f} of {room:,.1f} MiB{state}"
        return f"DecodedCache({type(self.dataset).__name__}, {kept}, hit rate {self.hit_rate:.0%})"


def _transforms(dataset: Any) -> bool:
    """Whether samples are seen to come out of something that may be random."""
    for base in bases(dataset):
        if isinstance(base, IndexedDataset) and base.transform is not None:
            return True
        if getattr(getattr(base, "crop", None), "is_random", False):
            return True
    return bool(KeyedTransforms(dataset))


def _own(leaf: Any) -> Any:
    # What the dataset or the cache holds is not the reader's to write into.
    return leaf.copy() if isinstance(leaf, np.ndarray) and not leaf.flags.writeable else leaf
