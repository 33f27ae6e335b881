"""SPDL: photographs by its own decoder in threads; samples in a process, through its shared-memory pool."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.workloads import MEAN, SIZE, STD, Epochs, Photos, random_crop

NAME = "SPDL"
REQUIREMENTS = ("spdl==0.8.0", "spdl-io==0.8.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    from spdl.pipeline import PipelineBuilder, SharedMemorySegmentPool, run_pipeline_in_subprocess

    indices = [range(start, start + batch_size) for start in range(0, len(dataset) - batch_size + 1, batch_size)]
    config = (
        PipelineBuilder()
        .add_source(indices)
        .pipe(partial(_stacked, dataset), concurrency=workers)
        .add_sink(buffer_size=3)
        .get_config()
    )
    nbytes = sum(np.asarray(value).nbytes for value in _stacked(dataset, indices[0]).values())
    pool = SharedMemorySegmentPool(nbytes + (1 << 20), 8)
    return run_pipeline_in_subprocess(config, num_threads=workers, arena=pool)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    def start() -> Iterator[Any]:
        from spdl.pipeline import PipelineBuilder

        order = np.random.default_rng(0).permutation(len(photos.files))
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        pipeline = (
            PipelineBuilder()
            .add_source(batches)
            .disaggregate()
            .pipe(partial(_decoded, photos), concurrency=workers)
            .aggregate(batch_size)
            .pipe(partial(_together, normalised=normalised))
            .add_sink(buffer_size=3)
            .build(num_threads=workers + 1)
        )
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    return Epochs(start)


def _stacked(dataset: Any, indices: range) -> dict[str, Any]:
    rows = [dataset[index] for index in indices]
    first = rows[0]
    names = first if isinstance(first, dict) else range(len(first))
    stacked = {name: np.stack([row[name] for row in rows]) for name in names}
    return stacked if isinstance(first, dict) else {"image": stacked[0], "label": stacked[1]}


def _decoded(photos: Photos, index: int) -> tuple[Any, int]:
    import spdl.io

    rng = np.random.default_rng(index)
    packets = spdl.io.demux_image(photos.files[index])
    # All files have the same size, so the header is not read.
    top, left, height, width = random_crop(375, 500, rng)
    flip = "hflip," if rng.random() < 0.5 else ""
    steps = f"crop={width}:{height}:{left}:{top}:exact=1,scale={SIZE}:{SIZE}:flags=bilinear,{flip}format=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=steps), photos.labels[index]


def _together(frames: list[tuple[Any, int]], normalised: bool) -> dict[str, Any]:
    import spdl.io

    images = spdl.io.to_numpy(spdl.io.convert_frames([image for image, _ in frames]))
    labels = np.array([label for _, label in frames])
    if normalised:
        mean, std = (np.array(values, np.float32) * 255 for values in (MEAN, STD))
        images = np.ascontiguousarray(((images - mean) / std).transpose(0, 3, 1, 2))
    return {"image": images, "label": labels}
