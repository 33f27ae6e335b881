"""The whole picture of any image file, upright, corrected where OpenCV differs from what `read_image` documents."""

from __future__ import annotations

from typing import Any

import numpy as np

from loaders.images.decode import gif, opencv, png
from loaders.images.decode.header import Header
from loaders.images.decode.netpbm import SIGNATURES, decode_netpbm
from loaders.images.decode.opencv import UndecodableError
from loaders.images.decode.region import turn_upright
from loaders.images.decode.tiff import decode_tiff


def decode_whole(data: bytes, header: Header | None, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture; `header` is what `read_header` returned for the file, without a `problem`.

    Raises:
        UndecodableError, cv2.error: it is damaged, or not in a format that OpenCV can decode.
    """
    if data.startswith(png.SIGNATURE):
        data = png.picture_alone(data)
    elif data.startswith(gif.SIGNATURES):
        data = gif.opaque(data)
    elif header is None and data.startswith(SIGNATURES):
        raise UndecodableError("the Netpbm header is damaged: a number is missing, or out of range")
    if header is None:
        return opencv.decode_picture(data, mode)
    if header.netpbm is not None:
        return decode_netpbm(data, header.netpbm, mode)
    if header.tiff is not None:
        picture = decode_tiff(data, header.tiff, mode)
    else:
        picture = opencv.decode_picture(data, mode, as_stored=header.orientation is not None)
    return turn_upright(picture, header.orientation or 1)


def decode_indices(data: bytes) -> np.ndarray[Any, Any]:
    """What a PNG stores for each pixel: grey values, or indices of its palette; as stored, not turned.

    Returns:
        uint8 (H, W), or uint16 if there are 16 bits.

    Raises:
        UndecodableError, cv2.error: it is damaged, no PNG, or has several numbers per pixel.
    """
    if not data.startswith(png.SIGNATURE):
        raise UndecodableError("a mask must be a PNG file")
    data, bits = png.indices_alone(data)
    stored = opencv.decode_unchanged(data)
    if stored.ndim != 2 or stored.dtype != (np.uint16 if bits > 8 else np.uint8):
        raise UndecodableError(f"OpenCV decodes it as {stored.dtype} of shape {stored.shape}")
    return stored if bits >= 8 else stored // (255 // ((1 << bits) - 1))  # OpenCV stretches fewer bits to 0 … 255
