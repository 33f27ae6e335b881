"""The annotations of all pictures in a few arrays.

A list of a million dicts is ten million objects, and reading one writes its reference count: in a forked worker that
copies the page it is on, so each worker comes to hold all of them. The arrays contain no objects.
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loaders.datasets.detection.problems import CLIPPED, EMPTY, KEYPOINT_OUTSIDE, OUTSIDE, EntryError, Problems
from loaders.datasets.detection.segments import Int64s, Segments, SegmentsBuilder

# Coordinates and sides beyond these are damage; below them, no integer below overflows.
MOST = float(1 << 26)
MOST_SIDE = (1 << 16) - 1
# A box may exceed the picture by this much without being counted: files round to two digits, and YOLO's shares to six.
_ROUNDING = 0.01
_ROUNDING_OF_SHARES = 1e-5
_NUMBERS = {int, float}
# Bounded in every direction: aliases of YAML make lists that would be gigabytes in full.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong = 2, 8, 4, 60, 60


class Annotations:
    """Boxes of all pictures, one row each, in the order of the pictures.

    Attributes:
        offsets: int64 (pictures + 1,): the rows of picture i are `offsets[i]` to `offsets[i + 1]`.
        boxes: float32 (N, 4): left, top, right, bottom in pixels, where pixel (0, 0) covers the square from 0 to 1; or
            as shares of the picture's size, if `is_normalized`.
        labels: int64 (N,).
        sizes: int32 (pictures, 2), width and height that the annotations are for; None if any size will do.
        is_normalized: whether coordinates are shares of the picture's size.
        keypoints: float32 (N, K, 3): x, y and visibility; None without keypoints.
        segments: outlines and run lengths; None without masks.
        extras: name → array with a row per box.
    """

    def __init__(
        self,
        offsets: Int64s,
        boxes: np.ndarray[Any, np.dtype[np.float32]],
        labels: Int64s,
        sizes: np.ndarray[Any, np.dtype[np.int32]] | None,
        keypoints: np.ndarray[Any, np.dtype[np.float32]] | None,
        segments: Segments | None,
        extras: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        self.offsets, self.boxes, self.labels, self.sizes = offsets, boxes, labels, sizes
        self.keypoints, self.segments, self.extras = keypoints, segments, dict(extras)

    @property
    def is_normalized(self) -> bool:
        """Whether coordinates are shares of the picture's size."""
        return self.sizes is None

    def __len__(self) -> int:
        return len(self.boxes)

    def fields_of(self, picture: int, width: int, height: int) -> dict[str, np.ndarray[Any, Any]]:
        """The fields of one picture of `width` by `height` pixels, as arrays of its own."""
        start, stop = self.offsets[picture : picture + 2].tolist()
        boxes = self.boxes[start:stop].copy()
        if self.is_normalized:
            boxes *= np.array([width, height, width, height], np.float32)
        fields: dict[str, np.ndarray[Any, Any]] = {"boxes": boxes, "labels": self.labels[start:stop].copy()}
        if self.segments is not None:
            fields["masks"] = self.segments.masks(start, stop, width, height)
        if self.keypoints is not None:
            points = self.keypoints[start:stop].copy()
            if self.is_normalized:
                points[..., :2] *= np.array([width, height], np.float32)
            count = points.shape[1]
            owner = np.stack([np.repeat(np.arange(stop - start), count), np.tile(np.arange(count), stop - start)], 1)
            rows = np.arange(stop - start)
            fields |= {"keypoints": points.reshape(-1, 3), "keypoint_labels": owner, "rows": rows}
        return fields | {name: rows[start:stop].copy() for name, rows in self.extras.items()}

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        arrays = [self.offsets, self.boxes, self.labels, self.sizes, self.keypoints, *self.extras.values()]
        return sum(each.nbytes for each in arrays if each is not None) + (self.segments.nbytes if self.segments else 0)


