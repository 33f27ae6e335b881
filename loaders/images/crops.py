"""The region of a photo that is decoded, and the size of the result: `ImageFolder(…, crop=RandomResizedCrop(224))`."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import cv2
import numpy as np

from loaders.images.decode import Backend, Source
from loaders.images.decode.image import EncodedImage, open_image
from loaders.images.decode.region import Region
from loaders.randomness.streams import sample_rng

Size = int | tuple[int, int]

_ATTEMPTS = 10  # of RandomResizedCrop to find a region that fits
_PIXELS_LEFT = 1.25  # at least, per pixel of the result in each direction, at a reduced scale
_INTERPOLATIONS = (
    cv2.INTER_NEAREST,
    cv2.INTER_LINEAR,
    cv2.INTER_CUBIC,
    cv2.INTER_AREA,
    cv2.INTER_LANCZOS4,
    cv2.INTER_LINEAR_EXACT,
    cv2.INTER_NEAREST_EXACT,
)
# Decoding times of libjpeg-turbo in nanoseconds, fitted to photos of 0.2 and 12 megapixels. Huffman decoding: per byte
# of the file down to the region's last row. Pixels: per pixel of the region, or at a reduced scale per full-scale pixel
# of the whole photo. INTER_AREA reads every pixel, the other interpolations a few per pixel of the result. Only the
# ratios matter.
_NS_PER_BYTE = 10.0
_NS_PER_PIXEL = {1: 2.3, 2: 0.9, 4: 0.4, 8: 0.2}
_NS_OF_AREA_PER_PIXEL = 2.2


@dataclass(frozen=True)
class Crop(ABC):
    """A region of a photo, decoded and resized. Subclasses choose the region; objects are frozen and picklable.

    Pixels outside the region are not decoded where that can be avoided. A JPEG is decoded at scale 1/2, 1/4 or 1/8
    where that is cheaper and leaves 1.25 pixels per pixel of the result in both directions. The region's sides then
    move to the edges of the reduced pixels, by at most 0.4 pixels of the result (1.2 where EXIF turns a photo whose
    sides are not multiples of 8), and INTER_AREA averages block means instead of all pixels: the results differ by 1 to
    3 levels of 255 on average, by 6 on the sharpest photos. Other interpolations alias less than at full scale.

    Args:
        interpolation: an OpenCV constant. None uses `cv2.INTER_AREA`, which averages, unless the region is smaller than
            the result in either direction; then it uses `cv2.INTER_LINEAR`. Passing `cv2.INTER_LINEAR` is faster, and
            aliases when it shrinks.
        exact: True decodes at full scale only: the pixels are those of decoding the whole photo, cropping, then
            `cv2.resize`, bit for bit, on every backend. Otherwise they may depend on whether nvImageCodec is installed
            and whether the file has restart markers, as these change which scale is cheapest.

    Attributes:
        is_random: whether two reads of one photo may return different regions.
    """

    _: KW_ONLY
    interpolation: int | None = None
    exact: bool = False

    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.interpolation is not None and self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; use None or one of cv2.INTER_….")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """(height, width) of every result, or None if it depends on the photo."""

    @property
    def per_file(self) -> int:
        """Samples per file of a dataset."""
        return 1

    @abstractmethod
    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> tuple[int, int, int, int]:
        """The region of an upright photo of `width` by `height` pixels: (left, top, width, height), inside the photo.

        Args:
            width, height: of the photo, in pixels.
            rng: the generator to draw from; None uses `sample_rng()`.
        """

    def read(
        self,
        source: Source,
        out: np.ndarray[Any, np.dtype[np.uint8]] | None = None,
        *,
        index: int | None = None,
        backend: Backend | None = None,
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Decode the region of an image file and resize it.

        Args:
            source: a path, or encoded bytes.
            out: where the result is written, uint8 of its shape; None allocates a new array.
            index: the number of the sample, for error messages.
            backend: as in `read_image`.

        Returns:
            uint8 (H, W, 3) RGB, upright; `out` if it was given.

        Raises:
            DecodeError: the file is missing, damaged, or not an image that OpenCV can decode.
            ValueError: `out` has the wrong shape or dtype.
        """
        with open_image(source, index, backend) as image:
            return self._read(image, out)

    def apply(
        self, picture: np.ndarray[Any, np.dtype[np.uint8]], out: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Cut the region out of a decoded picture and resize it.

        Args:
            picture: uint8 (H, W, 3), upright; it may be read-only, and is not modified.
            out: as in `read`.

        Returns:
            uint8 (H, W, 3); `out` if it was given.

        Raises:
            ValueError: `out` has the wrong shape or dtype.
        """
        height, width = picture.shape[:2]
        region = Region(*self.region(width, height))
        if not region.is_inside(width, height):
            raise ValueError(f"the crop's {region} is not inside the picture of {width} x {height} pixels.")
        return self._resized(region.of(picture), self._shape_of(region), out)

    def _read(self, image: EncodedImage, out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if not image.is_jpeg:  # other formats are decoded whole
            return self.apply(image.picture(), out)
        width, height = image.size()
        region = Region(*self.region(width, height))
        if not region.is_inside(width, height):
            raise ValueError(f"the crop's {region} is not inside the picture of {width} x {height} pixels.")
        shape = self._shape_of(region)
        scale = 1 if self.exact else self._scale(region, shape, (width, height), image)
        if scale > 1:
            region = snapped(region, scale, width, height)
        return self._resized(image.read("RGB", region, scale), shape, out)

    def _shape_of(self, region: Region) -> tuple[int, int]:
        """(height, width) of the result."""
        assert self.shape is not None
        height, width = self.shape
        return height, width

    def _scale(self, region: Region, shape: tuple[int, int], photo: tuple[int, int], image: EncodedImage) -> int:
        """The cheapest scale that leaves enough pixels; 8 means 1/8."""
        area = _NS_OF_AREA_PER_PIXEL if self.interpolation in (None, cv2.INTER_AREA) else 0.0
        return cheapest_scale(coarsest_scale(region, shape), region, photo, image, area)

    def _resized(
        self, part: np.ndarray[Any, Any], shape: tuple[int, int], out: np.ndarray[Any, Any] | None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        check_out(out, shape)
        height, width = shape
        interpolation = self.interpolation
        if interpolation is None:
            grows = part.shape[0] < height or part.shape[1] < width
            interpolation = cv2.INTER_LINEAR if grows else cv2.INTER_AREA
        target = out if out is not None and out.flags.c_contiguous else None
        resized: np.ndarray[Any, Any] = cv2.resize(part, (width, height), dst=target, interpolation=interpolation)
        if out is None or resized is out:
            return resized
        out[...] = resized
        return out


@dataclass(frozen=True)
class RandomResizedCrop(Crop):
    """A random region of the photo, resized and possibly mirrored: the usual crop for training on ImageNet.

    Pass it as `crop=`: unlike the Albumentations transform of this name, it decodes only the region.

    The region's share of the photo's area is uniform, the logarithm of its width / height is uniform, and its position
    is uniform among those inside the photo. The first of up to ten draws that fits is used; if none fits, the largest
    central region with a ratio within `ratio`. This is the distribution of torchvision's `RandomResizedCrop`, with
    numbers drawn from `sample_rng()`.

    Args:
        size: of the result in pixels: an int for a square, or (height, width).
        scale: least and greatest share of the photo's area.
        ratio: least and greatest width / height of the region.
        flip: the probability that the result is mirrored, left to right.
        interpolation, exact: see `Crop`.

    Raises:
        ValueError: a size below 1, or limits that are out of order or out of range.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0

    is_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_shape(self.size)
        least, greatest = self.scale
        if not 0 < least <= greatest <= 1:
            raise ValueError(f"scale {self.scale!r}: expected (least, greatest) with 0 < least <= greatest <= 1.")
        least, greatest = self.ratio
        if not 0 < least <= greatest < math.inf:
            raise ValueError(f"ratio {self.ratio!r}: expected (least, greatest) with 0 < least <= greatest.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip!r}: expected a probability, from 0 to 1.")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result."""
        return as_shape(self.size)

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """A random region of a photo of `width` by `height` pixels."""
        random = (sample_rng() if rng is None else rng).random  # 0 <= random() < 1
        (least, greatest), (flattest, widest) = self.scale, self.ratio
        log_flattest = math.log(flattest)
        log_span = math.log(widest) - log_flattest
        for _ in range(_ATTEMPTS):
            area = width * height * (least + (greatest - least) * random())
            ratio = math.exp(log_flattest + log_span * random())
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                top = int(random() * (height - down + 1))
                return Region(int(random() * (width - across + 1)), top, across, down)
        across, down = width, height
        if width < flattest * height:
            down = max(1, round(width / flattest))
        elif width > widest * height:
            across = max(1, round(height * widest))
        return _centered(across, down, width, height)

    def _resized(
        self, part: np.ndarray[Any, Any], shape: tuple[int, int], out: np.ndarray[Any, Any] | None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        result = super()._resized(part, shape, out)
        if self.flip and sample_rng().random() < self.flip:
            result[...] = cv2.flip(result, 1, dst=result if result.flags.c_contiguous else None)
        return result


@dataclass(frozen=True)
class CenterCrop(Crop):
    """The centre of the photo, the same at each read: the usual crop for evaluation on ImageNet.

    Like resizing the photo's shorter side to `resize` pixels and then cropping the centre to `size`, but done as one
    crop and one resize. The region's sides are `size / resize` of the photo's shorter side, rounded to whole pixels; it
    is centred, rounded towards the upper left corner.

    Args:
        size: of the result in pixels: an int for a square, or (height, width); at most `resize`.
        resize: the length to which the photo's shorter side is resized, in pixels.
        interpolation, exact: see `Crop`.

    Raises:
        ValueError: a size below 1 or above `resize`.
    """

    size: Size
    resize: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(as_shape(self.size)) > self.resize:
            raise ValueError(
                f"size {self.size!r} is more than resize={self.resize!r}, the length of the photo's shorter side.\n"
                f"  Pass a larger resize=, such as {math.ceil(max(as_shape(self.size)) * 8 / 7)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result."""
        return as_shape(self.size)

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """The central region of a photo of `width` by `height` pixels."""
        per_pixel = min(width, height) / self.resize
        down, across = (max(1, round(side * per_pixel)) for side in self.shape)
        return _centered(across, down, width, height)


@dataclass(frozen=True)
class Resize(Crop):
    """The whole photo, resized.

    Args:
        size: an int is the length of the resized shorter side, in pixels; the longer side keeps the aspect ratio,
            rounded down, so photos of different aspect ratios do not stack into a batch: declare `Field(ragged=True)`
            for them. (height, width) is the size of every result, whatever the aspect ratio of the photo.
        interpolation, exact: see `Crop`.

    Raises:
        ValueError: a size below 1.
    """

    size: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        as_shape(self.size)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None if it depends on the photo."""
        return as_shape(self.size) if isinstance(self.size, tuple) else None

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """The whole photo."""
        return Region(0, 0, width, height)

    def _shape_of(self, region: Region) -> tuple[int, int]:
        if self.shape is not None:
            return self.shape
        side, shorter = operator.index(self.size), min(region.width, region.height)  # type: ignore[arg-type]
        return side * region.height // shorter, side * region.width // shorter


def coarsest_scale(region: Region, shape: tuple[int, int]) -> int:
    """The smallest scale that leaves enough pixels of a region for a result of this shape; 8 means 1/8."""
    # One pixel more than the result has, since snapping to blocks may remove one.
    height, width = _PIXELS_LEFT * (shape[0] + 1), _PIXELS_LEFT * (shape[1] + 1)
    scale = 8
    while scale > 1 and (region.width < scale * width or region.height < scale * height):
        scale //= 2
    return scale


def cheapest_scale(scale: int, region: Region, photo: tuple[int, int], image: EncodedImage, area_ns: float) -> int:
    """`scale`, or 1 where decoding only the region is faster at full scale.

    Args:
        scale: the smallest that leaves enough pixels.
        region: what is decoded.
        photo: (width, height) of the picture.
        image: the file.
        area_ns: what resizing takes per pixel of the region, in nanoseconds.
    """
    if scale == 1 or image.restarts is not None or image.reads_all():
        return scale  # OpenCV decodes all of its input, and is faster at a smaller scale
    pixels = region.width * region.height
    whole = _NS_PER_BYTE * image.nbytes + _NS_PER_PIXEL[scale] * photo[0] * photo[1] + area_ns * pixels / scale**2
    part = _NS_PER_BYTE * image.nbytes * (region.top + region.height) / photo[1] + (_NS_PER_PIXEL[1] + area_ns) * pixels
    return scale if whole < part else 1


def check_out(out: np.ndarray[Any, Any] | None, shape: tuple[int, ...]) -> None:
    """Check that a result of this shape can be written to `out`.

    Raises:
        ValueError: it cannot.
    """
    if out is not None and (out.shape != (*shape, 3) or out.dtype != np.uint8):
        raise ValueError(f"out is {out.dtype} of shape {out.shape}; the crop gives uint8 of shape {(*shape, 3)}.")


def as_shape(size: Size) -> tuple[int, int]:
    """(height, width) of a `size` argument.

    Raises:
        ValueError: it is neither an int nor a pair of ints, or is below 1.
    """
    try:
        height, width = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"size {size!r}: expected an int or (height, width), in pixels, at least 1.")
    return height, width


def _centered(across: int, down: int, width: int, height: int) -> Region:
    return Region((width - across) // 2, (height - down) // 2, across, down)


def snapped(region: Region, scale: int, width: int, height: int) -> Region:
    """The region with each side moved to the nearest edge of a block of scale by scale pixels, or of the photo."""
    half = scale // 2
    left, top = (region.left + half) // scale * scale, (region.top + half) // scale * scale
    right = min(width, (region.left + region.width + half) // scale * scale)
    bottom = min(height, (region.top + region.height + half) // scale * scale)
    return Region(left, top, right - left, bottom - top)
