"""From the bytes of an image file to an ndarray: the whole picture or a region of it, at full or reduced scale.

| module | what |
| --- | --- |
| `header`, `jpeg`, `tiff` | what the first bytes of a file say |
| `region` | rectangles: upright, as stored, reduced |
| `opencv` | decodes everything |
| `nvimagecodec` | decodes regions of common JPEGs faster, where it is installed |
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np

from loaders.decode import nvimagecodec, opencv
from loaders.decode.header import PNG_SIGNATURE, Header, png_has_end, read_header
from loaders.decode.jpeg import SIGNATURE, jpeg_has_end
from loaders.decode.opencv import UndecodableError
from loaders.decode.region import Region, shrink, turn_upright
from loaders.errors import DecodeError, describe_sample
from loaders.opencv import quiet_opencv
from loaders.stages import DECODE, READ, count_read, is_looked_at

# What every OpenCV wheel since 4.9 decodes; later ones also know GIF and AVIF.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm")

Source = str | os.PathLike[str] | bytes | bytearray | memoryview
Backend = Literal["opencv", "nvimagecodec"]

_MODES = ("RGB", "GRAY")
_SCALES = (1, 2, 4, 8)
_BACKENDS = (None, "opencv", "nvimagecodec")
_HEAD_NBYTES = 16 * 1024  # of a file, to look for its size in; most have it far earlier


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

    The picture is upright: the EXIF orientation is applied, as OpenCV does it. Grey and palette images become RGB, CMYK
    is converted. Of 16-bit samples the high byte is kept (`value >> 8`), which is OpenCV's rule for `IMREAD_COLOR`.
    Alpha is dropped, not blended: the colours are those that the file stores below it.

    At scale 1 a region has the pixels of the whole picture, bit for bit, on either backend. At a larger scale the
    picture is divided into blocks of scale by scale pixels, and what comes is one pixel for each block that touches the
    region: `ceil((left + width) / scale) - left // scale` columns, and rows in the same way. The blocks are counted
    from the corner that comes first in the file, which EXIF may turn. JPEGs are decoded at that scale, with OpenCV's
    pixels of `IMREAD_REDUCED_COLOR_…`; of other files, and of JPEGs whose header is damaged, the pixel is the mean of
    the block.

    Args:
        source: a path (a str may hold undecodable bytes as surrogates), or encoded bytes.
        mode: "RGB", or "GRAY" for one channel.
        region: (left, top, width, height) in pixels of the upright picture at full scale, all of it inside
            `image_size(source)`; None for the whole picture.
        scale: 1, or 2, 4, 8 for a half, a quarter, an eighth of the pixels in each direction.
        index: the number of the sample, for the message of the error.
        backend: what decodes regions of JPEGs. None takes nvImageCodec where it is installed and agrees with OpenCV.
            "nvimagecodec" is the same but for the error where it is not installed. Everything else is OpenCV's.

    Returns:
        uint8 (H, W, 3), or (H, W) in mode "GRAY"; C-contiguous, writable, yours.

    Raises:
        DecodeError: the file is missing, unreadable, empty, cut short, or no image that OpenCV knows.
        ValueError: the region is not inside the picture.
        MissingExtraError: nvImageCodec was asked for and is not installed.
    """
    for name, value, known in (("mode", mode, _MODES), ("scale", scale, _SCALES), ("backend", backend, _BACKENDS)):
        if value not in known:
            *others, last = (f'"{each}"' if isinstance(each, str) else str(each) for each in known)
            raise ValueError(f"{name} {value!r} is unknown; use {', '.join(others)} or {last}.")
    if backend == "nvimagecodec":
        nvimagecodec.require()
    quiet_opencv()
    with _naming(source, index):
        if not is_looked_at():  # the usual case: of the smallest pictures even marks would take a hundredth
            return _decoded(_read(source), mode, region, scale, backend)
        with READ:
            data = _read(source)
        if isinstance(source, (str, os.PathLike)):
            count_read(len(data))
        with DECODE:
            return _decoded(data, mode, region, scale, backend)


