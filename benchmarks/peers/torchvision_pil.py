"""torch's loader with Pillow and torchvision's transforms, as in torchvision's examples."""

from __future__ import annotations

from typing import Any

from benchmarks.workloads import MEAN, SIZE, STD, Photos

NAME = "torch, torchvision + Pillow"
REQUIREMENTS = ("torch==2.13.0", "torchvision==0.28.0", "pillow==13.0.0", "numpy==2.4.6")


def import_torchvision() -> None:
    """Import it even if its compiled operators do not match torch: PyPI's wheel is only for the CUDA build.

    Transforms of Pillow images do not need these operators.
    """
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    from torch.utils.data import DataLoader

    import_torchvision()
    from torchvision.transforms import (
        Compose,
        Normalize,
        PILToTensor,
        RandomHorizontalFlip,
        RandomResizedCrop,
        ToTensor,
    )

    last: list[Any] = [ToTensor(), Normalize(MEAN, STD)] if normalised else [PILToTensor()]
    dataset: Any = _Opened(photos, Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), *last]))
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)


class _Opened:
    def __init__(self, photos: Photos, transform: Any) -> None:
        self.photos = photos
        self.transform = transform

    def __len__(self) -> int:
        return len(self.photos.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        with open(self.photos.files[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), self.photos.labels[index]
