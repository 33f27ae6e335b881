"""From the bytes of an image file to an ndarray: one function, behind which the way of decoding may change."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

import cv2
import numpy as np

from loaders.errors import DecodeError, describe_sample
from loaders.opencv import quiet_opencv

# What every OpenCV wheel since 4.9 decodes; later ones also know GIF and AVIF.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm")

_FLAGS = {"RGB": cv2.IMREAD_COLOR, "GRAY": cv2.IMREAD_GRAYSCALE}
# Inside a scan FF is data when 00 follows, a restart when D0 to D7 does, padding when FF does (ITU-T T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def read_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    mode: Literal["RGB", "GRAY"] = "RGB",
    *,
    index: int | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an image file, given by its path or as the bytes it holds.

    The picture is upright: the EXIF orientation is applied, as OpenCV does it. Grey and palette images become RGB, CMYK
    is converted. Of 16-bit samples the high byte is kept (`value >> 8`), which is OpenCV's rule for `IMREAD_COLOR`.
    Alpha is dropped, not blended: the colours are those that the file stores below it.

    Args:
        source: a path (a str may hold undecodable bytes as surrogates), or encoded bytes.
        mode: "RGB", or "GRAY" for one channel.
        index: the number of the sample, for the message of the error.

    Returns:
        uint8 (H, W, 3), or (H, W) in mode "GRAY"; C-contiguous, writable, yours.

    Raises:
        DecodeError: the file is missing, unreadable, empty, cut short, or no image that OpenCV knows.
    """
    if mode not in _FLAGS:
        raise ValueError(f'mode {mode!r} is unknown; use "RGB" or "GRAY".')
    quiet_opencv()
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    try:
        data = _read(path) if path is not None else bytes(source)  # type: ignore[arg-type]  # a path went the other way
        image: np.ndarray[Any, Any] = _decode(data, _FLAGS[mode])
    except (OSError, ValueError, cv2.error) as error:
        name = printable(path) if path is not None else None
        if index is not None:
            subject = describe_sample(index, name)
        else:
            subject = f'image "{name}"' if name else f"image of {len(data):,} bytes"
        why = getattr(error, "strerror", None) or str(error).strip()
        raise DecodeError(
            f"{subject}: {why}.\n  Replace the file, or leave it out of the dataset.", index=index, source=name
        ) from error
    if mode == "RGB":
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return image


def printable(path: str) -> str:
    r"""The path as messages show it: bytes that are no text appear as \xNN, so that printing never fails."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _decode(data: bytes, flag: int) -> Any:
    if not data:
        raise ValueError("the file is empty")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if is_jpeg and not _jpeg_is_whole(data):
        raise ValueError(f"the JPEG is cut short: its {len(data):,} bytes end before the picture does")
    if image is None:
        raise ValueError(
            f"OpenCV cannot decode its {len(data):,} bytes, which begin with {data[:8]!r}; cut short or no image"
        )
    return image


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the end-of-image marker is there. Before 4.11 OpenCV fills what is missing with grey and says nothing."""
    if data.endswith(b"\xff\xd9"):
        return True
    # Something may follow the picture, so walk: segments are skipped whole (a thumbnail in one has an end of its own).
    at = 2
    while marker := _JPEG_MARKER.search(data, at):
        if data[marker.end() - 1] == 0xD9:
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False
