"""The size of a picture from the first bytes of its file; nothing is decoded.

It errs on the safe side: of what is damaged, unusual or unknown it says nothing, and OpenCV is asked instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct, error
from typing import NamedTuple

from loaders.images.decode import jpeg
from loaders.images.decode.tiff import ORIENTATION, first_directory

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG = Struct(">II")
_PNG_CHUNK = Struct(">I4s")
_BMP = Struct("<Iii")
_WEBP_LOSSY = Struct("<HH")
_WEBP_LOSSLESS = Struct("<I")


class Header(NamedTuple):
    """What is known of a picture before it is decoded.

    Attributes:
        width, height: upright, as OpenCV gives it.
        jpeg: how it is stored, if it is a JPEG.
    """

    width: int
    height: int
    jpeg: jpeg.JpegHeader | None = None


def read_header(data: bytes, *, is_whole: bool = True) -> Header | None:
    """Read the header of JPEG, PNG, WebP, BMP and TIFF; a few microseconds.

    Args:
        data: the file, or its beginning.
        is_whole: whether `data` is all of the file: in PNG, TIFF and some WebP files the orientation may come last.

    Returns:
        None where the header alone does not settle what OpenCV will make of the file.
    """
    try:
        if data.startswith(jpeg.SIGNATURE):
            stored = jpeg.read_jpeg_header(data)
            width, height = stored.width, stored.height
            return Header(height, width, stored) if stored.orientation > 4 else Header(width, height, stored)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            size = _webp_size(data, is_whole)
        elif data.startswith(b"BM"):
            size = _bmp_size(data)
        elif data.startswith(PNG_SIGNATURE):
            size = _png_size(data) if is_whole else None
        elif data.startswith((b"II*\0", b"MM\0*")):
            size = _tiff_size(data) if is_whole else None
        else:
            return None
    except (ValueError, IndexError, error):
        return None
    return Header(*size) if size is not None and min(size) > 0 else None


def png_has_end(data: bytes) -> bool:
    """Whether all chunks lie inside the file. OpenCV 5 makes room for what a chunk claims, up to 4 GB, then reads."""
    try:
        return any(kind == b"IEND" for kind in _png_chunks(data))
    except (ValueError, error):
        return False


def _png_size(data: bytes) -> tuple[int, int] | None:
    # Later versions of OpenCV turn the picture as the chunk eXIf says, wherever it is; earlier ones do not.
    kinds = list(_png_chunks(data))
    if kinds[0] != b"IHDR" or b"eXIf" in kinds:
        return None
    width, height = _PNG.unpack_from(data, 16)
    return width, height


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of the chunks, to IEND.

    Raises:
        ValueError, struct.error: a chunk reaches over the end of the file, or there is no IEND.
    """
    kind, at = b"", len(PNG_SIGNATURE)
    while kind != b"IEND":
        nbytes, kind = _PNG_CHUNK.unpack_from(data, at)
        at += nbytes + 12
        if at > len(data):
            raise ValueError("a chunk is cut short")
        yield kind


def _bmp_size(data: bytes) -> tuple[int, int] | None:
    header_nbytes, width, height = _BMP.unpack_from(data, 14)
    return (width, abs(height)) if header_nbytes >= 40 else None


def _webp_size(data: bytes, is_whole: bool) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = _WEBP_LOSSY.unpack_from(data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = _WEBP_LOSSLESS.unpack_from(data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    is_animated = kind == b"VP8X" and data[20] & 2
    if kind == b"VP8X" and len(data) >= 30 and is_whole and not is_animated and b"EXIF" not in data:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    values: dict[int, int | None] = {}
    for tag, _, value in first_directory(data):
        values.setdefault(tag, value)
    width, height = values.get(0x0100), values.get(0x0101)
    if width is None or height is None or values.get(ORIENTATION, 1) != 1:
        return None
    return width, height
