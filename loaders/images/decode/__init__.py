"""Decodes image files to ndarrays: the whole picture or a region of it, at full or reduced scale.

| module | what |
| --- | --- |
| `files` | encoded bytes, from memory, local files or remote ones |
| `header`, `jpeg`, `png`, `tiff`, `boxes`, `netpbm`, `gif` | the headers of files, by format |
| `region` | rectangles: upright, as stored, reduced |
| `image` | an open file: its size, and regions of it by the decoder that suits best |
| `whole` | the whole picture, also where OpenCV alone would decode another one |
| `indices` | masks: what a PNG stores for each pixel |
| `opencv` | decodes everything but Netpbm |
| `nvimagecodec` | decodes regions of common JPEGs faster, where it is installed |
| `restart`, `restart_index`, `restart_table` | windows of JPEGs with restart markers at the cost of the window |
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from loaders.images.decode.files import Source as Source
from loaders.images.decode.image import Backend as Backend
from loaders.images.decode.image import open_image
from loaders.images.decode.image import printable as printable

# What every OpenCV wheel since 4.9 decodes; later ones also decode GIF and AVIF.
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
    """Decode an image file, or a region of it, given as a path, a URL or encoded bytes.

    The picture is upright: the EXIF orientation is applied, or AVIF's own properties. Grey and palette images become
    RGB, and CMYK is converted. Alpha is dropped, not blended: the colours are those stored in the file. Of an
    animation, the file's primary picture is decoded (of PNG the default image), else the first frame.

    Of samples with more than 8 bits the highest 8 are kept, `value >> 8` of 16 bits; only AVIF is rounded, by its
    decoder. Netpbm samples are scaled by the header's maximum: to 255, or to 65535 if it is above 255. Files without an
    8-bit picture are refused: TIFF with floating-point, signed or 32-bit samples, or with bands that are neither grey
    nor colours.

    A file is also refused if its header declares more than 2**26 pixels (2**24 for JPEG 2000) and more than 2**14 per
    byte of the file, or, for a JPEG, more than 512 per byte. OpenCV would allocate memory for all of them.

    OpenCV's messages on stderr are off while it decodes (in the whole process: all threads share one log level), unless
    the level is more verbose than warnings. libjpeg, inside OpenCV, still prints a line for some damaged JPEGs, such as
    `Corrupt JPEG data: …`, whether or not they can be decoded; so does libpng if compressed bytes are damaged but the
    checksums are correct.

    At scale 1 a region has the pixels of the whole picture, bit for bit, on every backend. At a larger scale the
    picture is divided into blocks of `scale` by `scale` pixels, and the result has one pixel for each block that
    touches the region: `ceil((left + width) / scale) - left // scale` columns, and likewise rows. Blocks are counted
    from the corner that comes first in the file, which EXIF may turn. JPEGs are decoded at that scale, to the pixels of
    OpenCV's `IMREAD_REDUCED_COLOR_…`; in other files, and in JPEGs whose header is damaged, each pixel is the mean of
    its block.

    Args:
        source: a path (a str may hold undecodable bytes as surrogates), a URL for fsspec such as `s3://bucket/1.jpg`,
            or encoded bytes.
        mode: "RGB", or "GRAY" for one channel.
        region: (left, top, width, height) in pixels of the upright picture at full scale, all within
            `image_size(source)`; None for the whole picture.
        scale: 1, or 2, 4, 8 for 1/2, 1/4, 1/8 of the pixels in each direction.
        index: the number of the sample, for error messages.
        backend: the decoder for regions of JPEGs. None decodes only the segments around the region if the file has
            suitable restart markers (`loaders prepare` writes them), and reads only those if an index lists the file;
            else it uses nvImageCodec if that is installed and agrees with OpenCV. "restarts" uses only the first of
            these, "nvimagecodec" only the second, with an error if it is not installed. OpenCV decodes all else.

    Returns:
        uint8 (H, W, 3), or (H, W) in mode "GRAY"; C-contiguous, writable, not shared.

    Raises:
        DecodeError: the file is missing, unreadable, empty, cut short, refused as above, or not an image that OpenCV
            can decode; also a TypeError if the source has none of these types.
        ValueError: the region is not inside the picture.
        MissingExtraError: nvImageCodec was requested, or the source is a URL, and the package for it is not installed.
    """
    for name, value, known in (("mode", mode, _MODES), ("scale", scale, _SCALES), ("backend", backend, _BACKENDS)):
        if value not in known:
            *others, last = (f'"{each}"' if isinstance(each, str) else str(each) for each in known)
            raise ValueError(f"{name} {value!r} is unknown; use {', '.join(others)} or {last}.")
    with open_image(source, index, backend) as image:
        return image.read(mode, region, scale)


def image_size(source: Source, *, index: int | None = None) -> tuple[int, int]:
    """The size of the picture that `read_image` returns, read from the file's header in a few microseconds.

    Damaged or unusual files, whose header does not determine it, are decoded to find out. Files that `read_image`
    refuses because of their header are refused here, too. The rest of the file may still be damaged.

    Args:
        source: a path, of which only the beginning is read if that suffices, a URL, or encoded bytes.
        index: the number of the sample, for error messages.

    Returns:
        (width, height) in pixels, upright.

    Raises:
        DecodeError: the file is missing, unreadable, empty, refused, or not an image that OpenCV can decode; also a
            TypeError if the source has none of these types.
    """
    with open_image(source, index) as image:
        return image.size()
