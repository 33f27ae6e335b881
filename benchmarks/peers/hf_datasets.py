"""HF datasets: an Arrow table of encoded files with `set_transform`, in torch's loader; photographs by OpenCV."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.workloads import Photos, train_photo

NAME = "HF datasets"
REQUIREMENTS = ("datasets==5.2.0", "torch==2.13.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def prepare(photos: Photos) -> None:
    from pathlib import Path

    from datasets import Dataset

    jpegs = [Path(file).read_bytes() for file in photos.files]
    Dataset.from_dict({"jpeg": jpegs, "label": photos.labels}).save_to_disk(photos.prepared)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    def augmented(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [train_photo(jpeg, np.random.default_rng(), normalised) for jpeg in rows["jpeg"]]
        return {"image": images, "label": rows["label"]}

    dataset: Any = load_from_disk(photos.prepared)
    dataset.set_transform(augmented)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)
