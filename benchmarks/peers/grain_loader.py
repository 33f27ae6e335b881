"""Grain: `MapDataset` in worker processes, batches through its shared memory; photographs by OpenCV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import Epochs, Photos, train_photo

NAME = "Grain"
REQUIREMENTS = ("grain==0.2.18", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    import grain

    return _in_workers(grain.MapDataset.source(dataset), batch_size, workers)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import grain

    def read(index: int, rng: np.random.Generator) -> dict[str, Any]:
        image = train_photo(Path(photos.files[index]).read_bytes(), rng, normalised)
        return {"image": image, "label": photos.labels[index]}

    indices = grain.MapDataset.source(range(len(photos.files))).seed(0).shuffle()
    return _in_workers(indices.random_map(read), batch_size, workers)


def _in_workers(dataset: Any, batch_size: int, workers: int) -> Epochs:
    import grain

    # Grain's worker processes require that absl's flags have been parsed.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["benchmark"])
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    # By default each process reads 500 samples ahead, which would make a short measurement look too fast.
    ahead = grain.ReadOptions(prefetch_buffer_size=batch_size)
    loader = dataset.to_iter_dataset(ahead).batch(batch_size, drop_remainder=True).mp_prefetch(options)
    return Epochs(lambda: iter(loader))
