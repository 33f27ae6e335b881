"""LitData: its chunk files, read by `StreamingDataset` and `StreamingDataLoader`; photographs by OpenCV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import Photos, train_photo

NAME = "LitData"
REQUIREMENTS = ("litdata==0.2.76", "torch==2.13.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def prepare(photos: Photos) -> None:
    import litdata

    inputs = list(zip(photos.files, photos.labels, strict=True))
    litdata.optimize(_bytes_of, inputs, photos.prepared, chunk_bytes="16MB", num_workers=1, mode="overwrite")


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import litdata

    class Read(litdata.StreamingDataset):  # type: ignore[misc]  # litdata is not installed where types are checked
        def __getitem__(self, index: Any) -> dict[str, Any]:
            sample = super().__getitem__(index)
            image = train_photo(sample["jpeg"], np.random.default_rng(), normalised)
            return {"image": image, "label": sample["label"]}

    return litdata.StreamingDataLoader(
        Read(photos.prepared, shuffle=True), batch_size=batch_size, num_workers=workers, shuffle=True
    )


def _bytes_of(entry: tuple[str, int]) -> dict[str, Any]:
    return {"jpeg": Path(entry[0]).read_bytes(), "label": entry[1]}
