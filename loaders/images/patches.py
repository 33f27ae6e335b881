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
    """Random windows of a photo, cropped without resizing: for pathology, satellite images, super-resolution.

    Window positions are uniform over the photo, drawn from `sample_rng()`. The pixels are those of the decoded photo,
    bit for bit. Of a JPEG written by `loaders prepare`, only the segments around the window are read and decoded.

    Args:
        size: of a window, in pixels: an int for a square, or (height, width). Every photo must be at least this large.
        per_photo: windows per photo. N photos make N * per_photo samples; sample i is of photo i // per_photo.
        stacked: True makes a photo's windows one sample, uint8 (per_photo, H, W, 3): N photos make N samples.
        interpolation, exact: have no effect here.

    Raises:
        ValueError: `size` or `per_photo` is below 1.
        FieldShapeError: (when reading) a photo is smaller than a window.
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
        """(height, width) of every result, or (per_photo, height, width) if stacked."""
        return (self.per_photo, *as_shape(self.size)) if self.stacked else as_shape(self.size)

    @property
    def per_file(self) -> int:
        """Samples per file of a dataset."""
        return 1 if self.stacked else self.per_photo

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """A random window of a photo of `width` by `height` pixels."""
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
                f'{image.subject}, field "image": {width} x {height} pixels cannot hold a window '
                f"of {across} x {down}.\n"
                "  Leave the file out of the dataset, or use a smaller window.",
                index=image.index,
                source=image.name,
                field="image",
            )
        if out is None and not self.stacked:
            return image.read("RGB", self.region(width, height))
        result: np.ndarray[Any, np.dtype[np.uint8]] = np.empty((*self.shape, 3), np.uint8) if out is None else out
        # Where a window costs as much as the whole photo, decode the photo once for all windows.
        whole = image.picture() if self.stacked and self.per_photo > 1 and image.reads_all() else None
        for row in result if self.stacked else (result,):
            region = self.region(width, height)
            row[...] = image.read("RGB", region) if whole is None else region.of(whole)
        return result
