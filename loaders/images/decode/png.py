"""Reads PNG files by chunks (W3C PNG, third edition, section 5)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct, error

from loaders.images.decode.opencv import UndecodableError
from loaders.images.decode.tiff import any_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SIZE = Struct(">II")
_CHUNK = Struct(">I4s")
_CRC = Struct(">I")
_PICTURE = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # the chunks that its pixels depend on
_GREY, _PALETTE = 0, 3  # of the colour types
_ANCILLARY = 0x20  # a bit in the first letter of a chunk's name


def read_png_header(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation), the size as stored; needs the whole file, as the orientation may come last.

    Raises:
        ValueError, struct.error: a chunk extends past the end of the file, IHDR is not first, or there is no IEND.
    """
    orientation = None
    for kind, at, end in _chunks(data):
        if kind == b"eXIf" and orientation is None:
            orientation = any_orientation(data[at + 8 : end - 4])
    width, height = _SIZE.unpack_from(data, 16)
    return width, height, orientation or 1


def picture_alone(data: bytes) -> bytes:
    """The same file without the chunks that its pixels do not depend on: animation, transparency, metadata.

    Without the animation, every version of OpenCV decodes the default image rather than a first frame. libpng finds no
    metadata to report on stderr, and no damage that the checksums reveal.

    Raises:
        UndecodableError: it has no end, a damaged chunk, or an unknown critical one.
    """
    view, parts, kept_to = memoryview(data), [], 0
    try:
        for kind, at, end in _chunks(data):
            if kind in _PICTURE:
                if zlib.crc32(view[at + 4 : end - 4]) != _CRC.unpack_from(data, end - 4)[0]:
                    raise ValueError("damaged")
            elif kind[0] & _ANCILLARY:
                parts.append(view[kept_to:at])
                kept_to = end
            else:
                raise UndecodableError(f"the PNG has a critical chunk {kind!r} that is unknown")
    except (ValueError, error) as failure:
        raise UndecodableError(
            f"OpenCV cannot decode its {len(data):,} bytes: the PNG has no end, or a damaged chunk"
        ) from failure
    return b"".join([*parts, view[kept_to:end]]) if kept_to or end < len(data) else data


def indices_alone(data: bytes) -> tuple[bytes, int]:
    """The same file as a grey picture of what it stores for each pixel, and the number of bits of each.

    The colours of a palette are removed: what is stored are its indices.

    Raises:
        UndecodableError: as `picture_alone`, or it stores several numbers per pixel: colours, or alpha.
    """
    data = picture_alone(data)
    bits, kind = data[24], data[25]  # of IHDR, which is first
    if kind not in (_GREY, _PALETTE):
        raise UndecodableError(
            "the PNG has colours or alpha; a mask has one number per pixel, as grey or as index of a palette"
        )
    parts = []
    for name, at, end in _chunks(data):
        if name == b"IHDR":
            header = data[at + 4 : at + 17] + bytes([_GREY]) + data[at + 18 : end - 4]
            parts += [data[: at + 4], header, _CRC.pack(zlib.crc32(header))]
        elif name != b"PLTE":
            parts.append(data[at:end])
    return b"".join(parts), bits


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk, up to IEND.

    Raises:
        ValueError, struct.error: a chunk extends past the end of the file, IHDR is not first, or there is no IEND.
    """
    kind, end = b"", len(SIGNATURE)
    while kind != b"IEND":
        at = end
        nbytes, kind = _CHUNK.unpack_from(data, at)
        if (kind == b"IHDR") != (at == len(SIGNATURE)):
            raise ValueError("IHDR is not first, or not alone")
        end = at + nbytes + 12
        if end > len(data):  # OpenCV 5 allocates what a chunk claims, up to 4 GB, then reads
            raise ValueError("a chunk is cut short")
        yield kind, at, end
