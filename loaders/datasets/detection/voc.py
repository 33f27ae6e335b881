"""Pascal VOC: an XML file per picture."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import numpy as np

from loaders.datasets.detection.dataset import DetectionDataset
from loaders.datasets.detection.plain_xml import read_plain_xml
from loaders.datasets.detection.problems import EntryError, OnBad, Problems, checked_on_bad
from loaders.datasets.detection.table import MOST, MOST_SIDE, AnnotationsBuilder, checked_classes, shown
from loaders.errors import DatasetError, DecodeError
from loaders.images.decode import EXTENSIONS, image_size, printable

_FLAGS = ("difficult", "truncated")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocDetection(DetectionDataset):
    """Boxes of a Pascal VOC folder: `VocDetection("VOCdevkit/VOC2012", "train")`.

    Reads `Annotations/*.xml`; the pictures are the files of the same names in `JPEGImages`. VOC counts pixels from 1,
    and a box includes its last pixel: such a box of one pixel, (1, 1, 1, 1), becomes (0, 0, 1, 1).

    Args:
        root: the folder with `Annotations` and `JPEGImages`.
        split: the name of a list in `ImageSets/Main`, such as "train"; None for all files in `Annotations`.
        transform: sample → sample, applied to the dict, such as `Albumentations`.
        classes: the names by label; None takes those found in all of `Annotations`, whatever the split, sorted.
        extras: further columns: "difficult" and "truncated".
        from_one: False if the tool that wrote the files counts pixels from 0 and a box ends at its right edge.
        on_bad: "error" refuses files with entries that cannot be used: a missing picture, an unknown class, damaged
            XML. "drop" leaves these out and counts them. Boxes that exceed their picture are clipped, and boxes without
            area in it left out, either way.

    Attributes:
        classes: the names by label.
        paths, annotations, problems, ragged_fields: as in `CocoDetection`.

    Sample:
        {"image": uint8 (H, W, 3) RGB, upright; "boxes": float32 (N, 4), left, top, right, bottom in pixels; "labels":
        int64 (N,); the extras: uint8 (N,)}

    Raises:
        DatasetError: the folder, a list or its pictures are missing, or there are entries that cannot be used.
        ValueError: `extras` or `on_bad` is unknown.
        DecodeError, FieldShapeError: on reading; the picture is damaged, or has another size than its annotations.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        extras: Sequence[str] = (),
        from_one: bool = True,
        on_bad: OnBad = "error",
    ) -> None:
        if isinstance(extras, str) or not set(extras) <= set(_FLAGS):
            raise ValueError(f"extras={extras!r}: expected some of {', '.join(map(repr, _FLAGS))}.")
        problems = Problems()
        reader = _Reader(os.fspath(root), problems, from_one)
        chosen = sorted(reader.annotated) if split is None else _split(os.fspath(root), split)
        files = {stem: file for stem in dict.fromkeys(chosen) if (file := reader.read(stem)) is not None}
        classes = checked_classes(classes) if classes is not None else sorted(reader.names_in_all(files))
        labels = {name: label for label, name in enumerate(classes)}
        builder = AnnotationsBuilder(problems, extras=dict.fromkeys(extras, np.uint8))
        paths = [path for stem, file in files.items() if (path := reader.add(stem, file, labels, extras, builder))]
        if checked_on_bad(on_bad) == "error":
            problems.refuse()
        if not paths:
            raise DatasetError(f'"{printable(os.fspath(root))}" has no picture that can be used: {problems!r}.')
        super().__init__(root, paths, builder.build(), classes, problems, transform)


class _Box(NamedTuple):
    entry: str
    name: str
    corners: tuple[float, float, float, float]
    flags: dict[str, int]


class _File(NamedTuple):
    """One XML file; the size is that of its picture, 0 if it has none. `classes` are those of all its objects."""

    name: str
    picture: str
    width: int
    height: int
    boxes: list[_Box]
    classes: set[str]


