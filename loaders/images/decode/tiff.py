"""TIFF directories, in which EXIF also stores the orientation of a photo, and the pixels of TIFF files."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct, error
from typing import Any, NamedTuple

import cv2
import numpy as np

from loaders.images.decode import opencv
from loaders.images.decode.opencv import UndecodableError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two are BigTIFF's
ORIENTATION = 0x0112
SHORT, LONG, LONG8 = 3, 4, 16

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR = 0x100, 0x101, 0x102, 0x106, 0x115, 0x11C
_EXTRA_SAMPLES, _SAMPLE_FORMAT = 0x152, 0x153
_PIECES = ((0x111, 0x117), (0x144, 0x145))  # offsets and lengths of strips, and of tiles
_PRIVATE = 0xFFFF  # a tag that no reader knows
_MINISWHITE, _MINISBLACK, _RGB = 0, 1, 2
_SEPARATE = 2
_UNSIGNED = 1
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}  # SampleFormat (TIFF 6.0, page 80)
_MOST_BITS = 16

_ORDERS = {b"II": "<", b"MM": ">"}
_START = {order: Struct(order + "I") for order in "<>"}
_COUNT = {order: Struct(order + "H") for order in "<>"}
_ENTRY = {order: Struct(order + "HHI") for order in "<>"}
_BIG = {order: Struct(order + "Q") for order in "<>"}
_BIG_ENTRY = {order: Struct(order + "HHQ") for order in "<>"}
_VALUE = {SHORT: _COUNT, LONG: _START, LONG8: _BIG}
_NBYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # by type: byte, ascii, short, long, rational, … (TIFF 6.0, page 15)


class Entry(NamedTuple):
    """A tag of a directory.

    Attributes:
        kind: the type of its values.
        number: how many values it has.
        at: offset of the entry in the file.
        values_at: offset of its values in the file.
    """

    kind: int
    number: int
    at: int
    values_at: int


class Directory:
    """The first directory of a TIFF file, classic or BigTIFF.

    Raises:
        ValueError, IndexError, struct.error: it is not a TIFF file, or damaged.
    """

    def __init__(self, data: bytes) -> None:
        order = _ORDERS.get(data[:2])
        if order is None or not data.startswith(SIGNATURES):
            raise ValueError("no TIFF")
        self.order = order
        self._data = data
        self._is_big = data[2:4] in (b"+\0", b"\0+")
        pointer, entry, room = (_BIG, _BIG_ENTRY, 8) if self._is_big else (_START, _ENTRY, 4)
        (start,) = pointer[order].unpack_from(data, 8 if self._is_big else 4)
        if start > len(data):
            raise ValueError("the directory lies outside")
        (number,) = (_BIG if self._is_big else _COUNT)[order].unpack_from(data, start)
        first, step = start + (8 if self._is_big else 2), entry[order].size + room
        if first + number * step > len(data):
            raise ValueError("the directory is cut short")
        self.entries: dict[int, Entry] = {}
        for at in range(first, first + number * step, step):
            tag, kind, count = entry[order].unpack_from(data, at)
            values_at = at + step - room
            size = _VALUE[kind][order].size if kind in _VALUE else 0
            if size * count > room:
                (values_at,) = pointer[order].unpack_from(data, values_at)
            if values_at + size * count > len(data):
                continue  # its values lie outside; readers skip it
            self.entries.setdefault(tag, Entry(kind, count, at, values_at))

    def values(self, tag: int, default: int) -> tuple[int, ...]:
        """The integers of a tag; only the default if it is missing, or holds none."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _VALUE or not entry.number:
            return (default,)
        form = Struct(f"{self.order}{entry.number}{_VALUE[entry.kind][self.order].format[-1]}")
        return form.unpack_from(self._data, entry.values_at)

    def value(self, tag: int, default: int) -> int:
        """The first integer of a tag, or the default."""
        return self.values(tag, default)[0]

    def pieces_end(self) -> int:
        """Where the last strip or tile ends."""
        pieces = [(self.values(at, 0), self.values(nbytes, 0)) for at, nbytes in _PIECES]
        return max(map(sum, [pair for starts, sizes in pieces for pair in zip(starts, sizes, strict=False)]))

    def with_all(self, file: bytearray, tag: int, value: int, count: int | None = None) -> None:
        """Set all values of a tag, if present, in a copy of the file; `count` reduces their number."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _VALUE:
            return
        form = _VALUE[entry.kind][self.order]
        if count is not None and count < entry.number:
            self._shorten(file, entry, 0, count)
            entry = entry._replace(number=count, values_at=entry.at + (12 if self._is_big else 8))
        for number in range(entry.number):
            form.pack_into(file, entry.values_at + number * form.size, value)

    def with_part(self, file: bytearray, tag: int, part: int, parts: int) -> None:
        """Keep only one of `parts` equal parts of a tag's values, if present, in a copy of the file."""
        entry = self.entries.get(tag)
        if entry is not None and entry.kind in _VALUE:
            self._shorten(file, entry, part * (entry.number // parts), entry.number // parts)

    def without(self, file: bytearray, tag: int) -> None:
        """Hide a tag from readers, in a copy of the file."""
        if tag in self.entries:
            _COUNT[self.order].pack_into(file, self.entries[tag].at, _PRIVATE)

    def _shorten(self, file: bytearray, entry: Entry, first: int, count: int) -> None:
        size = _VALUE[entry.kind][self.order].size
        pointer, number_at, values_at = (_BIG, 4, 12) if self._is_big else (_START, 4, 8)
        begin = entry.values_at + first * size
        pointer[self.order].pack_into(file, entry.at + number_at, count)
        room = 8 if self._is_big else 4
        if count * size <= room:
            file[entry.at + values_at : entry.at + values_at + room] = self._data[begin : begin + count * size].ljust(
                room, b"\0"
            )
        else:
            pointer[self.order].pack_into(file, entry.at + values_at, begin)


def first_directory(data: bytes) -> Iterator[tuple[int, int, int | None]]:
    """(tag, type, value) of each entry of the first directory; the value is None unless it is one SHORT or one LONG.

    Raises:
        ValueError, IndexError, struct.error: it is not a TIFF file, or damaged in what was read so far.
    """
    order = _ORDERS.get(data[:2])
    if order is None or data[:4] not in SIGNATURES[:2]:
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
    """The orientation, 1 to 8, in a block of EXIF without its leading `Exif\\0\\0`; 1 if it has none.

    Raises:
        ValueError, IndexError, struct.error: the block is damaged or unusual; readers disagree about these.
    """
    before = 0
    for tag, kind, value in first_directory(exif):
        if tag == ORIENTATION:
            # Out of order, or of another type: some readers accept it and others do not.
            if value is None or kind != SHORT or before > ORIENTATION:
                raise ValueError("unusual orientation")
            return value if 1 <= value <= 8 else 1
        before = max(before, tag)
    return 1


def any_orientation(exif: bytes) -> int:
    """The orientation in a block of EXIF, usual or not, with or without its leading `Exif\\0\\0`; else 1."""
    try:
        for tag, _, value in first_directory(exif.removeprefix(b"Exif\0\0")):
            if tag == ORIENTATION:
                return value if value is not None and 1 <= value <= 8 else 1
    except (ValueError, IndexError, error):
        pass  # damaged: the picture stays as it is stored
    return 1


class TiffHeader(NamedTuple):
    """How a TIFF file stores its pixels.

    Attributes:
        width, height: as stored.
        orientation: 1 to 8.
        bits: per sample, the most if they differ.
        samples: per pixel.
        photometric: what the samples mean (TIFF 6.0, page 37).
        is_separate: whether each sample of a pixel is in its own plane.
        sample_format: 1 for unsigned integers.
    """

    width: int
    height: int
    orientation: int
    bits: int
    samples: int
    photometric: int
    is_separate: bool
    sample_format: int

    @property
    def refusal(self) -> str | None:
        """Why it has no 8-bit picture, or None."""
        kind = _FORMATS.get(self.sample_format)
        if kind is not None or self.bits > _MOST_BITS:
            of = f"{self.bits}-bit {kind or 'unsigned'}"
            return f"the TIFF holds {of} samples, and does not define which of them are black and white"
        if self.photometric in (_MINISWHITE, _MINISBLACK) and self.samples > 2:
            return f"the TIFF holds {self.samples} bands, and does not define which of them are red, green and blue"
        if self.samples > 4:
            return f"the TIFF holds {self.samples} samples per pixel; OpenCV decodes no more than 4"
        return None

    @property
    def is_deep(self) -> bool:
        """Whether OpenCV has to decode it to 16 bits, as to 8 bits it would round or fail."""
        whole = {_MINISWHITE: (1,), _MINISBLACK: (1,), _RGB: (3, 4)}.get(self.photometric, ())
        return self.bits > 8 and self.samples in whole

    def __str__(self) -> str:
        plural = "s" if self.samples > 1 else ""
        return f"a TIFF of {self.samples} sample{plural} per pixel and {self.bits} bits per sample"


def read_tiff_header(data: bytes) -> TiffHeader:
    """Read the first directory.

    Raises:
        ValueError, IndexError, struct.error: it is not a TIFF file, or damaged.
    """
    found = Directory(data)
    orientation = found.value(ORIENTATION, 1)
    return TiffHeader(
        found.value(_WIDTH, 0),
        found.value(_HEIGHT, 0),
        orientation if 1 <= orientation <= 8 else 1,
        max(found.values(_BITS, 1)),
        found.value(_SAMPLES, 1),
        found.value(_PHOTOMETRIC, _MINISBLACK),
        found.value(_PLANAR, 1) == _SEPARATE,
        found.value(_SAMPLE_FORMAT, _UNSIGNED),
    )


def decode_tiff(data: bytes, header: TiffHeader, mode: str) -> np.ndarray[Any, Any]:
    """The picture as stored, not yet turned upright: uint8 (H, W, 3) RGB, or (H, W).

    Of samples with more than 8 bits the highest 8 are kept. Alpha is dropped, and declared as unspecified to OpenCV,
    which would otherwise multiply the colours by it.

    Raises:
        UndecodableError, cv2.error: it is damaged, or OpenCV does not know its kind.
    """
    directory, file = Directory(data), bytearray(data)
    directory.with_all(file, ORIENTATION, 1)
    directory.with_all(file, _EXTRA_SAMPLES, 0)
    try:
        if not header.is_deep:
            return opencv.decode_picture(file, mode)
        if header.is_separate and header.samples > 1:
            pixels = np.dstack([_high_bits(_plane(data, directory, header, sample)) for sample in range(3)])
            return pixels if mode == "RGB" else opencv.grey_of(pixels)
        stored = _high_bits(file)
    except UndecodableError as failure:
        why = "it is cut short" if directory.pieces_end() > len(data) else "it is damaged, or unknown to OpenCV"
        raise UndecodableError(f"OpenCV cannot decode its {len(data):,} bytes, {header}: {why}") from failure
    if stored.ndim == 2:
        grey = 255 - stored if header.photometric == _MINISWHITE else stored
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB) if mode == "RGB" else grey
    pixels = cv2.cvtColor(stored, cv2.COLOR_BGR2RGB if stored.shape[2] == 3 else cv2.COLOR_BGRA2RGB)
    return pixels if mode == "RGB" else opencv.grey_of(pixels)


def _plane(data: bytes, directory: Directory, header: TiffHeader, sample: int) -> bytearray:
    """The same file with only one of its planes, as a grey picture."""
    file = bytearray(data)
    for tag, value in ((ORIENTATION, 1), (_PHOTOMETRIC, _MINISBLACK), (_SAMPLES, 1), (_PLANAR, 1)):
        directory.with_all(file, tag, value)
    for tag, value in ((_BITS, header.bits), (_SAMPLE_FORMAT, _UNSIGNED)):
        directory.with_all(file, tag, value, count=1)
    for tag in sum(_PIECES, ()):
        directory.with_part(file, tag, sample, header.samples)
    directory.without(file, _EXTRA_SAMPLES)
    return file


def _high_bits(file: bytearray) -> np.ndarray[Any, Any]:
    """The highest 8 bits of each sample; OpenCV extends samples of fewer than 16 bits at the low end."""
    stored = opencv.decode_unchanged(file)
    if stored.dtype == np.uint8:
        return stored
    if stored.dtype != np.uint16:
        raise UndecodableError(f"OpenCV cannot decode its {len(file):,} bytes to pixels: it returns {stored.dtype}")
    return (stored >> 8).astype(np.uint8)
