"""`torch.utils.data.DataLoader` with its default collate function; photographs by OpenCV and albumentations."""

from __future__ import annotations

from typing import Any

from benchmarks.workloads import MEAN, SIZE, STD, Photos

NAME = "torch, OpenCV + albumentations"
REQUIREMENTS = ()  # runs in the benchmark's own environment, whose relevant packages are these
PACKAGES = ("torch", "numpy", "opencv-python-headless", "albumentations")


def make(dataset: Any, **arguments: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, **arguments)


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    return make(dataset, batch_size=batch_size, num_workers=workers)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    return make(Augmented(photos, normalised), batch_size=batch_size, shuffle=True, num_workers=workers)


class Augmented:
    """The usual dataset: OpenCV decodes the whole photograph; albumentations crops, mirrors, may normalise."""

    def __init__(self, photos: Photos, normalised: bool) -> None:
        import albumentations as A

        steps: list[Any] = [A.RandomResizedCrop(size=(SIZE, SIZE)), A.HorizontalFlip()]
        if normalised:
            steps += [A.Normalize(MEAN, STD), A.pytorch.ToTensorV2()]
        self.photos = photos
        self.transform = A.Compose(steps)

    def __len__(self) -> int:
        return len(self.photos.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import cv2

        cv2.setNumThreads(0)  # the workers are the parallelism, in every loader
        photo = cv2.cvtColor(cv2.imread(self.photos.files[index]), cv2.COLOR_BGR2RGB)
        return {"image": self.transform(image=photo)["image"], "label": self.photos.labels[index]}
