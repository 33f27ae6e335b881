"""Windows of a JPEG with restart markers: the segments that contain a window, spliced into a small JPEG.

The part of a scan between two restart markers can be decoded independently (ITU-T T.81, E.1.4 and F.2.1.3.1). If the
number of MCUs between markers divides that of a row, the segments form a grid. Any rectangle of the grid is again a
JPEG: the tables of the whole one, another size, the segments in order with renumbered markers, and an end.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct, error
from typing import Any, NamedTuple

import numpy as np

from loaders.images.decode.jpeg import JpegHeader, parts_that_decode, read_jpeg_header
from loaders.images.decode.region import Region

# Mean distance of anchors, or one segment if longer. On average half of it is read needlessly at each end of a row.
_ANCHORS_NBYTES = 2048
_MARKER_NBYTES = 2
_HEADER_NBYTES = (1 << 16) - 1  # at most; most have fewer than 1000
_REMEMBERED_NBYTES = 4096  # of a file's bytes before its scan that are cached, at most
_RESTART, _END = 0xD0, 0xD9
_SIZE = Struct(">HH")
_SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1))

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Places = np.ndarray[Any, np.dtype[np.intp]]
Offsets = np.ndarray[Any, np.dtype[np.uint32]]


class Window(NamedTuple):
    """A rectangle of the grid of segments; `bottom` and `right` are exclusive."""

    top: int
    bottom: int
    left: int
    right: int


class Restarts(NamedTuple):
    """Where the segments of one JPEG are, and what is needed to decode them.

    Attributes:
        width, height: of the photo in pixels, as stored.
        orientation: EXIF orientation, 1 to 8.
        sampling: luma samples per chroma sample, across and down; (1, 1) if there is no chroma.
        interval: MCUs per segment.
        stride: segments from one anchor to the next in a row.
        size_at: offset of height and width in `header`.
        header: the bytes before the scan, without metadata.
        anchors: offsets in the file of every `stride`-th segment of each row, and of the end of the last one's marker.
    """

    width: int
    height: int
    orientation: int
    sampling: tuple[int, int]
    interval: int
    stride: int
    size_at: int
    header: bytes
    anchors: Offsets

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright photo."""
        return (self.height, self.width) if self.orientation > 4 else (self.width, self.height)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of segments."""
        down, across = self.pixels
        return _ceil(self.height, down), _ceil(self.width, across)

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of a segment, in pixels."""
        return 8 * self.sampling[1], 8 * self.sampling[0] * self.interval

    def is_possible(self, nbytes: int) -> bool:
        """Whether this is possible for a file of `nbytes`: an index may contain anything."""
        if self.sampling not in _SAMPLINGS or not 1 <= self.orientation <= 8 or not self.interval:
            return False
        (rows, columns), anchors = self.grid, self.anchors
        return (
            columns * self.interval == _ceil(self.width, 8 * self.sampling[0])
            and 1 <= self.stride <= columns
            and len(anchors) == rows * _ceil(columns, self.stride) + 1
            and int(anchors[0]) >= _MARKER_NBYTES
            and int(anchors[-1]) <= nbytes
            and bool((anchors[1:] > anchors[:-1]).all())
        )

    @property
    def scan_at(self) -> int:
        """Offset of the first segment in the file: the number of bytes that `has_header` takes."""
        return int(self.anchors[0])

    def has_header(self, head: bytes) -> bool:
        """Whether a file's header matches: the same picture size, orientation and tables.

        Args:
            head: the bytes of the file up to `scan_at`.
        """
        found = _known_head(head) if len(head) <= _REMEMBERED_NBYTES else _read_head(head)
        return found is not None and found._replace(stride=self.stride, anchors=self.anchors) == self

    def window(self, region: Region, scale: int) -> Window:
        """The segments that the pixels of a region at 1/scale depend on; the region is in the file's orientation.

        Chroma is interpolated between two samples, of which one may lie in the next segment.
        """
        (down, across), (rows, columns) = self.pixels, self.grid
        beside, below = (2 * scale * step if step > 1 else 0 for step in self.sampling)
        left, top, width, height = (scale * side for side in region.reduced(scale))
        return Window(
            max(0, (top - below) // down),
            min(rows, _ceil(top + height + below, down)),
            max(0, (left - beside) // across),
            min(columns, _ceil(left + width + beside, across)),
        )

    def share(self, window: Window) -> float:
        """The window's share of all segments."""
        rows, columns = self.grid
        return (window.bottom - window.top) * (window.right - window.left) / (rows * columns)

    def ranges(self, window: Window) -> tuple[list[int], list[int]]:
        """Starts and ends in the file of the pieces that `splice` needs: one per row, or a single one if they touch."""
        starts, ends = self._pieces(window)
        if self._takes_whole_rows(window):
            starts, ends = starts[:1], ends[-1:]
        return [start - _MARKER_NBYTES for start in starts.tolist()], ends.tolist()

    def splice(self, window: Window, pieces: bytearray) -> bytes | None:
        """A JPEG of only the window.

        Args:
            window: the part of the grid.
            pieces: the bytes of its `ranges`, concatenated; modified in place.

        Returns:
            None if the markers are not the expected ones: the anchors are not of this file.
        """
        (rows, columns), (top, bottom, left, right) = self.grid, window
        first = left // self.stride * self.stride
        count = min(columns, _ceil(right, self.stride) * self.stride) - first
        if first == 0 and top == 0:
            pieces[:_MARKER_NBYTES] = bytes((0xFF, _RESTART + 7))  # as if a segment preceded it
        content = np.frombuffer(pieces, np.uint8)
        at, kinds = _markers(content)
        # Each piece begins with the marker before its first segment; then come those that end its segments.
        down, across = (1, (bottom - top) * count) if self._takes_whole_rows(window) else (bottom - top, count)
        if len(at) != down * (across + 1):
            return None
        at = at.reshape(down, across + 1)
        # Two markers touch only where one piece ends and the next begins.
        lasts = at[:, -1] + _MARKER_NBYTES
        if at[0, 0] or lasts[-1] != len(content) or (at[1:, 0] != lasts[:-1]).any():
            return None
        expected = np.arange(top, top + down)[:, None] * columns + np.arange(first - 1, first + across)
        expected = (expected & 7) + _RESTART
        if bottom == rows and first + count == columns:
            expected[-1, -1] = _END
        if (kinds != expected.ravel()).any():
            return None
        begins, markers = at[:, :-1].reshape(-1, count), at[:, 1:].reshape(-1, count)
        kept = markers[:, left - first : right - first].ravel() + 1
        content[kept] = (np.arange(kept.size) & 7) + _RESTART
        content[kept[-1]] = _END
        begin_each = (begins[:, left - first] + _MARKER_NBYTES).tolist()
        end_each = (markers[:, right - first - 1] + _MARKER_NBYTES).tolist()
        view = memoryview(pieces)
        high, wide = self.pixels
        height, width = min(self.height, bottom * high) - top * high, min(self.width, right * wide) - left * wide
        head = (self.header[: self.size_at], _SIZE.pack(height, width), self.header[self.size_at + _SIZE.size :])
        return b"".join((*head, *[view[begin:end] for begin, end in zip(begin_each, end_each, strict=True)]))

    def _pieces(self, window: Window) -> tuple[Offsets, Offsets]:
        """The anchors at the start and end of each row of the window."""
        per_row = _ceil(self.grid[1], self.stride)
        first, last = window.left // self.stride, _ceil(window.right, self.stride)
        begin, end = window.top * per_row, (window.bottom - 1) * per_row + 1
        return self.anchors[begin + first : end + first : per_row], self.anchors[begin + last : end + last : per_row]

    def _takes_whole_rows(self, window: Window) -> bool:
        return window.left < self.stride and _ceil(window.right, self.stride) == _ceil(self.grid[1], self.stride)


def find_restarts(data: bytes, header: JpegHeader) -> Restarts | None:
    """Find the segments of a whole JPEG.

    Args:
        data: the file.
        header: what `read_jpeg_header` returned for it.

    Returns:
        None if they form no grid, or if anything is irregular: more or fewer of them than the frame needs, markers out
        of order, padding between them, more than one scan. Damage within a segment is not detected; it has the same
        effect as when the whole picture is decoded.
    """
    found = _without_anchors(data, header) if header.least_nbytes <= len(data) < 1 << 32 else None
    if found is None:
        return None
    rows, columns = found.grid
    if columns * found.interval != _ceil(found.width, 8 * found.sampling[0]):
        return None
    content = np.frombuffer(data, np.uint8)[header.scan_at :]
    at, kinds = _markers(content)
    expected = _RESTART + np.arange(rows * columns) % 8
    expected[-1] = _END
    if len(at) < len(expected) or (kinds[: len(expected)] != expected).any():
        return None
    at = at[: len(expected)]
    begins = np.empty(rows * columns, np.uint32)
    begins[0], begins[1:] = header.scan_at, at[:-1] + (header.scan_at + _MARKER_NBYTES)
    end = int(at[-1]) + header.scan_at + _MARKER_NBYTES
    stride = min(columns, max(1, round(_ANCHORS_NBYTES * len(begins) / (end - header.scan_at))))
    anchors = begins.reshape(rows, columns)[:, ::stride].ravel()
    return found._replace(stride=stride, anchors=np.append(anchors, np.uint32(end)))


def _without_anchors(data: bytes, header: JpegHeader) -> Restarts | None:
    """What the header of a JPEG says about its segments; None if they cannot be decoded separately."""
    if not header.is_usual or header.sampling is None or not header.restart_interval:
        return None
    kept, size_at = parts_that_decode(data, header)
    if len(kept) > _HEADER_NBYTES:
        return None
    size = (header.width, header.height)
    return Restarts(
        *size, header.orientation, header.sampling, header.restart_interval, 1, size_at, kept, np.empty(0, np.uint32)
    )


def _read_head(head: bytes) -> Restarts | None:
    """The same from a file's bytes up to its scan; None also if they are anything else."""
    try:
        header = read_jpeg_header(head)
    except (ValueError, IndexError, error):
        return None
    return _without_anchors(head, header) if header.scan_at == len(head) else None


_known_head = lru_cache(maxsize=256)(_read_head)  # for several windows of one file, or files of one camera


def _markers(content: Bytes) -> tuple[Places, Bytes]:
    """Offsets and kinds of the markers in entropy-coded bytes: FF is data if 00 follows (T.81, B.1.1.5)."""
    at = (content[:-1] == 0xFF).nonzero()[0]
    kinds = content[at + 1]
    is_marker = kinds != 0
    return at[is_marker], kinds[is_marker]


def _ceil(number: int, step: int) -> int:
    return -(-number // step)
