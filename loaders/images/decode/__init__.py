"""From the bytes of an image file to an ndarray: the whole picture or a region of it, at full or reduced scale.

| module | what |
| --- | --- |
| `files` | bytes at hand, of this machine's files and of remote ones |
| `header`, `jpeg`, `png`, `tiff`, `boxes`, `netpbm`, `gif` | what a file says before it is decoded, by its format |
| `region` | rectangles: upright, as stored, reduced |
| `image` | an open file: its size, and parts of it by what decodes them best |
| `whole` | the whole picture, where OpenCV alone would make another of the file |
| `opencv` | decodes everything but Netpbm |
| `nvimagecodec` | decodes regions of common JPEGs faster, where it is installed |
| `restart`, `restart_index` | windows of JPEGs with restart markers at the cost of the window |
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from loaders.images.decode.files import Source as Source
from loaders.images.decode.image import Backend as Backend
from loaders.images.decode.image import open_image
from loaders.images.decode.image import printable as printable

# What every OpenCV wheel since 4.9 decodes; later ones also know GIF and AVIF.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm")

_MODES = ("RGB", "GRAY")
_SCALES = (1, 2, 4, 8)
_BACKENDS = (None, "opencv", "nvimagecodec", "restarts")


def read_image(
    source: Source,
    mode: Literal["RGB", "GRAY"] = "RGB",
    *,
    region: tuple[int, int, int, int] | None = None,
    scale: Literal[1, 2, 4, 8] = 1,
    index: int | None = None,
    backend: Backend | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an image file, or a region of it, given by its path or as the bytes it holds.

    The picture is upright: the orientation of EXIF is applied, of AVIF that of its own properties. Grey and palette
    images become RGB, CMYK is converted. Alpha is dropped, not blended: the colours are those that the file stores
    below it. Of an animation comes the picture that the file itself is (of PNG the default image), else the first
    frame.

    Of samples with more than 8 bits the 8 highest are kept, `value >> 8` of 16 bits; AVIF alone is rounded, by its
    decoder. Netpbm samples are scaled by the largest that the header allows: to 255, or above 255 to 65535. What has
    no 8-bit picture is refused: floating-point, signed and 32-bit samples of TIFF, and bands that are neither grey nor
    colours.

    A file is refused, too, if it promises more than 2**26 pixels (2**24 if it is JPEG 2000) and more than 2**14 for
    each of its bytes, or if it is a JPEG with more than 512 for each. OpenCV would make room for all of them.

    OpenCV's messages on stderr are off while it decodes (in the whole process: it has one level for all threads),
    unless that level is above warnings. libjpeg, inside OpenCV, still writes a line for some damaged JPEGs, such as
    `Corrupt JPEG data: …`, whether they can be decoded or not; so does libpng where the compressed bytes are damaged
    and the checksums are right.

    At scale 1 a region has the pixels of the whole picture, bit for bit, on every backend. At a larger scale the
    picture is divided into blocks of scale by scale pixels, and what comes is one pixel for each block that touches the
    region: `ceil((left + width) / scale) - left // scale` columns, and rows in the same way. The blocks are counted
    from the corner that comes first in the file, which EXIF may turn. JPEGs are decoded at that scale, with OpenCV's
    pixels of `IMREAD_REDUCED_COLOR_…`; of other files, and of JPEGs whose header is damaged, the pixel is the mean of
    the block.

    Args:
        source: a path (a str may hold undecodable bytes as surrogates), a URL for fsspec such as `s3://bucket/1.jpg`,
            or encoded bytes.
        mode: "RGB", or "GRAY" for one channel.
        region: (left, top, width, height) in pixels of the upright picture at full scale, all of it inside
            `image_size(source)`; None for the whole picture.
        scale: 1, or 2, 4, 8 for a half, a quarter, an eighth of the pixels in each direction.
        index: the number of the sample, for the message of the error.
        backend: what decodes regions of JPEGs. None decodes only the segments around the region where the file has
            restart markers that allow it (`loaders prepare` writes them), and reads only those where an index beside
            the files knows them; else it takes nvImageCodec where that is installed and agrees with OpenCV. "restarts"
            and "nvimagecodec" are the first and the second of these alone, the latter with an error where it is not
            installed. Everything else is OpenCV's.

    Returns:
        uint8 (H, W, 3), or (H, W) in mode "GRAY"; C-contiguous, writable, yours.

    Raises:
        DecodeError: the file is missing, unreadable, empty, cut short, refused as above, or no image that OpenCV knows;
            also a TypeError if the source is of none of these types.
        ValueError: the region is not inside the picture.
        MissingExtraError: nvImageCodec was asked for and is not installed.
    """
    for name, value, known in (("mode", mode, _MODES), ("scale", scale, _SCALES), ("backend", backend, _BACKENDS)):
        if value not in known:
            *others, last = (f'"{each}"' if isinstance(each, str) else str(each) for each in known)
            raise ValueError(f"{name} {value!r} is unknown; use {', '.join(others)} or {last}.")
    with open_image(source, index, backend) as image:
        return image.read(mode, region, scale)


def image_size(source: Source, *, index: int | None = None) -> tuple[int, int]:
    """The size of the picture that `read_image` gives, from the header of the file: a few microseconds.

    Files whose header does not settle it are decoded to find out: damaged or unusual ones. What `read_image` refuses
    for its header is refused here. That a size comes does not mean that the rest of the file is sound.

    Args:
        source: a path, of which only the beginning is read where that suffices, or encoded bytes.
        index: the number of the sample, for the message of the error.

    Returns:
        (width, height) in pixels, upright.

    Raises:
        DecodeError: the file is missing, unreadable, empty, refused, or no image that OpenCV knows; also a TypeError if
            the source is of none of these types.
    """
    with open_image(source, index) as image:
        return image.size()
