"""The inputs of all peers: datasets of ready or slow samples, and photographs, with NumPy and OpenCV only.

Every environment must be able to import this, so nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

KINDS = 16
SIZE = 224  # side of a photograph after cropping and resizing, in pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SORTED = 200_000  # numbers to sort: about a millisecond


class Ready:
    """Samples that take no time to read: one of a few arrays, and a label."""

    def __init__(self, count: int, shape: list[int], dtype: str) -> None:
        generator = np.random.default_rng(0)
        self.arrays = generator.integers(0, 255, (KINDS, *shape)).astype(dtype)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return {"image": self.arrays[index % KINDS], "label": index}


class ReadyPairs(Ready):
    """The same as tuples."""

    def __getitem__(self, index: int) -> Any:
        return self.arrays[index % KINDS], index


class HeavyTailed(Ready):
    """Samples of about a millisecond of work, of which one in a hundred takes thirty times as long."""

    def __init__(self, count: int, shape: list[int], dtype: str) -> None:
        super().__init__(count, shape, dtype)
        self.unsorted = np.random.default_rng(1).random(_SORTED)

    def __getitem__(self, index: int) -> Any:
        for _ in range(30 if index % 100 == 37 else 1):
            np.sort(self.unsorted)
        return super().__getitem__(index)


class Photos:
    """JPEG files, and what a peer prepared from them.

    Args:
        files: paths; some occur several times.
        prepared: a folder with what the peer's `prepare` wrote.
    """

    def __init__(self, files: list[str], prepared: str) -> None:
        self.files = files
        self.labels = [number % 1000 for number in range(len(files))]
        self.prepared = prepared


class Epochs:
    """An iterable of batches; `start()` is called for each epoch."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()


def image_of(batch: Any) -> np.ndarray[Any, Any]:
    """The images of a batch of any peer, as an array over the same bytes."""
    return np.asarray(batch["image"] if isinstance(batch, dict) else batch[0])


def random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a RandomResizedCrop: 8 to 100 % of the area, 3:4 to 4:3, ten attempts."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def train_photo(jpeg: bytes, rng: np.random.Generator, normalised: bool) -> np.ndarray[Any, Any]:
    """The recipe for peers that leave decoding to the user: OpenCV decodes the whole photograph, then it is cropped.

    Returns:
        uint8 (224, 224, 3) RGB, or normalised float32 (3, 224, 224).
    """
    import cv2

    cv2.setNumThreads(0)  # the workers are the parallelism, in every loader
    photo: Any = cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    top, left, height, width = random_crop(*photo.shape[:2], rng)
    crop = cv2.resize(photo[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        crop = cv2.flip(crop, 1)
    if not normalised:
        return crop
    mean, std = (np.array(values, np.float32) * 255 for values in (MEAN, STD))
    return np.ascontiguousarray(((crop - mean) / std).transpose(2, 0, 1))
