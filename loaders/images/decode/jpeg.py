"""The markers of a JPEG up to its first scan (ITU-T T.81, annex B), its metadata, and whether it has an end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from loaders.images.decode.opencv import least_nbytes
from loaders.images.decode.tiff import exif_orientation

SIGNATURE = b"\xff\xd8\xff"

# Inside a scan FF is data when 00 follows, a restart when D0 to D7 does, padding when FF does (T.81, B.1.1).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SEGMENT = Struct(">BBH")
_FRAME = Struct(">BHHB")
_INTERVAL = Struct(">HH")
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # baseline and extended
_HUFFMAN_FRAMES = (*_SEQUENTIAL_FRAMES, 0xC2)  # and progressive; the others are rare
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
# How to handle a marker; most segments are skipped.
_PASS, _FRAME_COMES, _EXIF_MAY_COME, _SCAN_COMES, _INTERVAL_COMES, _PADDING, _OUT_OF_PLACE = range(7)
_ROLES = [_OUT_OF_PLACE] * 0xDA + [_PASS] * 0x26
_ROLES[0xDA], _ROLES[0xDD], _ROLES[0xE1], _ROLES[0xFF], _ROLES[0xC4], _ROLES[0xCC] = (
    _SCAN_COMES,
    _INTERVAL_COMES,
    _EXIF_MAY_COME,
    _PADDING,
    _PASS,
    _PASS,
)
for _kind in _HUFFMAN_FRAMES + _OTHER_FRAMES:
    _ROLES[_kind] = _FRAME_COMES
# libjpeg tells from JFIF's and Adobe's segments whether the colours are YCbCr.
_TELLS_COLOURS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
# Luma samples per chroma sample, across and down, as (h << 4 | v): 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1.
_USUAL_SAMPLING = (0x11, 0x21, 0x22, 0x12, 0x41)


class JpegHeader(NamedTuple):
    """A JPEG's header, up to the first scan.

    Attributes:
        width, height: as stored, before the picture is turned upright.
        orientation: EXIF orientation, 1 to 8.
        is_usual: sequential in one scan, Huffman codes, 8 bits, one component or three with one of the usual chroma
            samplings: all JPEG decoders agree on these. Progressive JPEGs are not: each pixel needs all scans, so
            decoding a region saves nothing.
        least_nbytes: the fewest bytes that the pixels can take.
        components: 1 for grey, 3 for colours, 4 for CMYK.
        sampling: luma samples per chroma sample, across and down; (1, 1) if there is no chroma, None if it is unusual.
        restart_interval: MCUs (minimum coded units) between restart markers; 0 for none.
        scan_at: offset of the entropy-coded bytes of the first scan.
    """

    width: int
    height: int
    orientation: int
    is_usual: bool
    least_nbytes: int
    components: int
    sampling: tuple[int, int] | None
    restart_interval: int
    scan_at: int


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Read the segments up to the first scan.

    Raises:
        ValueError, IndexError, struct.error: damaged, cut short, or unusual, so that OpenCV has to decide.
    """
    at, frame_kind, frame_at, has_app1, orientation, interval = 2, 0, 0, False, 0, 0
    while True:
        fill, kind, nbytes = _SEGMENT.unpack_from(data, at)
        role = _ROLES[kind]
        if fill != 0xFF or nbytes < 2 or role == _OUT_OF_PLACE:
            raise ValueError("a marker that has no place here, or none")
        if role == _SCAN_COMES:
            break
        if role == _PADDING:
            at += 1
            continue
        if role == _FRAME_COMES:
            if frame_at:
                raise ValueError("two frames")
            frame_kind, frame_at = kind, at + 4
        elif role == _INTERVAL_COMES:
            _, interval = _INTERVAL.unpack_from(data, at + 2)
        elif role == _EXIF_MAY_COME:
            if not orientation and data.startswith(b"Exif\0\0", at + 4):
                # Before 4.11, OpenCV reads only the first APP1; from then on, the first that is EXIF.
                if has_app1:
                    raise ValueError("EXIF is not first")
                orientation = exif_orientation(data[at + 10 : at + 2 + nbytes])
            has_app1 = True
        at += 2 + nbytes
    if not frame_at:
        raise ValueError("no frame")
    precision, height, width, components = _FRAME.unpack_from(data, frame_at)
    if not width or not height:
        raise ValueError("no size")
    factors = tuple(data[frame_at + 7 + 3 * component] for component in range(components))
    sampling = (1, 1) if components == 1 else None
    if components == 3 and factors[0] in _USUAL_SAMPLING and factors[1:] == (0x11, 0x11):
        sampling = (factors[0] >> 4, factors[0] & 15)
    is_usual = (
        frame_kind in _SEQUENTIAL_FRAMES
        and precision == 8
        and sampling is not None
        and data[at + 4] == components  # of the first scan
    )
    return JpegHeader(
        width,
        height,
        orientation or 1,
        is_usual,
        least_nbytes=_least_nbytes(frame_kind, width, height),
        components=components,
        sampling=sampling,
        restart_interval=interval,
        scan_at=at + 2 + nbytes,
    )