def _decoded(
    data: bytes, mode: str, region: tuple[int, int, int, int] | None, scale: int, backend: Backend | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    header = _checked_header(data)
    if region is None and scale == 1:
        return opencv.decode_picture(data, mode)
    if header is None or header.jpeg is None:
        return _cut(opencv.decode_picture(data, mode), header, region, scale)
    wanted = _inside(region, header.width, header.height)
    stored = wanted.stored(header.width, header.height, header.jpeg.orientation)
    part = None
    if scale == 1 and header.jpeg.is_usual and backend != "opencv" and nvimagecodec.agrees_with_opencv():
        part = nvimagecodec.decode_jpeg_region(data, stored, mode)
    if part is None:
        part = opencv.decode_jpeg_region(data, stored, mode, scale)
    return turn_upright(part, header.jpeg.orientation)


def image_size(source: Source, *, index: int | None = None) -> tuple[int, int]:
    """The size of the picture that `read_image` gives, from the header of the file: a few microseconds.

    Files whose header does not settle it are decoded to find out: damaged or unusual ones, and rare formats. That a
    size comes does not mean that the rest of the file is sound.

    Args:
        source: a path, of which only the beginning is read where that suffices, or encoded bytes.
        index: the number of the sample, for the message of the error.

    Returns:
        (width, height) in pixels, upright.

    Raises:
        DecodeError: the file is missing, unreadable, empty, or no image that OpenCV knows.
    """
    with _naming(source, index):
        if isinstance(source, (str, os.PathLike)):
            with _open(source) as file:
                data = file.read(_HEAD_NBYTES)
                header = read_header(data, is_whole=len(data) < _HEAD_NBYTES)
                if header is None:
                    data += file.read()
        else:
            data, header = bytes(source), None
        header = header or _checked_header(data)
        if header is not None:
            return header.width, header.height
        quiet_opencv()
        height, width = opencv.decode_picture(data, "GRAY").shape
        return width, height


def printable(path: str) -> str:
    r"""The path as messages show it: bytes that are no text appear as \xNN, so that printing never fails."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def _naming(source: Source, index: int | None) -> Iterator[None]:
    """Turn what goes wrong inside into a DecodeError that names the sample."""
    try:
        yield
    except (OSError, UndecodableError, cv2.error) as error:
        name = printable(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
        if index is not None:
            subject = describe_sample(index, name)
        elif name is not None:
            subject = f'image "{name}"'
        else:
            subject = f"image of {memoryview(source).nbytes:,} bytes"  # type: ignore[arg-type]  # paths have a name
        why = getattr(error, "strerror", None) or str(error).strip()
        raise DecodeError(
            f"{subject}: {why}.\n  Replace the file, or leave it out of the dataset.", index=index, source=name
        ) from error


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except ValueError as error:  # a NUL in the name
        raise UndecodableError(str(error)) from error


def _read(source: Source) -> bytes:
    if isinstance(source, (str, os.PathLike)):
        with _open(source) as file:
            return file.read()
    return bytes(source)


def _checked_header(data: bytes) -> Header | None:
    """The header, if it settles anything.

    Raises:
        UndecodableError: there is nothing to decode, or a JPEG that is not all there.
    """
    if not data:
        raise UndecodableError("the file is empty")
    header = read_header(data)
    if data.startswith(SIGNATURE) and not jpeg_has_end(data):
        raise UndecodableError(f"the JPEG is cut short: its {len(data):,} bytes end before the picture does")
    if data.startswith(PNG_SIGNATURE) and not png_has_end(data):
        raise UndecodableError(f"OpenCV cannot decode its {len(data):,} bytes: the PNG has no end, or a damaged chunk")
    # OpenCV would make room for all of them, and fill most with grey.
    if header is not None and header.jpeg is not None and header.jpeg.least_nbytes > len(data):
        raise UndecodableError(
            f"the JPEG is damaged: its {len(data):,} bytes cannot hold the {header.width} x {header.height} pixels "
            "that its header promises"
        )
    return header


def _inside(region: tuple[int, int, int, int] | None, width: int, height: int) -> Region:
    wanted = Region(0, 0, width, height) if region is None else Region(*map(operator.index, region))
    if not wanted.is_inside(width, height):
        raise ValueError(
            f"region {tuple(wanted)} (left, top, width, height) is not inside the picture of {width} x {height} pixels."
        )
    return wanted


def _cut(
    picture: np.ndarray[Any, Any], header: Header | None, region: tuple[int, int, int, int] | None, scale: int
) -> np.ndarray[Any, Any]:
    height, width = picture.shape[:2]
    if header is not None and (header.width, header.height) != (width, height):
        raise UndecodableError(
            f"the file is damaged: its header promises {header.width} x {header.height} pixels, "
            f"and it has {width} x {height}"
        )
    wanted = _inside(region, width, height)
    return wanted.of(picture).copy() if scale == 1 else shrink(picture, wanted, scale)