class _Reader:
    """Reads the files of one folder."""

    def __init__(self, root: str, problems: Problems, from_one: bool) -> None:
        self._annotations, self._images = (os.path.join(root, name) for name in ("Annotations", "JPEGImages"))
        self.annotated = _by_stem(self._annotations, (".xml",))
        self._pictures = _by_stem(self._images, EXTENSIONS)
        self._problems = problems
        self._before = float(from_one)

    def read(self, stem: str) -> _File | None:
        """The content of a file; None if it cannot be used, which is counted."""
        name = printable(os.path.join(self._annotations, f"{stem}.xml"))
        if stem not in self.annotated:
            self._problems.add("missing annotations", name, "", "the file does not exist")
            return None
        try:
            root = _annotation(os.path.join(self._annotations, self.annotated[stem][0]))
            width, height = (_side(root.findtext(f"size/{side}")) for side in ("width", "height"))
        except (OSError, ValueError, EntryError) as error:
            self._problems.add("malformed entry", name, "", getattr(error, "strerror", None) or str(error))
            return None
        boxes = []
        for number, element in enumerate(root.findall("object")):
            entry = f"object {number}"
            try:
                boxes.append(self._box(element, entry))
            except EntryError as error:
                self._problems.add(error.kind, name, entry, str(error))
        return _File(name, (root.findtext("filename") or "").strip(), width, height, boxes, _classes_in(root))

    def names_in_all(self, files: dict[str, _File]) -> set[str]:
        """The names in all files, also those of other splits: a label means the same in each split."""
        names = {name for file in files.values() for name in file.classes}
        for stem, (file, *_) in self.annotated.items():
            if stem not in files:
                try:
                    names |= _classes_in(_annotation(os.path.join(self._annotations, file)))
                except (OSError, ValueError):
                    continue  # counted by the dataset that reads it
        return names

    def add(
        self, stem: str, file: _File, labels: dict[str, int], extras: Sequence[str], builder: AnnotationsBuilder
    ) -> str | None:
        """Add a picture and its boxes; returns its path, None if it does not exist, which is counted."""
        found = self._pictures.get(stem, [])
        picture = file.picture if file.picture in found else "".join(found[:1])
        path = os.path.join(self._images, picture)
        width, height = file.width, file.height
        try:
            if not found or (len(found) > 1 and picture != file.picture):
                several = (
                    f"several pictures, {', '.join(found)}, and filename is none of them" if found else "no picture"
                )
                raise EntryError(f'"{printable(self._images)}" has {several} for "{printable(stem)}"')
            if not (width and height):
                width, height = image_size(path)
        except (DecodeError, EntryError) as error:
            self._problems.add("missing image", file.name, "", str(error))
            return None
        builder.begin(width, height)
        for box in file.boxes:
            try:
                if box.name not in labels:
                    raise EntryError(f"the class {shown(box.name)} is unknown", "unknown category")
                flags = [box.flags[name] for name in extras]
                builder.add((file.name, box.entry), box.corners, labels[box.name], extras=flags)
            except EntryError as error:
                self._problems.add(error.kind, file.name, box.entry, str(error))
        return path

    def _box(self, element: Element, entry: str) -> _Box:
        name = (element.findtext("name") or "").strip()
        if not name:
            raise EntryError("it has no name")
        left, top, right, bottom = (_number(element.findtext(f"bndbox/{corner}"), corner) for corner in _CORNERS)
        flags = {flag: _flag(element.findtext(flag), flag) for flag in _FLAGS}
        return _Box(entry, name, (left - self._before, top - self._before, right, bottom), flags)


def _annotation(file: str) -> Element:
    root = read_plain_xml(file)
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag[:40]}>; expected <annotation>")
    return root


def _classes_in(root: Element) -> set[str]:
    return {name for each in root.findall("object") if (name := (each.findtext("name") or "").strip())}


def _number(text: str | None, name: str) -> float:
    try:
        value = float(text if text is not None and text.isascii() and "_" not in text else "")
    except ValueError:
        value = math.nan
    if not -MOST < value < MOST:  # NaN is neither
        raise EntryError(f"{name} is {'missing' if text is None else shown(text)}; expected a number of pixels")
    return value


def _side(text: str | None) -> int:
    """A side of the picture in pixels; 0 if there is none."""
    value = _number(text or "0", "a side of the picture")
    if value != int(value) or not 0 <= value <= MOST_SIDE:
        raise EntryError(f"a side of the picture is {shown(text)}; expected a whole number to {MOST_SIDE:,}")
    return int(value)


def _flag(text: str | None, name: str) -> int:
    value = (text or "").strip() or "0"
    if value not in ("0", "1"):
        # Some tools write "Unspecified", and mean that nobody looked.
        if value.lower() in ("unspecified", "false", "true"):
            return int(value.lower() == "true")
        raise EntryError(f"{name} is {shown(text)}; expected 0 or 1")
    return int(value)


def _by_stem(folder: str, extensions: Sequence[str]) -> dict[str, list[str]]:
    """Name without ending → names of files, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(
            f'"{printable(folder)}" cannot be listed: {error.strerror}; a VOC folder has Annotations and JPEGImages.'
        ) from error
    found: dict[str, list[str]] = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() in extensions:
            found.setdefault(stem, []).append(name)
    return found


def _split(root: str, split: str) -> list[str]:
    """The names in a list; lists of a single class have a second column, which says whether it is in the picture."""
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            return [line.split()[0] for line in lines if line.strip()]
    except (OSError, ValueError) as error:  # a NUL in the name
        raise DatasetError(f'"{printable(path)}", the list of the split, cannot be read: {error}.') from error
