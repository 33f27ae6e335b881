"""The ceilings of a loader: its dataset read alone, the copies it must make, and copies to a device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loaders.errors import DatasetError
from loaders.nested import leaves, map_tree
from loaders.randomness.streams import enter_sample, leave_sample
from loaders.randomness.transforms import KeyedTransforms

# Size of the batch rows that samples are copied into: larger than a cache, as in a loader.
_ROOM_NBYTES = 128 << 20
_WARM_UP = 0.25


def is_dataset(value: Any) -> bool:
    """Whether this is read sample by sample: it has a length and items, and is not a loader."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not hasattr(value, "batch_sampler")


class Alone:
    """A dataset as an iterable of its samples, each read under its own key, by this thread with one OpenCV thread.

    Args:
        dataset: with `__getitem__` and `__len__`, or a stream with `__iter__`.
        indices: what to read; all of it by default.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None) -> None:
        self._dataset = dataset
        self._indices = indices
        self._epoch = -1

    def __iter__(self) -> Iterator[Any]:
        self._epoch += 1
        threads = _set_opencv_threads(0)
        try:
            if is_dataset(self._dataset):
                yield from self._read()
            else:
                yield from self._dataset
        finally:
            leave_sample()
            if threads is not None:
                _set_opencv_threads(threads)

    def _read(self) -> Iterator[Any]:
        transforms = KeyedTransforms(self._dataset)
        indices = self._indices if self._indices is not None else range(len(self._dataset))
        for position, index in enumerate(indices):
            enter_sample(0, self._epoch, position)
            if transforms:
                transforms.rekey(0, self._epoch, position)
            yield self._dataset[index]


class Repeated:
    """A dataset that returns the same ready sample every time, so that only delivery costs time.

    Args:
        sample: any sample of a dataset.
        length: the number of samples.
    """

    def __init__(self, sample: Any, length: int) -> None:
        self._sample = sample
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is out of range: there are {self._length} samples")
        return self._sample


def reading_per_s(dataset: Any, indices: Sequence[int] | None, seconds: float) -> float:
    """Samples per second of the dataset alone, in this thread.

    Raises:
        DatasetError: it has no samples.
    """
    samples: Iterator[Any] = _endless(Alone(dataset, indices))
    return _per_s(lambda: next(samples), seconds)


def first_sample(dataset: Any, indices: Sequence[int] | None = None) -> Any:
    """The sample used for the other measurements.

    Raises:
        DatasetError: the dataset has no samples.
    """
    for sample in Alone(dataset, indices):
        return map_tree(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, sample)
    raise DatasetError("the dataset has not one sample: there is nothing to measure.")


def copying_per_s(sample: Any, seconds: float) -> float | None:
    """Samples per second that this thread copies into batch rows; None if a sample has no arrays."""
    arrays = [leaf for _, leaf in leaves(sample) if isinstance(leaf, np.ndarray) and leaf.nbytes > 0]
    if not arrays:
        return None
    rows = max(2, _ROOM_NBYTES // sum(array.nbytes for array in arrays))
    batches = [np.zeros((min(rows, 1 << 16), *array.shape), array.dtype) for array in arrays]
    count, row = len(batches[0]), 0

    def copy() -> None:
        nonlocal row
        for batch, array in zip(batches, arrays, strict=True):
            batch[row] = array
        row = (row + 1) % count

    for _ in range(count):
        copy()  # so that the pages are mapped
    return _per_s(copy, seconds)


def device_copies_per_s(sample: Any, batch_size: int) -> float | None:
    """Samples per second that can be copied to the accelerator from page-locked memory; None where there is none."""
    import torch

    from loaders.batch.collate import numpy_collate
    from loaders.device.event_timing import transfer_time

    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    batch: Any = numpy_collate([sample] * batch_size)
    tensors = [leaf.pin_memory() for _, leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    taken = transfer_time(lambda: [tensor.to(device, non_blocking=True) for tensor in tensors], device=device)
    return batch_size / taken.median_s


def _endless(source: Alone) -> Iterator[Any]:
    while True:
        count = 0
        for sample in source:
            count += 1
            yield sample
        if count == 0:
            raise DatasetError("the dataset has not one sample: there is nothing to measure.")


def _per_s(work: Callable[[], Any], seconds: float) -> float:
    """Calls of `work()` per second, after a warm-up of a quarter of the time."""
    began = counted_from = time.perf_counter()
    count, warm = 0, False
    while True:
        work()
        count += 1
        now = time.perf_counter()
        if not warm and now - began >= seconds * _WARM_UP:
            warm, counted_from, count = True, now, 0
        elif warm and now - counted_from >= seconds * (1 - _WARM_UP) and count > 0:
            return count / (now - counted_from)


def _set_opencv_threads(count: int) -> int | None:
    """Set OpenCV's number of threads if it is loaded; returns the previous number."""
    cv2: Any = sys.modules.get("cv2")
    if cv2 is None:
        return None
    before = int(cv2.getNumThreads())
    cv2.setNumThreads(count)
    return before
