"""FFCV: its file format, read by threads of compiled code, in a random order.

The file holds the JPEGs as they are: FFCV's own `RGBImageField` would decode and encode them anew. FFCV decodes the
whole photograph with libjpeg-turbo's fast, less accurate DCT, and resizes the crop with OpenCV's `INTER_AREA`, where
other peers interpolate linearly: it offers no choice of either. Normalised batches have the shape of the others', but
lie in memory as NHWC, which is FFCV's default; it takes longer to deliver NCHW.

FFCV has no wheels: pip compiles it, which needs the Debian packages in `SYSTEM`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import MEAN, SIZE, STD, Epochs, Photos

NAME = "FFCV"
# FFCV names its dependencies without versions, and Pillow not at all.
REQUIREMENTS = (
    "ffcv==1.0.2",
    "torch==2.13.0",
    "numpy==2.4.6",
    "numba==0.68.1",
    "opencv-python==5.0.0.93",
    "pillow==13.0.0",
    "assertpy==1.1",
    "fastargs==1.2.0",
    "psutil==7.2.2",
    "pytorch-pfn-extras==0.9.0",
    "terminaltables==3.1.10",
    "tqdm==4.70.1",
)
SYSTEM = ("g++", "libturbojpeg0-dev", "libopencv-dev", "pkg-config")


def prepare(photos: Photos) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter
    from PIL import Image

    class Jpegs(RGBImageField):  # type: ignore[misc]  # ffcv is not installed where types are checked
        def encode(self, destination: Any, file: str, malloc: Any) -> None:
            jpeg = np.fromfile(file, np.uint8)
            with Image.open(file) as photo:
                destination["width"], destination["height"] = photo.size
            destination["mode"] = IMAGE_MODES["jpg"]
            destination["data_ptr"], storage = malloc(jpeg.nbytes)
            storage[:] = jpeg

    inputs = list(zip(photos.files, photos.labels, strict=True))
    writer = DatasetWriter(_file(photos), {"image": Jpegs(), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(inputs)


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    from ffcv.fields import RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    image: list[Any] = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip()]
    if normalised:
        mean, std = (np.array(values) * 255 for values in (MEAN, STD))
        image += [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    else:
        image.append(ToTensor())
    loader = Loader(
        _file(photos),
        batch_size,
        workers,
        order=OrderOption.RANDOM,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
        custom_fields={"image": RGBImageField},
    )

    def start() -> Iterator[Any]:
        epoch = iter(loader)
        try:
            yield from epoch
        finally:
            # The thread of an abandoned epoch would compete with the next epoch's. It ends soon, unless it has made
            # the last batch: then it waits for ever until somebody takes the batches before it.
            epoch.close()
            epoch.join(timeout=1)

    return Epochs(start)


def _file(photos: Photos) -> str:
    return str(Path(photos.prepared) / "photos.beton")
