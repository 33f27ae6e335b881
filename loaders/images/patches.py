"""Windows of photos at full scale: `ImageFolder(…, crop=RandomPatches(224, per_photo=8))`."""

from __future__ import annotations

import operator
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from loaders.errors import FieldShapeError
from loaders.images.crops import Crop, Size, as_shape, check_out
from loaders.images.decode.image import EncodedImage
from loaders.images.decode.region import Region
from loaders.randomness.streams import sample_rng


@dataclass(frozen=True)
class RandomPatches(Crop):
    """Random windows of a photo, cut and not resized: for pathology, satellites, super-resolution.

    Each lies anywhere in the photo with the same probability; numbers are drawn from `sample_rng()`. The pixels are
    those of the decoded photo, bit for bit. Of JPEGs that `loaders prepare` has written only what lies around the
    window is read and decoded.

    Args:
        size: of a window in pixels: an int for a square, or (height, width). No photo may be smaller.
        per_photo: windows of each photo. A dataset of N photos has N * per_photo samples: sample i is a window of photo
            i // per_photo.
        stacked: True makes them one sample instead: the image is uint8 (per_photo, H, W, 3), and a dataset has N.
        interpolation, exact: have no effect here.

    Raises:
        ValueError: a size or a number below 1.
        FieldShapeError: on reading; a photo is smaller than a window.
    """

    size: Size
    per_photo: int = 1
    _: KW_ONLY
    stacked: bool = False

    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_shape(self.size)
        if operator.index(self.per_photo) < 1:
            raise ValueError(f"per_photo={self.per_photo!r}: expected at least 1.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width) of every result, behind per_photo where they are stacked."""
        return (self.per_photo, *as_shape(self.size)) if self.stacked else as_shape(self.size)

    @property
    def per_file(self) -> int:
        """Samples of a dataset for each of its files."""
        return 1 if self.stacked else self.per_photo

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """A random window of a photo of width by height."""
        random = (sample_rng() if rng is None else rng).random
        down, across = as_shape(self.size)
        top = int(random() * (height - down + 1))
        return Region(int(random() * (width - across + 1)), top, across, down)

    def _read(self, image: EncodedImage, out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        check_out(out, self.shape)
        width, height = image.size()
        down, across = as_shape(self.size)
        if width < across or height < down:
            raise FieldShapeError(
                f'{image.subject}, field "image": {width} x {height} pixels hold no window of {across} x {down}.\n'
                "  Leave the file out of the dataset, or ask for smaller windows.",
                index=image.index,
                source=image.name,
                field="image",
            )
        if out is None and not self.stacked:
            return image.read("RGB", self.region(width, height))
        result: np.ndarray[Any, np.dtype[np.uint8]] = np.empty((*self.shape, 3), np.uint8) if out is None else out
        # One decoding serves all windows where a window costs as much.
        whole = image.picture() if self.stacked and self.per_photo > 1 and image.reads_all() else None
        for row in result if self.stacked else (result,):
            region = self.region(width, height)
            row[...] = image.read("RGB", region) if whole is None else region.of(whole)
        return result
