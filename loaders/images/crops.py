"""Which part of a photo is decoded, and at what size it comes out: `ImageFolder(…, crop=RandomResizedCrop(224))`."""

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
_PIXELS_LEFT = 1.25  # per pixel of the result, at a reduced scale
_INTERPOLATIONS = (
    cv2.INTER_NEAREST,
    cv2.INTER_LINEAR,
    cv2.INTER_CUBIC,
    cv2.INTER_AREA,
    cv2.INTER_LANCZOS4,
    cv2.INTER_LINEAR_EXACT,
    cv2.INTER_NEAREST_EXACT,
)
# What libjpeg-turbo takes, in nanoseconds, fitted to photos of 0.2 and 12 megapixels: to decode the Huffman codes, per
# byte of the file down to the region's last row; to make pixels, per pixel of the region, or at a reduced scale per
# full-scale pixel of the whole photo. INTER_AREA reads each pixel, the other interpolations a few for each they make.
# Only the ratios matter.
_NS_PER_BYTE = 10.0
_NS_PER_PIXEL = {1: 2.3, 2: 0.9, 4: 0.4, 8: 0.2}
_NS_OF_AREA_PER_PIXEL = 2.2


@dataclass(frozen=True)
class Crop(ABC):
    """A region of a photo, decoded and resized. A subclass says which region; objects are frozen and can be pickled.

    What lies outside of the region is not decoded where that can be avoided. A JPEG is decoded at 1/2, 1/4 or 1/8 of
    its scale where that leaves 1.25 pixels for each of the result in both directions, and is cheaper. Then the region's
    sides move to where reduced pixels end, by at most 0.4 pixels of the result (1.2 where EXIF turns a photo whose
    sides are no multiples of 8), and INTER_AREA averages means of blocks in place of all pixels: on average 1 to 3
    levels of 255 apart, 6 on the sharpest photos. Other interpolations alias less than at full scale.

    Args:
        interpolation: a constant of OpenCV. None takes `cv2.INTER_AREA`, which averages, unless the region is smaller
            than the result in either direction; then it takes `cv2.INTER_LINEAR`. That one throughout is faster, and
            aliases where it shrinks.
        exact: True decodes at full scale only: the pixels are those of decoding everything, cropping, then
            `cv2.resize`, bit for bit, whatever decodes. Otherwise they may depend on whether nvImageCodec is installed
            and on whether the file has restart markers, since these change what is cheaper.

    Attributes:
        is_random: whether two reads of one photo may give two regions.
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
        """Samples of a dataset for each of its files."""
        return 1

    @abstractmethod
    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> tuple[int, int, int, int]:
        """The part of an upright photo of width by height that is to be seen: (left, top, width, height), inside it.

        Args:
            width, height: of the photo, in pixels.
            rng: what to draw from; None stands for `sample_rng()`.
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
            out: where the result is written, uint8 of its shape; None makes a new array.
            index: the number of the sample, for the message of the error.
            backend: as in `read_image`.

        Returns:
            uint8 (H, W, 3) RGB, upright; `out` if it was given.

        Raises:
            DecodeError: the file is missing, damaged, or no image that OpenCV knows.
            ValueError: `out` has another shape or dtype.
        """
        with open_image(source, index, backend) as image:
            return self._read(image, out)

    def apply(
        self, picture: np.ndarray[Any, np.dtype[np.uint8]], out: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The region of a picture that is decoded already, resized.

        Args:
            picture: uint8 (H, W, 3), upright; it may be read-only, and is not changed.
            out: as in `read`.

        Returns:
            uint8 (H, W, 3); `out` if it was given.

        Raises:
            ValueError: `out` has another shape or dtype.
        """
        height, width = picture.shape[:2]
        region = Region(*self.region(width, height))
        if not region.is_inside(width, height):
            raise ValueError(f"the crop's {region} is not inside the picture of {width} x {height} pixels.")
        return self._resized(region.of(picture), self._shape_of(region), out)

    def _read(self, image: EncodedImage, out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if not image.is_jpeg:  # decoded whole
            return self.apply(image.picture(), out)
        width, height = image.size()
        region = Region(*self.region(width, height))
        if not region.is_inside(width, height):
            raise ValueError(f"the crop's {region} is not inside the picture of {width} x {height} pixels.")
        shape = self._shape_of(region)
        scale = 1 if self.exact else self._scale(region, shape, (width, height), image)
        if scale > 1:
            region = _snapped(region, scale, width, height)
        return self._resized(image.read("RGB", region, scale), shape, out)

    def _shape_of(self, region: Region) -> tuple[int, int]:
        """(height, width) of the result."""
        assert self.shape is not None
        height, width = self.shape
        return height, width

    def _scale(self, region: Region, shape: tuple[int, int], photo: tuple[int, int], image: EncodedImage) -> int:
        """The cheapest scale that leaves enough pixels; 8 stands for an eighth."""
        # One more than the result has, since snapping to blocks may take one away.
        height, width = _PIXELS_LEFT * (shape[0] + 1), _PIXELS_LEFT * (shape[1] + 1)
        scale = 8
        while scale > 1 and (region.width < scale * width or region.height < scale * height):
            scale //= 2
        if scale == 1 or image.restarts is not None or image.reads_all():
            return scale  # OpenCV decodes all that it is given, and the smaller the scale the sooner
        pixels = region.width * region.height
        area = _NS_OF_AREA_PER_PIXEL if self.interpolation in (None, cv2.INTER_AREA) else 0.0
        whole = _NS_PER_BYTE * image.nbytes + _NS_PER_PIXEL[scale] * photo[0] * photo[1] + area * pixels / scale**2
        part = (
            _NS_PER_BYTE * image.nbytes * (region.top + region.height) / photo[1] + (_NS_PER_PIXEL[1] + area) * pixels
        )
        return scale if whole < part else 1

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
    """A random part of the photo, resized to one size and maybe mirrored: how networks are trained on ImageNet.

    It is a decoding step, given as `crop=`, and not albumentations' transform of this name: only that part is decoded.

    The area is a uniformly drawn share of the photo's, the ratio of width to height is drawn so that its logarithm is
    uniform, and then the place uniformly among those where the region lies inside. Of up to ten such draws the first
    that fits is taken. If none does it is the largest central part of a ratio within `ratio`. This is the distribution
    of torchvision's `RandomResizedCrop`, whose numbers are drawn from `sample_rng()` here.

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
        """A random part of a photo of width by height."""
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
    """The middle of the photo, the same each time: how networks are evaluated on ImageNet.

    As if the photo's shorter side were resized to `resize` pixels and the middle of that were cut to `size`, but done
    as one region and one resize. The region's sides are `size / resize` of the photo's shorter side, rounded to whole
    pixels, and it lies in the middle, rounded towards the upper left corner.

    Args:
        size: of the result in pixels: an int for a square, or (height, width); not more than `resize`.
        resize: what the photo's shorter side becomes, in pixels.
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
                f"size {self.size!r} is more than resize={self.resize!r}: the photo's shorter side may not hold it.\n"
                f"  Pass a larger resize=, such as {math.ceil(max(as_shape(self.size)) * 8 / 7)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result."""
        return as_shape(self.size)

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> Region:
        """The middle of a photo of width by height."""
        per_pixel = min(width, height) / self.resize
        down, across = (max(1, round(side * per_pixel)) for side in self.shape)
        return _centered(across, down, width, height)


@dataclass(frozen=True)
class Resize(Crop):
    """The whole photo, resized.

    Args:
        size: an int is what the shorter side becomes, in pixels; the longer one keeps the proportion, rounded down, so
            photos of different proportions do not stack into a batch: declare `Field(ragged=True)` for them.
            (height, width) is the size of every result, whatever becomes of the proportions.
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
        """All of a photo of width by height."""
        return Region(0, 0, width, height)

    def _shape_of(self, region: Region) -> tuple[int, int]:
        if self.shape is not None:
            return self.shape
        side, shorter = operator.index(self.size), min(region.width, region.height)  # type: ignore[arg-type]
        return side * region.height // shorter, side * region.width // shorter


def check_out(out: np.ndarray[Any, Any] | None, shape: tuple[int, ...]) -> None:
    """Nothing, if a result of this shape can be written there.

    Raises:
        ValueError: it cannot.
    """
    if out is not None and (out.shape != (*shape, 3) or out.dtype != np.uint8):
        raise ValueError(f"out is {out.dtype} of shape {out.shape}; the crop gives uint8 of shape {(*shape, 3)}.")


def as_shape(size: Size) -> tuple[int, int]:
    """(height, width) of a size as it is given.

    Raises:
        ValueError: it is neither an int nor two, or below 1.
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


def _snapped(region: Region, scale: int, width: int, height: int) -> Region:
    """The region with each side at the nearest edge of a block of scale by scale pixels, or of the photo."""
    half = scale // 2
    left, top = (region.left + half) // scale * scale, (region.top + half) // scale * scale
    right = min(width, (region.left + region.width + half) // scale * scale)
    bottom = min(height, (region.top + region.height + half) // scale * scale)
    return Region(left, top, right - left, bottom - top)
