"""Adds restart markers to one JPEG: losslessly with `jpegtran`, or by re-encoding with OpenCV."""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from loaders.errors import DecodeError
from loaders.images.decode import read_image
from loaders.images.decode.header import read_header
from loaders.images.decode.jpeg import SIGNATURE, JpegHeader, metadata
from loaders.images.decode.restart import find_restarts

DEFAULT_QUALITY = 90

# MCUs between markers. With 4 a file grows by 2 to 3 %, with 1 by 7 to 13 % (qualities 92 and 75); with more than 8,
# too much is decoded around a window.
_INTERVAL = 4
_LONGEST_INTERVAL = 8
_PICTURE_INDEX = b"MPF\0"  # offsets of further pictures in the file, which are not copied
_SAMPLINGS = {
    (1, 1): cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    (2, 1): cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    (2, 2): cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    (1, 2): cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    (4, 1): cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}


class UnpreparedError(Exception):
    """A JPEG is left unchanged; the text is the reason in the summary."""


@dataclass(frozen=True)
class Method:
    """How JPEGs get their markers.

    Attributes:
        jpegtran: path of the program; None to re-encode.
        quality: of re-encoded JPEGs, 1 to 100.
        max_side: limit of both sides of re-encoded JPEGs, in pixels; None for no limit.
    """

    jpegtran: str | None
    quality: int = DEFAULT_QUALITY
    max_side: int | None = None


def with_markers(data: bytes, method: Method) -> bytes:
    """A JPEG with restart markers, and with the metadata of `data`.

    Raises:
        UnpreparedError: it is damaged, or of a kind whose windows cannot be decoded separately.
    """
    header = read_header(data)
    if header is None or header.jpeg is None:
        raise UnpreparedError("its header is damaged or unusual")
    if header.jpeg.components not in (1, 3):
        raise UnpreparedError(f"it has {header.jpeg.components} colour components, like CMYK")
    try:
        if method.jpegtran is None:
            found = _encoded(data, header.jpeg, method)
        else:
            found = _transformed(data, header.jpeg, method.jpegtran)
    except (DecodeError, cv2.error) as error:
        raise UnpreparedError(str(error.__cause__ or error).strip()) from error
    made = read_header(found)
    if made is None or made.jpeg is None or find_restarts(found, made.jpeg) is None:
        raise UnpreparedError("restart markers could not be added")
    if made.jpeg.orientation != header.jpeg.orientation:
        raise UnpreparedError("EXIF after its first scan would turn it")
    return found


def interval(width: int, sampling: tuple[int, int]) -> int:
    """MCUs between two markers: near 4, and a divisor of the MCUs in a row, so that segments form a grid."""
    per_row = -(-width // (8 * sampling[0]))
    divisors = [number for number in range(1, _LONGEST_INTERVAL + 1) if per_row % number == 0]
    return min(divisors, key=lambda number: (abs(math.log2(number / _INTERVAL)), -number))


def _transformed(data: bytes, header: JpegHeader, jpegtran: str) -> bytes:
    if header.sampling is None:
        raise UnpreparedError("its chroma sampling is unusual")
    pixels = read_image(data)
    if find_restarts(data, header) is not None:
        return data
    markers = f"{interval(header.width, header.sampling)}B"  # B: in MCUs, not in rows of them
    command = [jpegtran, "-copy", "all", "-optimize", "-restart", markers]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout.startswith(SIGNATURE):
        said = done.stderr.decode("utf-8", "replace").strip()
        raise UnpreparedError(f"jpegtran exited with status {done.returncode}: {said}")
    made = read_header(done.stdout)
    if made is None or made.jpeg is None or metadata(done.stdout, made.jpeg) != metadata(data, header):
        raise UnpreparedError("jpegtran did not keep its metadata")
    if not np.array_equal(read_image(done.stdout), pixels):
        raise UnpreparedError("jpegtran changed its pixels")
    return done.stdout


def _encoded(data: bytes, header: JpegHeader, method: Method) -> bytes:
    read_image(data)  # raises if it is damaged
    # As stored: EXIF, which is kept, still has the orientation.
    picture: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    height, width = picture.shape[:2]
    if method.max_side is not None and max(height, width) > method.max_side:
        share = method.max_side / max(height, width)
        height, width = (max(1, round(side * share)) for side in (height, width))
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    sampling = header.sampling or (2, 2)
    flags = [cv2.IMWRITE_JPEG_QUALITY, method.quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval(width, sampling)]
    if picture.ndim == 3:
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SAMPLINGS[sampling]]
    done, encoded = cv2.imencode(".jpg", picture, flags)
    if not done:
        raise UnpreparedError("OpenCV could not encode it")
    plain = encoded.tobytes()
    kept = [segment for segment in metadata(data, header) if segment[4:8] != _PICTURE_INDEX]
    # After JFIF's own segment, which is the first.
    at = 4 + int.from_bytes(plain[4:6], "big") if plain[2:4] == b"\xff\xe0" else 2
    return b"".join((plain[:at], *kept, plain[at:]))
