"""The headers of AVIF and JPEG 2000, whose files consist of boxes (ISO/IEC 14496-12, section 4.2; 15444-1, annex I)."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
J2K_SIGNATURE = b"\xff\x4f\xff\x51"

_BOX = Struct(">I4s")
_LONG_NBYTES = Struct(">Q")
_SHORT, _LONG = Struct(">H"), Struct(">I")
_SIZE = Struct(">II")
_SIZ = Struct(">HH8IH")  # 15444-1, A.5.1
_TILE_PART_NBYTES = 14  # the least: the markers SOT and SOD
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
# EXIF orientation by quarter turns anticlockwise (irot): without mirroring, or mirrored afterwards on imir's axis 0 or
# 1.
_TURNED = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}


class AvifHeader(NamedTuple):
    """The size as stored, and the orientation as EXIF numbers it."""

    width: int
    height: int
    orientation: int


class J2kHeader(NamedTuple):
    """Size in pixels, the number of components, and the fewest bytes that the tiles can take."""

    width: int
    height: int
    components: int
    least_nbytes: int


def is_avif(data: bytes) -> bool:
    """Whether a file is AVIF, by its brands."""
    return bool(_brands(data) & _AVIF_BRANDS)


def is_other_heif(data: bytes) -> bool:
    """Whether a file is HEIF as cameras write it, with HEVC pictures instead of AV1."""
    brands = _brands(data)
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS


def read_avif_header(data: bytes) -> AvifHeader:
    """Read the properties of the primary item (ISO/IEC 23008-12, section 6.5).

    Raises:
        ValueError, IndexError, struct.error: damaged, or there is no primary item, as in an image sequence.
    """
    meta = _child(data, 0, len(data), b"meta")
    inner = (meta[0] + 4, meta[1])
    at, _ = _child(data, *inner, b"pitm")
    primary = (_LONG if data[at] else _SHORT).unpack_from(data, at + 4)[0]
    properties = _child(data, *inner, b"iprp")
    found = list(_boxes(data, *_child(data, *properties, b"ipco")))
    width, height, turns, axis = 0, 0, 0, None
    for number in _associated(data, *_child(data, *properties, b"ipma"), primary):
        if not number:
            continue  # 0 stands for no property
        kind, at, _ = found[number - 1]
        if kind == b"ispe":
            width, height = _SIZE.unpack_from(data, at + 4)
        elif kind == b"irot":
            turns = data[at] & 3
        elif kind == b"imir":
            axis = data[at] & 1
    return AvifHeader(width, height, _TURNED[axis][turns])


def read_j2k_header(data: bytes) -> J2kHeader:
    """Read the SIZ segment, the first of the code stream.

    Raises:
        ValueError, IndexError, struct.error: damaged, or the code stream lies beyond `data`.
    """
    start = 0 if data.startswith(J2K_SIGNATURE) else _child(data, 0, len(data), b"jp2c", is_cut=True)[0]
    if not data.startswith(J2K_SIGNATURE, start):
        raise ValueError("no SIZ")
    _, _, right, bottom, left, top, across, down, tiles_left, tiles_top, components = _SIZ.unpack_from(data, start + 4)
    if min(across, down, components) < 1 or right <= left or bottom <= top:
        raise ValueError("no pixels")
    for component in range(components):
        if data[start + 43 + 3 * component : start + 45 + 3 * component] != b"\1\1":
            raise ValueError("components of several sizes")
    tiles = -(-(right - tiles_left) // across) * -(-(bottom - tiles_top) // down)
    return J2kHeader(right - left, bottom - top, components, max(0, tiles) * _TILE_PART_NBYTES)


def _brands(data: bytes) -> set[bytes]:
    if data[4:8] != b"ftyp":
        return set()
    end = min(_BOX.unpack_from(data, 0)[0], len(data))
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}


def _boxes(data: bytes, at: int, end: int, *, is_cut: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start of its content, end) of each box in a part of a file.

    Raises:
        ValueError, struct.error: one is damaged, or extends past the end and not `is_cut`.
    """
    while at < end:
        nbytes, kind = _BOX.unpack_from(data, at)
        head = 8
        if nbytes == 1:
            (nbytes,) = _LONG_NBYTES.unpack_from(data, at + 8)
            head = 16
        elif nbytes == 0:
            nbytes = end - at
        if nbytes < head or (at + nbytes > end and not is_cut):
            raise ValueError(f"box {kind!r} is damaged")
        yield kind, at + head, at + nbytes
        at += nbytes


def _child(data: bytes, at: int, end: int, wanted: bytes, *, is_cut: bool = False) -> tuple[int, int]:
    for kind, start, stop in _boxes(data, at, end, is_cut=is_cut):
        if kind == wanted:
            return start, stop
    raise ValueError(f"no box {wanted!r}")


def _associated(data: bytes, at: int, end: int, item: int) -> Iterator[int]:
    """The numbers of the item's properties, from 1, in the order in which they apply (23008-12, section 9.3)."""
    version, is_wide = data[at], data[at + 3] & 1
    (entries,) = _LONG.unpack_from(data, at + 4)
    at += 8
    for _ in range(entries):
        if at >= end:
            raise ValueError("an association is missing")
        (owner,) = (_LONG if version else _SHORT).unpack_from(data, at)
        at += 4 if version else 2
        count = data[at]
        at += 1
        for number in range(at, at + count * (1 + is_wide), 1 + is_wide):
            if owner == item:
                yield _SHORT.unpack_from(data, number)[0] & 0x7FFF if is_wide else data[number] & 0x7F
        at += count * (1 + is_wide)
