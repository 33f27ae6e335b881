"""Rectangles of a picture: in upright coordinates, as stored in the file, and at a reduced scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np

# What turns a stored picture upright, by EXIF orientation (EXIF 2.3, tag 274): whether to swap rows and columns first,
# then reverse the rows, then reverse the columns.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# The orientation that undoes another: quarter turns undo each other, all else undoes itself.
_UNDOES = {6: 8, 8: 6}


class Region(NamedTuple):
    """A rectangle of pixels; (0, 0) is the picture's upper left corner."""

    left: int
    top: int
    width: int
    height: int

    def is_inside(self, width: int, height: int) -> bool:
        """Whether it has pixels, and all of them lie in a picture of width by height."""
        return (
            min(self.left, self.top) >= 0
            and min(self.width, self.height) > 0
            and self.left + self.width <= width
            and self.top + self.height <= height
        )

    def stored(self, width: int, height: int, orientation: int) -> Region:
        """The same pixels as stored in the file; self is a region of the upright picture of `width` by `height`."""
        left, top = self.left, self.top
        swapped, rows_reversed, columns_reversed = _TURNS[orientation]
        if rows_reversed:
            top = height - top - self.height
        if columns_reversed:
            left = width - left - self.width
        return Region(top, left, self.height, self.width) if swapped else Region(left, top, self.width, self.height)

    def upright(self, width: int, height: int, orientation: int) -> Region:
        """The same pixels of the upright picture; self is a region of the stored one of `width` by `height` pixels."""
        return self.stored(width, height, _UNDOES.get(orientation, orientation))

    def reduced(self, scale: int) -> Region:
        """The pixels of the picture at 1/scale that touch self: each stands for a block of scale by scale pixels."""
        left, top = self.left // scale, self.top // scale
        right, bottom = -(-(self.left + self.width) // scale), -(-(self.top + self.height) // scale)
        return Region(left, top, right - left, bottom - top)

    def of(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The pixels: a view into the picture."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]


def around(regions: Iterable[tuple[int, int, int, int]]) -> Region:
    """The smallest region that holds all of some."""
    lefts, tops, widths, heights = zip(*regions, strict=True)
    left, top = min(lefts), min(tops)
    right, bottom = max(map(sum, zip(lefts, widths, strict=True))), max(map(sum, zip(tops, heights, strict=True)))
    return Region(left, top, right - left, bottom - top)


def turn_upright(stored: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """A stored picture, or a part of one, turned upright."""
    swapped, rows_reversed, columns_reversed = _TURNS[orientation]
    if swapped:
        stored = cv2.transpose(stored)
    if rows_reversed or columns_reversed:
        stored = cv2.flip(stored, -1 if rows_reversed and columns_reversed else int(columns_reversed))
    return stored


def shrink(picture: np.ndarray[Any, Any], region: Region, scale: int) -> np.ndarray[Any, Any]:
    """The region at 1/scale, each pixel the mean of a block; blocks that cross the edge are filled by repeating it.

    This matches the reduced scales of a JPEG, whose encoder fills its last blocks in the same way.
    """
    reduced = region.reduced(scale)
    blocks = Region(*(scale * side for side in reduced)).of(picture)
    below, beside = reduced.height * scale - blocks.shape[0], reduced.width * scale - blocks.shape[1]
    if below or beside:
        blocks = cv2.copyMakeBorder(blocks, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    return cv2.resize(blocks, (reduced.width, reduced.height), interpolation=cv2.INTER_AREA)
