"""Outlines and run lengths of objects, packed in arrays; masks are made of them when a sample is read.

A polygon's mask is that of pycocotools, bit for bit: its corners are rounded to fifths of a pixel, its edges drawn as
digital lines on that finer grid, and a pixel is inside if an odd number of edges passes above it in the middle of its
column. (`cv2.fillPoly` also fills the pixels that an edge only touches.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

Int64s = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.uint8]]

FINER = 5  # steps of the finer grid per pixel
_MIDDLE = FINER // 2  # of a pixel, in such steps


class Segments:
    """The outlines or run lengths of N objects. An object has polygons, of which the union counts, or runs.

    Args:
        polygons: int64 (N + 1,): the polygons of object n are `polygons[n]` to `polygons[n + 1]`.
        corners: int64 (P + 1,): likewise, the corners of each polygon.
        points: (Q, 2), x and y of each corner: int32 in fifths of a pixel, or float32 as shares of the picture's size.
        run_ends: int64 (N + 1,): likewise, the runs of each object.
        runs: uint32 (R,), as in `run_lengths`.
    """

    def __init__(
        self,
        polygons: Int64s,
        corners: Int64s,
        points: np.ndarray[Any, Any],
        run_ends: Int64s,
        runs: np.ndarray[Any, np.dtype[np.uint32]],
    ) -> None:
        self.polygons, self.corners, self.points = polygons, corners, points
        self.run_ends, self.runs = run_ends, runs

    def masks(self, start: int, stop: int, width: int, height: int) -> Mask:
        """The masks of objects `start` to `stop`, in a picture of `width` by `height` pixels.

        Returns:
            uint8 (stop - start, height, width): 1 inside, 0 outside.
        """
        masks: Mask = np.zeros((stop - start, height, width), np.uint8)
        for mask, number in zip(masks, range(start, stop), strict=True):
            for polygon in range(self.polygons[number], self.polygons[number + 1]):
                points = self.points[self.corners[polygon] : self.corners[polygon + 1]]
                if points.dtype != np.int32:
                    points = to_fifths(points.astype(np.float64) * (width, height))
                _fill(mask, _crossings(points, width, height))
            runs = self.runs[self.run_ends[number] : self.run_ends[number + 1]]
            _fill(mask, np.cumsum(runs, dtype=np.int64)[: len(runs) // 2 * 2])
        return masks

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(each.nbytes for each in (self.polygons, self.corners, self.points, self.run_ends, self.runs))


class SegmentsBuilder:
    """Collects the outlines of objects, one after another.

    Args:
        is_normalized: whether coordinates are shares of the picture's size instead of pixels.
    """

    def __init__(self, is_normalized: bool) -> None:
        self._is_normalized = is_normalized
        self._points: array[Any] = array("f" if is_normalized else "i")
        self._runs = array("I")
        self._polygons, self._corners, self._run_ends = array("q", [0]), array("q", [0]), array("q", [0])

    def add(self, polygons: Sequence[Sequence[float]], runs: Int64s | None = None) -> None:
        """Add an object: flat lists x, y, x, y, …, or the runs of its mask."""
        for polygon in polygons:
            if self._is_normalized:
                self._points.extend(polygon)
            else:
                self._points.frombytes(to_fifths(np.array(polygon, np.float64)).tobytes())
            self._corners.append(len(self._points) // 2)
        if runs is not None:
            self._runs.frombytes(runs.astype(np.uint32).tobytes())
        self._polygons.append(len(self._corners) - 1)
        self._run_ends.append(len(self._runs))

    def build(self) -> Segments:
        """All of them, packed."""
        points = np.array(self._points, np.float32 if self._is_normalized else np.int32).reshape(-1, 2)
        ends = (np.array(each, np.int64) for each in (self._polygons, self._corners, self._run_ends))
        polygons, corners, run_ends = ends
        return Segments(polygons, corners, points, run_ends, np.array(self._runs, np.uint32))


def to_fifths(pixels: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Coordinates on the finer grid, rounded half up, below zero towards it."""
    fifths = (FINER * pixels + 0.5).astype(np.int32)  # the cast cuts off the fraction
    return fifths


def _crossings(points: np.ndarray[Any, np.dtype[np.int32]], width: int, height: int) -> Int64s:
    """Where the outline crosses the middle of columns: sorted places of pixels, counted column by column."""
    x, y = points[:, 0].astype(np.int64), points[:, 1].astype(np.int64)
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    # The columns whose middle, between steps 5 n + 2 and 5 n + 3, an edge passes.
    first = np.maximum(-((_MIDDLE - np.minimum(x, next_x)) // FINER), 0)
    last = np.minimum((np.maximum(x, next_x) - _MIDDLE - 1) // FINER, width - 1)
    count = np.maximum(last - first + 1, 0)
    edge = np.repeat(np.arange(len(x)), count)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    x, y, next_x, next_y = x[edge], y[edge], next_x[edge], next_y[edge]
    is_flat = abs(next_x - x) >= abs(next_y - y)
    # A digital line is computed from its end with the smaller x, or y if it is steep.
    turned = np.where(is_flat, x > next_x, y > next_y)
    x, next_x = np.where(turned, next_x, x), np.where(turned, x, next_x)
    y, next_y = np.where(turned, next_y, y), np.where(turned, y, next_y)
    step = column * FINER + _MIDDLE
    top = np.empty(len(edge), np.int64)
    for which, of in ((is_flat, _of_flat), (~is_flat, _of_steep)):
        top[which] = of(x[which], y[which], next_x[which], next_y[which], step[which])
    row = np.clip(-((_MIDDLE - top) // FINER), 0, height)
    places: Int64s = np.sort(column * height + row)
    return places


def _of_flat(x: Int64s, y: Int64s, next_x: Int64s, next_y: Int64s, step: Int64s) -> Int64s:
    """The upper one of the points of a line in the columns `step` and `step + 1`."""
    slope = (next_y - y) / (next_x - x)
    here, there = ((y + slope * (step - x + more) + 0.5).astype(np.int64) for more in (0, 1))
    upper: Int64s = np.minimum(here, there)
    return upper


def _of_steep(x: Int64s, y: Int64s, next_x: Int64s, next_y: Int64s, step: Int64s) -> Int64s:
    """The last point of a line, from above, before it changes between the columns `step` and `step + 1`."""
    slope = (next_x - x) / (next_y - y)
    rows = np.floor((step + 0.5 - x) / slope).astype(np.int64) - 1
    for _ in range(3):  # the estimate may be off by one in either direction
        rows += ((x + slope * rows + 0.5).astype(np.int64) > step) != (slope > 0)
    return y + rows - 1


def _fill(mask: Mask, turns: Int64s) -> None:
    """Set the pixels from each even one of `turns` to the next: places counted column by column."""
    if not len(turns) or turns[0] == turns[-1]:
        return
    height = len(mask)
    left, right = turns[0] // height, (turns[-1] - 1) // height + 1
    lengths = np.diff(turns, prepend=left * height, append=right * height)
    inside = np.zeros(len(lengths), np.uint8)
    inside[1::2] = 1
    mask[:, left:right] |= np.repeat(inside, lengths).reshape(right - left, height).T