class AnnotationsBuilder:
    """Fills the table, picture after picture; boxes are clipped to the picture, and those without area left out.

    Args:
        problems: where these are counted.
        is_normalized: whether coordinates are shares of the picture's size.
        keypoints: how many an object has; None for a table without keypoints.
        masks: whether objects have outlines or run lengths.
        extras: name → dtype of the further columns.
    """

    def __init__(
        self,
        problems: Problems,
        *,
        is_normalized: bool = False,
        keypoints: int | None = None,
        masks: bool = False,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self._problems = problems
        self._is_normalized = is_normalized
        self._keypoint_count = keypoints
        self._offsets, self._sizes = array("q", [0]), array("i")
        self._boxes, self._labels, self._keypoints = array("f"), array("q"), array("f")
        self._segments = SegmentsBuilder(is_normalized) if masks else None
        self._extras = {name: (np.dtype(dtype), list[Any]()) for name, dtype in (extras or {}).items()}
        self._limits = (1.0, 1.0)

    def begin(self, width: int, height: int) -> None:
        """Begin the boxes of a picture, of this size in pixels; the sizes of normalised ones are not kept."""
        if not self._is_normalized:
            self._sizes.extend((width, height))
            self._limits = (float(width), float(height))
        self._offsets.append(self._offsets[-1])

    def add(
        self,
        where: tuple[str, str],
        box: tuple[float, float, float, float],
        label: int,
        *,
        polygons: Sequence[Sequence[float]] = (),
        runs: Int64s | None = None,
        keypoints: Sequence[float] = (),
        extras: Sequence[Any] = (),
    ) -> None:
        """Add a box to the picture begun last.

        Args:
            where: file and entry, for `problems`.
            box: left, top, right, bottom, finite.
            label: its class.
            polygons, runs: its outline, as `SegmentsBuilder.add` takes them.
            keypoints: x, y, visibility of each.
            extras: the values of the further columns, in their order.

        Raises:
            EntryError: right is left of left, or bottom above top.
        """
        left, top, right, bottom = box
        width, height = self._limits
        if right < left or bottom < top:
            raise EntryError(f"the box {_told(box)} has a negative width or height")
        inside = (
            min(max(left, 0.0), width),
            min(max(top, 0.0), height),
            min(max(right, 0.0), width),
            min(max(bottom, 0.0), height),
        )
        packed = array("f", inside)  # two numbers that differ may be one as float32
        if packed[2] <= packed[0] or packed[3] <= packed[1]:
            was_empty = right == left or bottom == top
            size = "the picture" if self._is_normalized else f"the picture of {width:g} x {height:g} pixels"
            self._problems.add(
                EMPTY if was_empty else OUTSIDE,
                *where,
                f"the box {_told(box)} has no area{'' if was_empty else f' inside {size}'}; it is left out",
            )
            return
        beyond = _ROUNDING_OF_SHARES if self._is_normalized else _ROUNDING
        if inside != box and max(-left, -top, right - width, bottom - height) > beyond:
            self._problems.add(CLIPPED, *where, f"the box {_told(box)} is clipped to the picture, {_told(inside)}")
        self._boxes.extend(packed)
        self._labels.append(label)
        if self._segments is not None:
            self._segments.add(polygons, runs)
        if self._keypoint_count is not None:
            self._add_keypoints(where, keypoints)
        for (_, values), value in zip(self._extras.values(), extras, strict=True):
            values.append(value)
        self._offsets[-1] += 1

    def _add_keypoints(self, where: tuple[str, str], keypoints: Sequence[float]) -> None:
        """Add the keypoints of a box; one outside the picture becomes (0, 0, 0), COCO's "not labelled"."""
        points = array("f", keypoints)  # compared as they are kept
        width, height = array("f", self._limits)
        for at in range(0, len(points), 3):
            x, y = points[at : at + 2]
            if not (0 <= x < width and 0 <= y < height):
                self._problems.add(KEYPOINT_OUTSIDE, *where, f"keypoint {at // 3}, ({x:g}, {y:g}), is left out")
                points[at : at + 3] = array("f", (0, 0, 0))
        self._keypoints.extend(points)

    def build(self) -> Annotations:
        """The table."""
        count = self._keypoint_count
        return Annotations(
            np.array(self._offsets, np.int64),
            np.array(self._boxes, np.float32).reshape(-1, 4),
            np.array(self._labels, np.int64),
            None if self._is_normalized else np.array(self._sizes, np.int32).reshape(-1, 2),
            None if count is None else np.array(self._keypoints, np.float32).reshape(-1, count, 3),
            None if self._segments is None else self._segments.build(),
            {name: np.array(values, dtype) for name, (dtype, values) in self._extras.items()},
        )


def numbers(values: object, name: str, count: int | None = None, most: float = MOST) -> list[Any]:
    """A list of finite numbers, none of them larger than `most`.

    Raises:
        EntryError: it is not one, or does not have `count` of them; the message shows the value.
    """
    if not isinstance(values, list) or not set(map(type, values)) <= _NUMBERS:
        raise EntryError(f"{name} is {shown(values)}; expected {_wanted(count)}")
    if count is not None and len(values) != count:
        raise EntryError(f"{name} has {len(values):,} numbers: {shown(values)}; expected {count}")
    if values and not (_is_finite(values) and -most < min(values) and max(values) < most):
        raise EntryError(f"{name} is {shown(values)}; expected finite numbers below {most:,.0f}")
    return values


def whole_number(value: object, name: str, least: int, most: int) -> int:
    """A whole number from `least` to `most`.

    Raises:
        EntryError: it is not one.
    """
    if type(value) is not int or not least <= value <= most:
        raise EntryError(f"{name} is {shown(value)}; expected a whole number from {least} to {most:,}")
    return value


def checked_classes(classes: Sequence[str]) -> list[str]:
    """The argument `classes` as a list.

    Raises:
        TypeError: it is one name.
    """
    if isinstance(classes, str):
        raise TypeError(f"classes is one name, {classes!r}; expected a list of names.")
    return list(classes)


def _is_finite(values: list[Any]) -> bool:
    try:
        return math.isfinite(sum(values))  # NaN and infinities remain in a sum
    except OverflowError:  # an int that no float can hold
        return False


def _wanted(count: int | None) -> str:
    return "a list of numbers" if count is None else f"a list of {count} numbers"


def shown(value: object) -> str:
    """A value of a file, for messages: its beginning, if it is long."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an int of thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} …"


def _told(box: Sequence[float]) -> str:
    return f"({', '.join(f'{each:g}' for each in box)})"
