"""NVIDIA DALI with its CPU operators; samples by `external_source` in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.workloads import MEAN, SIZE, STD, Epochs, Photos

NAME = "DALI, CPU"
REQUIREMENTS = ("nvidia-dali-cuda120==2.4.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    from nvidia.dali import fn, pipeline_def

    def of_sample(about: Any) -> tuple[Any, Any]:
        if about.iteration >= len(dataset) // batch_size:
            raise StopIteration
        image, label = _pair(dataset[about.idx_in_epoch])
        return np.asarray(image), np.array(label)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=workers,
        device_id=None,
        py_num_workers=workers,
        py_start_method="fork",
        prefetch_queue_depth=2,
    )
    def made() -> Any:
        return tuple(fn.external_source(source=of_sample, num_outputs=2, parallel=True, batch=False))

    return _epochs(made())


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, prefetch_queue_depth=2)
    def made() -> Any:
        jpegs, labels = fn.readers.file(
            files=photos.files, labels=photos.labels, random_shuffle=True, name="files", pad_last_batch=False
        )
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], output_type=types.RGB
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        mirror = fn.random.coin_flip()
        if normalised:
            mean, std = ([255 * value for value in values] for values in (MEAN, STD))
            images = fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, output_layout="CHW")
        else:
            images = fn.flip(images, horizontal=mirror)
        return images, labels

    return _epochs(made(), len(photos.files) // batch_size)


def _epochs(pipeline: Any, batches: int | None = None) -> Epochs:
    pipeline.start_py_workers()
    pipeline.build()

    def start() -> Iterator[Any]:
        count = 0
        while batches is None or count < batches:
            try:
                images, labels = pipeline.run()
            except StopIteration:
                pipeline.reset()
                return
            count += 1
            yield {"image": images.as_array(), "label": labels.as_array()}

    return Epochs(start)


def _pair(sample: Any) -> tuple[Any, Any]:
    return (sample["image"], sample["label"]) if isinstance(sample, dict) else sample