def least_nbytes_of(data: bytes) -> int:
    """The fewest bytes that the largest frame of a JPEG can take, even if its header is damaged or unusual."""
    at, least = 2, 0
    while (marker := _MARKER.search(data, at)) and len(data) >= marker.end() + 9:
        kind, at = data[marker.end() - 1], marker.end()
        if _ROLES[kind] == _FRAME_COMES:
            _, height, width, _ = _FRAME.unpack_from(data, at + 2)
            least = max(least, _least_nbytes(kind, width, height))
        at += int.from_bytes(data[at : at + 2], "big") if _ROLES[kind] != _OUT_OF_PLACE else 0
    return least


def _least_nbytes(frame_kind: int, width: int, height: int) -> int:
    if frame_kind not in _HUFFMAN_FRAMES:
        return least_nbytes(width, height)
    # Each block of 8 by 8 pixels takes at least one bit, for the first component's first coefficient.
    return ((width + 7) // 8) * ((height + 7) // 8) // 8


def parts_that_decode(data: bytes, header: JpegHeader) -> tuple[bytes, int]:
    """The header without metadata: the tables, the frame, and the segments that determine the colour space.

    Args:
        data: a JPEG, at least up to the first scan.
        header: what `read_jpeg_header` returned for it.

    Returns:
        The bytes, and the offset in them of height and width, two bytes each.
    """
    parts, nbytes_before, size_at = [data[:2]], 2, 0
    for kind, segment in _segments(data, header):
        if not _is_metadata(kind, segment):
            if _ROLES[kind] == _FRAME_COMES:
                size_at = nbytes_before + 5
            parts.append(segment)
            nbytes_before += len(segment)
    return b"".join(parts), size_at


def metadata(data: bytes, header: JpegHeader) -> list[bytes]:
    """The segments that do not affect the pixels: EXIF, colour profiles, comments and the like, each with its marker.

    Args:
        data: a JPEG. Such segments may also come between its scans.
        header: what `read_jpeg_header` returned for it.
    """
    found = (*_segments(data, header), *_segments_behind(data, header.scan_at))
    return [segment for kind, segment in found if kind != 0xE0 and _is_metadata(kind, segment)]


def _segments(data: bytes, header: JpegHeader) -> Iterator[tuple[int, bytes]]:
    """(kind, bytes) of each segment up to and including the first scan's header."""
    at = 2
    while at < header.scan_at:
        _, kind, nbytes = _SEGMENT.unpack_from(data, at)
        if kind == 0xFF:
            at += 1
            continue
        yield kind, data[at : at + 2 + nbytes]
        at += 2 + nbytes


def _segments_behind(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """(kind, bytes) of each segment after an offset in a scan, up to the end of the picture or an invalid segment."""
    while (marker := _MARKER.search(data, at)) and data[marker.end() - 1] != 0xD9:
        nbytes = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        at = marker.end() + nbytes
        if nbytes < 2 or at > len(data):
            return
        yield data[marker.end() - 1], data[marker.start() : at]


def _is_metadata(kind: int, segment: bytes) -> bool:
    return (0xE0 <= kind <= 0xEF or kind == 0xFE) and segment[4:9] != _TELLS_COLOURS.get(kind)


def jpeg_has_end(data: bytes) -> bool:
    """Whether the end-of-image marker is present. Before 4.11, OpenCV silently fills what is missing with grey."""
    if data.endswith(b"\xff\xd9"):
        return True
    # Data may follow the picture, so walk: segments are skipped whole, as a thumbnail in one has its own end marker.
    at = 2
    while marker := _MARKER.search(data, at):
        if data[marker.end() - 1] == 0xD9:
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False
