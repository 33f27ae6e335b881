"""`loaders.DataLoader`."""

from __future__ import annotations

from typing import Any

from benchmarks.workloads import MEAN, SIZE, STD, Photos

NAME = "loaders"
REQUIREMENTS = ()  # runs in the benchmark's own environment, whose relevant packages are these
PACKAGES = ("torch", "numpy", "opencv-python-headless", "nvidia-nvimgcodec-cu12")


def make(dataset: Any, **arguments: Any) -> Any:
    from loaders import DataLoader

    return DataLoader(dataset, **arguments)


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    return make(dataset, batch_size=batch_size, num_workers=workers)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import cv2

    from loaders import ImageFiles, RandomResizedCrop

    normalize = (MEAN, STD) if normalised else None
    crop = RandomResizedCrop(SIZE, interpolation=cv2.INTER_LINEAR)  # as the other peers do
    dataset = ImageFiles(photos.files, photos.labels, transform=_maybe_mirrored, crop=crop, normalize=normalize)
    return make(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)


def _maybe_mirrored(sample: dict[str, Any]) -> dict[str, Any]:
    import cv2

    from loaders import sample_rng

    if sample_rng().random() < 0.5:
        sample["image"] = cv2.flip(sample["image"], 1)
    return sample
