"""Decodes with OpenCV: whole files of any format, JPEGs also at a reduced scale."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from loaders.images.decode.region import Region
from loaders.system.opencv_messages import no_messages

# Any file may declare this many pixels, which take 256 MiB while they are decoded …
_FEW = 1 << 26
# … and more only with at most this many per byte: twice what deflate can reach (1032 bytes of eight pixels each).
_MOST_PER_BYTE = 1 << 14
_BAND_NBYTES = 512 * 1024
_GREY_WEIGHTS = np.array([4899, 9617, 1868], np.int32)  # of BT.601, in 1/16384
_FLAGS = {
    ("RGB", 1): cv2.IMREAD_COLOR,
    ("RGB", 2): cv2.IMREAD_REDUCED_COLOR_2,
    ("RGB", 4): cv2.IMREAD_REDUCED_COLOR_4,
    ("RGB", 8): cv2.IMREAD_REDUCED_COLOR_8,
    ("GRAY", 1): cv2.IMREAD_GRAYSCALE,
    ("GRAY", 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
    ("GRAY", 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    ("GRAY", 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class UndecodableError(Exception):
    """A file cannot be decoded; the text becomes part of the DecodeError."""


def least_nbytes(width: int, height: int, *, weight: int = 1) -> int:
    """The smallest file that may have so many pixels, in bytes; each takes `weight` times the usual memory."""
    pixels = width * height
    return pixels // _MOST_PER_BYTE if pixels * weight > _FEW else 0


def decode_picture(data: bytes | bytearray, mode: str, *, as_stored: bool = False) -> np.ndarray[Any, Any]:
    """The whole picture, upright, or `as_stored` in the file.

    Raises:
        UndecodableError, cv2.error: it is damaged, or not in a format that OpenCV can decode.
    """
    picture: np.ndarray[Any, Any] = _decode(data, _FLAGS[mode, 1] | (cv2.IMREAD_IGNORE_ORIENTATION if as_stored else 0))
    if mode == "RGB":
        # In place, OpenCV works on a copy; bands that stay in the cache take a fifth of the time for a large photo.
        rows_at_once = max(1, _BAND_NBYTES // picture[0].nbytes)
        for top in range(0, len(picture), rows_at_once):
            band = picture[top : top + rows_at_once]
            cv2.cvtColor(band, cv2.COLOR_BGR2RGB, dst=band)
    return picture


def decode_unchanged(data: bytes | bytearray) -> np.ndarray[Any, Any]:
    """The whole picture with the samples, channels and orientation that OpenCV finds in the file; colours are BGR.

    Raises:
        UndecodableError, cv2.error: it is damaged, or not in a format that OpenCV can decode.
    """
    picture: np.ndarray[Any, Any] = _decode(data, cv2.IMREAD_UNCHANGED)
    return picture


def grey_of(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB as grey, as OpenCV's decoders convert it: in some pixels it differs by 1 from `cv2.cvtColor`."""
    weighed = rgb.astype(np.int32) @ _GREY_WEIGHTS
    return ((weighed + (1 << 13)) >> 14).astype(np.uint8)


def decode_jpeg_region(data: bytes, region: Region, mode: str, scale: int) -> np.ndarray[Any, Any]:
    """A region of a JPEG, both in the file's orientation; at 1/scale, the reduced pixels that touch it.

    Raises:
        UndecodableError, cv2.error: it is damaged.
    """
    picture = _decode(data, _FLAGS[mode, scale] | cv2.IMREAD_IGNORE_ORIENTATION)
    reduced = region.reduced(scale)
    if not reduced.is_inside(picture.shape[1], picture.shape[0]):
        raise UndecodableError("the JPEG is damaged: its picture is smaller than its header says")
    # Both make a copy, so that the rest of the picture is freed.
    part = reduced.of(picture)
    return cv2.cvtColor(part, cv2.COLOR_BGR2RGB) if mode == "RGB" else part.copy()


def _decode(data: bytes | bytearray, flags: int) -> Any:
    with no_messages:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if picture is None:
        raise UndecodableError(
            f"OpenCV cannot decode its {len(data):,} bytes, which begin with {bytes(data[:8])!r}; "
            "cut short or not an image"
        )
    return picture
