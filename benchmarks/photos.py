"""The inputs of the training benchmarks: ready arrays, and JPEG files cut out of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.workloads import Ready

CLASSES = 1000
_HEIGHT, _WIDTH = 375, 500  # of a file: the most common size in ImageNet


class ReadyImages(Ready):
    """Images that take no time to read: one of a few arrays."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__(count, [size, size, 3], "uint8")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "label": index % CLASSES}


class JpegCrops:
    """A random crop of a JPEG file, resized and possibly mirrored, with OpenCV and NumPy only.

    Args:
        files: the paths; they are repeated to make `count` samples.
        count: how many samples.
        size: side of the result, in pixels.
    """

    def __init__(self, files: list[str], count: int, size: int) -> None:
        self.files = files
        self.count = count
        self.size = size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        cv2.setNumThreads(0)  # the workers are the parallelism, in every loader
        file = self.files[index % len(self.files)]
        photo: Any = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
        rng = np.random.default_rng(index)
        crop = _random_crop(photo, rng, least=0.3)
        crop = cv2.resize(crop, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        if rng.random() < 0.5:
            crop = cv2.flip(crop, 1)
        return {"image": cv2.cvtColor(crop, cv2.COLOR_BGR2RGB), "label": index % CLASSES}


def write_jpegs(
    folder: Path, count: int, shape: tuple[int, int] = (_HEIGHT, _WIDTH), quality: int = 92, interval: int = 0
) -> str:
    """Write `count` JPEG files. Returns what they were cut out of.

    Args:
        shape: (height, width) in pixels.
        interval: MCUs from one restart marker to the next; 0 for none.
    """
    photos, kind = _photographs()
    rng = np.random.default_rng(0)
    for number in range(count):
        crop = _random_crop(photos[number % len(photos)], rng, least=0.6)
        method = cv2.INTER_AREA if crop.shape[1] > shape[1] else cv2.INTER_CUBIC
        crop = cv2.resize(crop, shape[::-1], interpolation=method)
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
        _, jpeg = cv2.imencode(".jpg", crop, flags)
        (folder / f"{number:05}.jpg").write_bytes(jpeg.tobytes())
    return kind


def _photographs() -> tuple[list[np.ndarray[Any, Any]], str]:
    """The demo's photographs, uint8 (H, W, 3), or smooth noise if the packages that ship them are missing."""
    from examples.demo.photos import PHOTOS, read_photo
    from loaders.errors import MissingExtraError

    try:
        return [read_photo(name) for name in PHOTOS], "photographs"
    except MissingExtraError:
        return [_smooth_noise(seed) for seed in range(10)], "smooth noise"


def _smooth_noise(seed: int) -> np.ndarray[Any, Any]:
    """Noise at several scales, stronger at coarser scales, as in photographs."""
    rng = np.random.default_rng(seed)
    image = np.zeros((_HEIGHT, _WIDTH, 3), np.float32)
    for scale in (2, 8, 32, 128):
        coarse = rng.normal(0, scale**0.5, (_HEIGHT // scale + 2, _WIDTH // scale + 2, 3)).astype(np.float32)
        image += cv2.resize(coarse, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 5 * image, 0, 255).astype(np.uint8)


def _random_crop(photo: np.ndarray[Any, Any], rng: np.random.Generator, least: float) -> np.ndarray[Any, Any]:
    """A crop with the photo's aspect ratio and at least the share `least` of each side."""
    share = rng.uniform(least, 1.0)
    height, width = (max(1, int(side * share)) for side in photo.shape[:2])
    top = int(rng.integers(photo.shape[0] - height + 1))
    left = int(rng.integers(photo.shape[1] - width + 1))
    return photo[top : top + height, left : left + width]
