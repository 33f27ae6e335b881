"""Several random crops of one photo, of several sizes: `ImageFolder(…, crop=MultiCrop([(224, 2), (96, 8)]))`."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import cv2
import numpy as np

from loaders.images.crops import RandomResizedCrop, Size, cheapest_scale, check_out, coarsest_scale, snapped
from loaders.images.decode import Backend, Source
from loaders.images.decode.image import EncodedImage, open_image
from loaders.images.decode.region import Region, around

# Time to halve and resize, per pixel of the part that holds all regions, on the scale of the constants in `crops`.
_NS_OF_CROPS_PER_PIXEL = 1.0

Pictures = tuple[np.ndarray[Any, np.dtype[np.uint8]], ...]
# A crop, the shape of its result, and whether its region is halved before it is resized.
_Resizer = tuple[RandomResizedCrop, tuple[int, int], bool]


@dataclass(frozen=True)
class MultiCrop:
    """Random crops of several sizes from one decoding of the photo: the views of DINO, SwAV and their relatives.

        MultiCrop([(224, 2), (96, 8)])
        MultiCrop([(RandomResizedCrop(224, (0.4, 1.0), flip=0.5), 2), (RandomResizedCrop(96, (0.05, 0.4)), 8)])

    Regions and flips are drawn from `sample_rng()`, as many single crops would draw theirs. A JPEG is decoded at the
    smallest scale that leaves 1.25 pixels per pixel of every crop, and only the part that holds all regions, where that
    is cheaper.

    A crop without `interpolation` or `exact` halves its region, by means of two by two pixels, while that leaves a
    pixel per pixel of the result in both directions (a last odd row or column is left out), then resizes with
    `cv2.INTER_LINEAR`: that takes a fraction of the time of `cv2.INTER_AREA`, and aliases less than `cv2.INTER_LINEAR`
    alone. With `interpolation`, the pixels are those of the `RandomResizedCrop` for that region at that scale.
    `exact=True` on one of them decodes for all at full scale.

    Args:
        crops: (crop, how many), for each size; an int or (height, width) stands for `RandomResizedCrop` of that size.

    Attributes:
        is_random: True: two reads of one photo return different regions.

    Raises:
        ValueError: there are none, or less than one of a size.
        TypeError: an entry is no such pair.
    """

    crops: Sequence[tuple[Size | RandomResizedCrop, int]]
    _resizers: tuple[_Resizer, ...] = field(init=False, repr=False, compare=False)

    is_random: ClassVar[bool] = True
    per_file: ClassVar[int] = 1

    def __post_init__(self) -> None:
        entries = tuple(_checked(entry) for entry in self.crops)
        if not entries:
            raise ValueError("crops is empty: expected pairs such as (224, 2), two crops of 224 by 224 pixels.")
        # The class is frozen. What resizes is made once: making it takes as long as resizing a small crop.
        object.__setattr__(self, "crops", entries)
        object.__setattr__(self, "_resizers", tuple(_resizer(crop) for crop, count in entries for _ in range(count)))

    @property
    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """(how many, height, width) of each size."""
        return tuple((count, *crop.shape) for crop, count in self._entries())

    def read(
        self,
        source: Source,
        out: Pictures | None = None,
        *,
        index: int | None = None,
        backend: Backend | None = None,
    ) -> Pictures:
        """Decode an image file once, and make all crops of it.

        Args:
            source: a path, or encoded bytes.
            out: where the results are written, uint8 of their shapes; None allocates new arrays.
            index: the number of the sample, for error messages.
            backend: as in `read_image`.

        Returns:
            uint8 (how many, H, W, 3) RGB for each size, upright; `out` if it was given.

        Raises:
            DecodeError: the file is missing, damaged, or not an image that OpenCV can decode.
            ValueError: `out` has the wrong number of arrays, or one of the wrong shape or dtype.
        """
        results = self._results(out)
        with open_image(source, index, backend) as image:
            if not image.is_jpeg:  # other formats are decoded whole
                return self.apply(image.picture(), results)
            width, height = image.size()
            regions = self._regions(width, height)
            scale = self._scale(regions, (width, height), image)
            if scale > 1:
                regions = [snapped(region, scale, width, height) for region in regions]
            self._write(image.read_regions(regions, scale), results)
        return results

    def apply(self, picture: np.ndarray[Any, np.dtype[np.uint8]], out: Pictures | None = None) -> Pictures:
        """Make all crops of a decoded picture.

        Args:
            picture: uint8 (H, W, 3), upright; it may be read-only, and is not modified.
            out: as in `read`.

        Returns:
            uint8 (how many, H, W, 3) for each size; `out` if it was given.

        Raises:
            ValueError: `out` has the wrong number of arrays, or one of the wrong shape or dtype.
        """
        results = self._results(out)
        height, width = picture.shape[:2]
        self._write([region.of(picture) for region in self._regions(width, height)], results)
        return results

    def _entries(self) -> Iterator[tuple[RandomResizedCrop, int]]:
        return iter(cast(Sequence[tuple[RandomResizedCrop, int]], self.crops))  # __post_init__ has replaced the sizes

    def _each(self) -> Iterator[RandomResizedCrop]:
        """One crop per region, in the order of the results."""
        return (crop for crop, count in self._entries() for _ in range(count))

    def _regions(self, width: int, height: int) -> list[Region]:
        regions = [Region(*crop.region(width, height)) for crop in self._each()]
        for region in regions:
            if not region.is_inside(width, height):
                raise ValueError(f"the crop's {region} is not inside the picture of {width} x {height} pixels.")
        return regions

    def _scale(self, regions: list[Region], photo: tuple[int, int], image: EncodedImage) -> int:
        if any(crop.exact for crop, _ in self._entries()):
            return 1
        each = zip(self._each(), regions, strict=True)
        scale = min(coarsest_scale(region, crop.shape) for crop, region in each)
        return cheapest_scale(scale, around(regions), photo, image, _NS_OF_CROPS_PER_PIXEL)

    def _results(self, out: Pictures | None) -> Pictures:
        shapes = self.shape
        if out is None:
            return tuple(np.empty((*shape, 3), np.uint8) for shape in shapes)
        if len(out) != len(shapes):
            raise ValueError(f"out has {len(out)} arrays; the crops have {len(shapes)} sizes.")
        for array, shape in zip(out, shapes, strict=True):
            check_out(array, shape)
        return out

    def _write(self, parts: list[np.ndarray[Any, Any]], results: Pictures) -> None:
        rows = (row for array in results for row in array)
        for (crop, shape, halves), part, row in zip(self._resizers, parts, rows, strict=True):
            crop._resized(_halved(part, *shape) if halves else part, shape, row)


def _resizer(crop: RandomResizedCrop) -> _Resizer:
    if crop.exact or crop.interpolation is not None:
        return crop, crop.shape, False
    return replace(crop, interpolation=cv2.INTER_LINEAR), crop.shape, True


def _halved(part: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """The part, halved while that leaves at least `height` by `width` pixels."""
    while part.shape[0] >= 2 * height and part.shape[1] >= 2 * width:
        down, across = part.shape[0] // 2, part.shape[1] // 2
        # OpenCV has fast code for means of two by two pixels, but none for a size that does not divide.
        part = cv2.resize(part[: 2 * down, : 2 * across], (across, down), interpolation=cv2.INTER_AREA)
    return part


def _checked(entry: Any) -> tuple[RandomResizedCrop, int]:
    try:
        crop, count = entry
        count = operator.index(count)
    except (TypeError, ValueError):
        raise TypeError(
            f"{entry!r} is not a pair of a crop and how many: expected (224, 2), or (RandomResizedCrop(224), 2)."
        ) from None
    if count < 1:
        raise ValueError(f"{entry!r}: expected at least one crop of each size.")
    return crop if isinstance(crop, RandomResizedCrop) else RandomResizedCrop(crop), count
