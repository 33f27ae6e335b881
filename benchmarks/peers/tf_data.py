"""tf.data: photographs by TensorFlow's operators, which decode only the crop; samples by `numpy_function`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.workloads import MEAN, SIZE, STD, Epochs, Photos

NAME = "tf.data"
REQUIREMENTS = ("tensorflow-cpu==2.21.0", "numpy==2.4.6", "opencv-python-headless==5.0.0.93")


def samples(dataset: Any, batch_size: int, workers: int) -> Any:
    import tensorflow as tf

    is_dict = isinstance(dataset[0], dict)

    def read(index: Any) -> tuple[Any, Any]:
        sample = dataset[int(index)]
        image, label = (sample["image"], sample["label"]) if is_dict else sample
        return image, np.int64(label)

    first = read(0)[0]

    def as_tensors(index: Any) -> tuple[Any, Any]:
        image, label = tf.numpy_function(read, [index], (tf.as_dtype(first.dtype), tf.int64))
        image.set_shape(first.shape)
        return image, label

    return _epochs(
        tf.data.Dataset.range(len(dataset)).map(as_tensors, workers, deterministic=True), batch_size, workers
    )


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import tensorflow as tf

    mean, std = (tf.constant(values, tf.float32) * 255 for values in (MEAN, STD))

    def read(file: Any, label: Any) -> tuple[Any, Any]:
        jpeg = tf.io.read_file(file)
        box = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg), box, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0)
        )
        crop = tf.image.decode_and_crop_jpeg(jpeg, tf.concat([begin[:2], size[:2]], 0), channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(crop, [SIZE, SIZE]))
        if normalised:
            return tf.transpose((image - mean) / std, [2, 0, 1]), label
        return tf.cast(image, tf.uint8), label

    files = tf.data.Dataset.from_tensor_slices((photos.files, photos.labels)).shuffle(len(photos.files))
    return _epochs(files.map(read, workers, deterministic=True), batch_size, workers)


def _epochs(dataset: Any, batch_size: int, workers: int) -> Epochs:
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    batches = dataset.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)

    def start() -> Iterator[Any]:
        for image, label in batches.as_numpy_iterator():
            yield {"image": image, "label": label}

    return Epochs(start)
