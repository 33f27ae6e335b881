"""The size of a picture, and how it is stored, from the header of its file; nothing is decoded.

Damaged, unusual and unknown files get no header here, and are left to OpenCV.
"""

from __future__ import annotations

import re
from struct import Struct, error
from typing import NamedTuple

from loaders.images.decode import boxes, jpeg, netpbm, png, tiff
from loaders.images.decode.opencv import least_nbytes

_BMP = Struct("<Iii")
_OLD_BMP = Struct("<IHH")
_GIF = Struct("<HH")
_SUN = Struct(">II")
_WEBP_LOSSY = Struct("<HH")
_WEBP_LOSSLESS = Struct("<I")
_CHUNK = Struct("<4sI")
_SUN_SIGNATURE = b"\x59\xa6\x6a\x95"
_RADIANCE = re.compile(rb"#\?.*?\n[-+]Y (\d{1,9}) [-+]X (\d{1,9})\n", re.DOTALL)
_FLOATS = (b"PF\n", b"Pf\n", b"PF ", b"Pf ", b"PF\r", b"Pf\r")

_WEIGHT_OF_JPEG_2000 = 4  # OpenJPEG takes four bytes per sample


class Header(NamedTuple):
    """What is known about a picture before it is decoded.

    Attributes:
        width, height: upright, as `read_image` returns it.
        least_nbytes: the smallest file that may have so many pixels; a smaller one is refused.
        orientation: the orientation to apply after decoding; None where OpenCV applies it, or the JPEG's header has it.
        refusal: why the file is not decoded, or None.
        jpeg, tiff, netpbm: the header of that format, if the file has it.
    """

    width: int
    height: int
    least_nbytes: int
    orientation: int | None = None
    refusal: str | None = None
    jpeg: jpeg.JpegHeader | None = None
    tiff: tiff.TiffHeader | None = None
    netpbm: netpbm.NetpbmHeader | None = None

    def problem(self, nbytes: int) -> str | None:
        """Why a file of `nbytes` is refused, or None: OpenCV would allocate all the pixels that its header declares."""
        if self.refusal is not None or self.least_nbytes <= nbytes:
            return self.refusal
        size = f"the {self.width} x {self.height} pixels that its header declares"
        if self.jpeg is not None:  # OpenCV would fill most of it with grey
            return f"the JPEG is damaged: its {nbytes:,} bytes cannot hold {size}"
        return f"its {nbytes:,} bytes are too few for {size}"


def read_header(data: bytes, *, is_whole: bool = True) -> Header | None:
    """Read the header of an image file, in a few microseconds.

    Args:
        data: the file, or its beginning.
        is_whole: whether `data` is all of the file: in PNG, TIFF and some WebP files the orientation may come last.

    Returns:
        None if the header alone does not determine what `read_image` returns.
    """
    try:
        found = _read(data, is_whole)
    except (ValueError, IndexError, error):
        return None
    return found if found is not None and min(found.width, found.height) > 0 else None


def _read(data: bytes, is_whole: bool) -> Header | None:
    if data.startswith(jpeg.SIGNATURE):
        stored = jpeg.read_jpeg_header(data)
        width, height = stored.width, stored.height
        if stored.orientation > 4:
            width, height = height, width
        return Header(width, height, stored.least_nbytes, jpeg=stored)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data, is_whole)
    if data.startswith(b"BM"):
        return _as_stored(*_bmp_size(data))
    if data.startswith(png.SIGNATURE):
        return _turned(*png.read_png_header(data)) if is_whole else None
    if data.startswith(tiff.SIGNATURES):
        return _tiff(data) if is_whole else None
    if data.startswith(netpbm.SIGNATURES):
        pixels = netpbm.read_netpbm_header(data)
        return _as_stored(pixels.width, pixels.height)._replace(netpbm=pixels)
    if data[4:8] == b"ftyp":
        return _avif(data)
    if data.startswith((boxes.JP2_SIGNATURE, boxes.J2K_SIGNATURE)):
        found = boxes.read_j2k_header(data)
        header = _as_stored(found.width, found.height, _WEIGHT_OF_JPEG_2000)
        return header._replace(least_nbytes=max(header.least_nbytes, found.least_nbytes))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _as_stored(*_GIF.unpack_from(data, 6))
    if data.startswith(_SUN_SIGNATURE):
        return _as_stored(*_SUN.unpack_from(data, 4))
    if data.startswith(b"#?") and (radiance := _RADIANCE.match(data)):
        return _as_stored(int(radiance[2]), int(radiance[1]))
    if data.startswith(_FLOATS):
        return Header(1, 1, 0, refusal="it holds floating-point samples, and does not define which of them are white")
    return None


def _as_stored(width: int, height: int, weight: int = 1) -> Header:
    return Header(width, height, least_nbytes(width, height, weight=weight))


def _turned(width: int, height: int, orientation: int) -> Header:
    header = _as_stored(*((height, width) if orientation > 4 else (width, height)))
    return header._replace(orientation=orientation)


def _bmp_size(data: bytes) -> tuple[int, int]:
    header_nbytes, width, height = _BMP.unpack_from(data, 14)
    if header_nbytes < 40:  # the header of OS/2
        _, width, height = _OLD_BMP.unpack_from(data, 14)
    return width, abs(height)


def _webp(data: bytes, is_whole: bool) -> Header | None:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = _WEBP_LOSSY.unpack_from(data, 26)
        return _as_stored(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = _WEBP_LOSSLESS.unpack_from(data, 21)
        return _as_stored((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X" or len(data) < 30 or not is_whole:
        return None
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    return _turned(width, height, tiff.any_orientation(_webp_exif(data)))


def _webp_exif(data: bytes) -> bytes:
    """The first EXIF chunk; libwebp finds it even if the flags of VP8X do not announce one."""
    at = 12
    while at + 8 <= len(data):
        kind, nbytes = _CHUNK.unpack_from(data, at)
        if kind == b"EXIF":
            return data[at + 8 : at + 8 + nbytes]
        at += 8 + nbytes + (nbytes & 1)
    return b""


def _tiff(data: bytes) -> Header:
    stored = tiff.read_tiff_header(data)
    header = _turned(stored.width, stored.height, stored.orientation)
    return header._replace(tiff=stored, refusal=stored.refusal)


def _avif(data: bytes) -> Header | None:
    if boxes.is_avif(data):
        return _turned(*boxes.read_avif_header(data))
    if boxes.is_other_heif(data):
        return Header(1, 1, 0, refusal="it is HEIF, of which OpenCV can decode only AVIF")
    return None
