"""The entries of a TIFF directory, which is also how EXIF stores the orientation of a photo."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

ORIENTATION = 0x0112
SHORT, LONG = 3, 4

_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_START = {order: Struct(order + "I") for order in "<>"}
_COUNT = {order: Struct(order + "H") for order in "<>"}
_ENTRY = {order: Struct(order + "HHI") for order in "<>"}
_VALUE = {SHORT: _COUNT, LONG: _START}
_NBYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # by type: byte, ascii, short, long, rational, … (TIFF 6.0, page 15)


def first_directory(data: bytes) -> Iterator[tuple[int, int, int | None]]:
    """(tag, type, value) of each entry of the first directory; the value is None unless it is one SHORT or one LONG.

    Raises:
        ValueError, IndexError, struct.error: this is no TIFF, or it is damaged where one has looked so far.
    """
    order = _ORDERS.get(data[:4])
    if order is None:
        raise ValueError("no TIFF")
    (start,) = _START[order].unpack_from(data, 4)
    (count,) = _COUNT[order].unpack_from(data, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = _ENTRY[order].unpack_from(data, at)
        nbytes = _NBYTES[kind] * number
        if nbytes > 4 and _START[order].unpack_from(data, at + 8)[0] + nbytes > len(data):
            raise ValueError(f"tag {tag} lies outside")
        yield tag, kind, _VALUE[kind][order].unpack_from(data, at + 8)[0] if kind in _VALUE and number == 1 else None


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, that a block of EXIF tells, without its leading `Exif\\0\\0`; 1 if it tells none.

    Raises:
        ValueError, IndexError, struct.error: the block is damaged or unusual; readers disagree about such ones.
    """
    before = 0
    for tag, kind, value in first_directory(exif):
        if tag == ORIENTATION:
            # Out of order, or of another type: some readers take it and others do not.
            if value is None or kind != SHORT or before > ORIENTATION:
                raise ValueError("unusual orientation")
            return value if 1 <= value <= 8 else 1
        before = max(before, tag)
    return 1
