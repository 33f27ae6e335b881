"""MosaicML Streaming: MDS shards, read by `StreamingDataset` in torch's loader; photographs by OpenCV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.torchvision_pil import import_torchvision
from benchmarks.workloads import Photos, train_photo

NAME = "MosaicML Streaming"
# It requires an older NumPy than the other peers.
REQUIREMENTS = ("mosaicml-streaming==0.13.0", "torch==2.13.0", "numpy==2.1.3", "opencv-python-headless==5.0.0.93")


def prepare(photos: Photos) -> None:
    import_torchvision()
    from streaming import MDSWriter

    with MDSWriter(out=photos.prepared, columns={"jpeg": "bytes", "label": "int"}, exist_ok=True) as out:
        for file, label in zip(photos.files, photos.labels, strict=True):
            out.write({"jpeg": Path(file).read_bytes(), "label": label})


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import_torchvision()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    class Read(StreamingDataset):  # type: ignore[misc]  # streaming is not installed where types are checked
        def __getitem__(self, index: Any) -> dict[str, Any]:
            sample = super().__getitem__(index)
            image = train_photo(sample["jpeg"], np.random.default_rng(), normalised)
            return {"image": image, "label": sample["label"]}

    clean_stale_shared_memory()  # left by earlier runs
    return DataLoader(Read(local=photos.prepared, shuffle=True, batch_size=batch_size), batch_size, num_workers=workers)
