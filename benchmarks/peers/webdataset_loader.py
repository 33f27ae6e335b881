"""WebDataset: tar files, decoded in the workers of torch's loader; photographs by OpenCV."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import Photos, train_photo

NAME = "WebDataset"
REQUIREMENTS = ("webdataset==1.0.2", "torch==2.13.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")
_SHARDS = 16


def prepare(photos: Photos) -> None:
    for shard in range(_SHARDS):
        with tarfile.open(Path(photos.prepared) / f"{shard:02}.tar", "w") as tar:
            for number in range(shard, len(photos.files), _SHARDS):
                tar.add(photos.files[number], f"{number:06}.jpg")


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import webdataset

    def read(sample: Any) -> dict[str, Any]:
        number = int(sample["__key__"])
        return {
            "image": train_photo(sample["jpg"], np.random.default_rng(number), normalised),
            "label": photos.labels[number],
        }

    tars = str(Path(photos.prepared) / f"{{00..{_SHARDS - 1:02}}}.tar")
    dataset = webdataset.WebDataset(tars, shardshuffle=_SHARDS, empty_check=False).shuffle(256).map(read)
    batches = dataset.batched(batch_size, collation_fn=_stacked)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers)


def _stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
