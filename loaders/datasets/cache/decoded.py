"""A dataset's samples, cached in shared memory or in a file when they are first read."""

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
from loaders.images.multi_crop import MultiCrop
from loaders.nested import map_tree
from loaders.randomness.transforms import KeyedTransforms
from loaders.timing.stages import AUGMENT, READ


class DecodedCache(IndexedDataset):
    """The samples of another dataset, each read once: `DecodedCache(ImageFolder("train"), 40 << 30, augment)`.

    The first reader of a sample stores a copy for all others: threads, worker processes of any start method, later
    epochs. Workers may be killed at any moment: a sample becomes visible only when it is complete. Concurrent readers
    of one sample all get it.

    Nothing is evicted: once `nbytes` are used up, or the machine is out of memory, the remaining samples are read from
    the dataset each time. Memory is allocated as needed, and freed when this object and all workers are gone; it has no
    name under /dev/shm.

    With `path` the samples are stored in a file that outlives the run; several runs, such as the ranks of one machine,
    may fill and read it at once. It is reopened only with the same number of samples, the same `nbytes` and an
    unchanged dataset: everything that pickling it would save (paths, labels, settings, not the code of functions), and
    size and modification time of up to 256 of its files, evenly spaced. Any other file is refused, never overwritten,
    as is one that other users may write to; the file is created with access for this user alone. Each record has a
    checksum, verified when a process first reads it. Under /dev/shm the file takes memory, limited by `nbytes` alone.

    In a file samples are plain data, and reading them runs no code from it: None, numbers, str, bytes, NumPy scalars,
    arrays without Python objects (of subclasses only `np.memmap`, which comes back as an ndarray), tensors, and dict,
    OrderedDict, list, tuple, namedtuples and dataclasses of these. For samples with classes of your own, each process
    first reads one from the dataset to learn the class. In memory, samples may be anything that can be pickled.

    Samples must be the same each time they are read: random crops and flips belong in `crop` and `transform`, which are
    applied after the cache. `crop` reads the pixels it needs from the cache and writes its result into the batch.
    Datasets with a recognisable transform or random crop are refused; for others that draw random numbers, the result
    of the first draw stays cached. A `crop` that is not random, such as `Resize`, belongs in the dataset: its result
    takes less memory.

    Args:
        dataset: samples by index; of an array that is a view, only the viewed elements are stored.
        nbytes: maximum size in bytes, including the table (8 per sample).
        transform: sample → sample, applied to a copy each time.
        crop: applied to each sample's "image" before the transform, such as `RandomResizedCrop(224, flip=0.5)`.
        path: the file, on a local disk or in memory; created if it does not exist.

    Sample:
        as the dataset's; its arrays are writable and belong to the reader.

    Raises:
        DatasetError: the dataset transforms its samples, `nbytes` is too small, or the file was made for something
            else. On reading: a sample cannot be cached, or the file is damaged or was truncated while in use. On
            pickling, except to start a worker: it has no path.
    """

    def __init__(
        self,
        dataset: Dataset,
        nbytes: int,
        transform: Callable[[Any], Any] | None = None,
        *,
        crop: Crop | MultiCrop | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(transform)
        self.dataset = dataset
        self.crop = crop
        if _transforms(dataset):
            raise DatasetError(
                f"the {type(dataset).__name__} has a transform or a random crop: its first result would be cached.\n"
                "  Pass it to the cache instead: DecodedCache(dataset, nbytes, transform, crop=crop)."
            )
        if crop is not None and any(getattr(type(each), "moves_with_image", False) for each in bases(dataset)):
            raise DatasetError(
                f"crop= would cut the image of a {type(dataset).__name__} and not its boxes or masks.\n"
                "  Pass a transform that crops both: DecodedCache(dataset, nbytes, loaders.Albumentations(pipeline))."
            )
        self._length = len(dataset)
        fingerprint = bytes(32) if path is None else fingerprint_of(dataset, self._length)
        self._records = SharedRecords(self._length, nbytes, path, fingerprint)

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> Any:
        if self.crop is not None:
            sample = self._kept(index)
            image: Any = self._image(sample, index)
            rest = map_tree(_own, without_image(sample))
            with AUGMENT:
                image = self.crop.apply(image)
            return {name: image if name == "image" else rest[name] for name in sample}
        with READ:
            sample = self._records.get(index)
        self._records.count_read(sample is not ABSENT)
        return map_tree(_own, self._read_first(index)) if sample is ABSENT else sample

    def _kept(self, index: int) -> Any:
        """The sample, to be read only: its arrays may be those of the cache or of the dataset."""
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
                    "dataclasses.\n  Build samples from these, or omit path=: memory stores what can be pickled"
                )
            raise DatasetError(
                f"{self._named(index)} cannot be cached: {error}.\n  DecodedCache stores {kept}."
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
        """Write the sample into the arrays of `out`, which has the same structure; a cached one is copied once.

        Raises:
            FieldNameError, FieldShapeError, FieldDtypeError: the sample does not match `out`. Nothing is cast.
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
        """The dataset's description of the sample; empty if it has none."""
        return describe(self.dataset, index) or ""

    def _named(self, index: int) -> str:
        return describe_sample(index, self.describe(index))

    @property
    def cached_count(self) -> int:
        """Number of cached samples."""
        return self._records.count

    @property
    def cached_nbytes(self) -> int:
        """Bytes in use, table included; never more than `nbytes`."""
        return self._records.used_nbytes

    @property
    def hit_rate(self) -> float:
        """Reads served from the cache / all reads, of all processes, since this one made or opened it; nan before any.

        Threads, and processes whose ids differ by a multiple of 64, may overwrite each other's counts.
        """
        return self._records.hit_rate

    def __getattr__(self, name: str) -> Any:
        # For `classes` and the like, but not `__getitems__`, which would bypass the cache.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        state = {FULL: ", full", MACHINE_FULL: ", stopped: the machine is out of space"}.get(self._records.refused, "")
        used, room = self.cached_nbytes / 2**20, self._records.nbytes / 2**20
        kept = f"{self.cached_count} of {len(self)} samples in {used:,.1f} of {room:,.1f} MiB{state}"
        return f"DecodedCache({type(self.dataset).__name__}, {kept}, hit rate {self.hit_rate:.0%})"


def _transforms(dataset: Any) -> bool:
    """Whether the dataset has a transform, a random crop or another keyed transform."""
    for base in bases(dataset):
        if isinstance(base, IndexedDataset) and base.transform is not None:
            return True
        if getattr(getattr(base, "crop", None), "is_random", False):
            return True
    return bool(KeyedTransforms(dataset))


def _own(leaf: Any) -> Any:
    # A read-only array may belong to the dataset or the cache: the reader gets a writable copy.
    return leaf.copy() if isinstance(leaf, np.ndarray) and not leaf.flags.writeable else leaf
