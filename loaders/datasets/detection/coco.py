"""COCO annotations: one JSON file for a folder of pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from loaders.datasets.detection.dataset import DetectionDataset
from loaders.datasets.detection.found import ExistingFiles
from loaders.datasets.detection.problems import EntryError, OnBad, Problems, checked_on_bad
from loaders.datasets.detection.run_lengths import decode_counts
from loaders.datasets.detection.segments import Int64s
from loaders.datasets.detection.table import MOST_SIDE, AnnotationsBuilder, numbers, shown, whole_number
from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.decode.files import is_remote

_EXTRAS = {"iscrowd": np.uint8, "ids": np.int64, "areas": np.float32}
_MOST_ID = (1 << 63) - 1
_LEAST_ID = -(1 << 63)
_CORNERS = 6  # the numbers of a polygon, at least


class CocoDetection(DetectionDataset):
    """Boxes, masks and keypoints of a COCO file: `CocoDetection("train2017", "instances_train2017.json")`.

    The file is read once, when the dataset is made; after that the annotations are a few arrays, which forked workers
    share. A category's label is its place among the ids of all categories, sorted.

    Args:
        images: the folder of the pictures, or a URL for fsspec; `file_name` is a path below it.
        annotations: the JSON file.
        transform: sample → sample, applied to the dict, such as `Albumentations`.
        masks: whether samples have "masks".
        keypoints: whether samples have "keypoints".
        extras: further columns: "iscrowd", "ids" (of the annotations) and "areas". Crowds, one box around many objects,
            are left out unless "iscrowd" tells them apart.
        on_bad: "error" refuses a file with entries that cannot be used: a missing image, an unknown category or image,
            no mask where masks are wanted, numbers that are none. "drop" leaves these out and counts them. Boxes that
            exceed their picture are clipped, and boxes without area in it left out, either way.

    Attributes:
        classes: the names of the categories by label.
        category_ids: int64, the category of each label, to write results with.
        image_ids: int64, the image of each sample.
        keypoint_names: the names of an object's keypoints; empty without keypoints.
        skeleton: pairs of keypoints, counted from 0.
        paths, annotations, problems, ragged_fields: as in every detection dataset: the pictures, all boxes in one
            table, what was corrected or left out, and `fields=` for a DataLoader.

    Sample:
        {"image": uint8 (H, W, 3) RGB, upright; "boxes": float32 (N, 4), left, top, right, bottom in pixels (pixel
        (0, 0) covers the square from 0 to 1), which Albumentations calls "pascal_voc"; "labels": int64 (N,);
        "masks": uint8 (N, H, W), 1 inside, as pycocotools makes them, bit for bit; "keypoints": float32 (N * K, 3),
        x, y and visibility (0, 1, 2) of each object's K; "keypoint_labels": int64 (N * K, 2), the row of the box and
        the number of the keypoint; "rows": int64 (N,), 0 to N - 1, to match them after boxes were dropped; the extras:
        uint8, int64, float32 (N,); "image_id": int}. An image without objects
        has N = 0.

    Raises:
        DatasetError: the file is not COCO's JSON, has entries that cannot be used, or no image.
        ValueError: `extras` or `on_bad` is unknown.
        DecodeError, FieldShapeError: on reading; the picture is damaged, or has another size than its annotations.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        masks: bool = False,
        keypoints: bool = False,
        extras: Sequence[str] = (),
        on_bad: OnBad = "error",
    ) -> None:
        unknown = [name for name in extras if name not in _EXTRAS]
        if unknown or isinstance(extras, str):
            raise ValueError(f"extras={extras!r}: expected some of {', '.join(map(repr, _EXTRAS))}.")
        problems = Problems()
        reader = _Reader(os.fspath(images), annotations, problems, masks, keypoints, tuple(extras))
        found = reader.read()
        if checked_on_bad(on_bad) == "error":
            problems.refuse()
        if not found:
            raise DatasetError(f'"{reader.name}" has no image that can be used: {problems!r}.')
        super().__init__(
            annotations,
            [image.path for image in found],
            reader.builder.build(),
            [category.name for category in reader.categories],
            problems,
            transform,
        )
        self.image_ids = np.array([image.id for image in found], np.int64)
        self.category_ids = np.array([category.id for category in reader.categories], np.int64)
        self.keypoint_names = reader.keypoint_names
        self.skeleton = reader.skeleton

    def _read(self, index: int) -> dict[str, Any]:
        return {**super()._read(index), "image_id": int(self.image_ids[index])}


class _Category(NamedTuple):
    id: int
    name: str
    entry: Mapping[str, Any]


class _Image(NamedTuple):
    id: int
    path: str
    width: int
    height: int


class _Reader:
    """Reads one file into a table."""

    def __init__(
        self,
        folder: str,
        file: str | os.PathLike[str],
        problems: Problems,
        masks: bool,
        keypoints: bool,
        extras: tuple[str, ...],
    ) -> None:
        self.name = printable(os.fspath(file))
        self._folder = folder
        self._problems = problems
        self._masks = masks
        self._extras = extras
        self._content = _loaded(file, self.name)
        self.categories = sorted(self._all_categories(), key=lambda category: category.id)
        self._labels = {category.id: label for label, category in enumerate(self.categories)}
        self.keypoint_names: list[str] = []
        self.skeleton: list[tuple[int, int]] = []
        if keypoints:
            self._read_keypoint_names()
        self.builder = AnnotationsBuilder(
            problems,
            keypoints=len(self.keypoint_names) if keypoints else None,
            masks=masks,
            extras={name: _EXTRAS[name] for name in extras},
        )

    def read(self) -> list[_Image]:
        """Fill the table; returns its images."""
        images, known = self._images()
        entries: dict[int, list[tuple[int, dict[str, Any]]]] = {image.id: [] for image in images}
        for number, entry in enumerate(self._list("annotations")):
            image = entry.get("image_id")
            if type(image) is int and image in entries:
                entries[image].append((number, entry))
            elif type(image) is not int or image not in known:  # those of missing images are counted with the image
                self._bad(_named("annotation", entry, number), f"there is no image {shown(image)}", "unknown image")
        for found in images:
            self.builder.begin(found.width, found.height)
            for number, entry in entries.pop(found.id):
                try:
                    self._add(entry, found, number)
                except EntryError as error:
                    self._bad(f"{_named('annotation', entry, number)} of image {found.id}", str(error), error.kind)
        return images

    def _images(self) -> tuple[list[_Image], set[int]]:
        """The images that exist, and the ids of all."""
        existing, known, images = ExistingFiles(), set[int](), list[_Image]()
        for number, entry in enumerate(self._list("images")):
            where = _named("image", entry, number)
            try:
                id = whole_number(entry.get("id"), "id", _LEAST_ID, _MOST_ID)
                if id in known:
                    raise DatasetError(f'"{self.name}": two images have the id {id}; their annotations would mix.')
                known.add(id)
                name = entry.get("file_name")
                if not isinstance(name, str) or not name or "\0" in name:
                    raise EntryError(f"file_name is {shown(name)}; expected a path")
                try:
                    os.fsencode(name)
                except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
                    raise EntryError(f"file_name is {shown(name)}; expected a path") from None
                width, height = (whole_number(entry.get(side), side, 1, MOST_SIDE) for side in ("width", "height"))
                path = f"{self._folder.rstrip('/')}/{name}" if is_remote(self._folder) else _join(self._folder, name)
                if path not in existing:
                    raise EntryError(f'"{printable(path)}" does not exist', "missing image")
            except EntryError as error:
                self._bad(where, str(error), error.kind)
                continue
            images.append(_Image(id, path, width, height))
        return images, known

    def _add(self, entry: dict[str, Any], image: _Image, number: int) -> None:
        is_crowd = whole_number(entry.get("iscrowd", 0), "iscrowd", 0, 1)
        if is_crowd and "iscrowd" not in self._extras:
            return
        category = entry.get("category_id")
        if type(category) is not int or category not in self._labels:
            raise EntryError(f"there is no category {shown(category)}", "unknown category")
        left, top, width, height = numbers(entry.get("bbox"), "bbox", 4)
        polygons, runs = self._segmentation(entry, image) if self._masks else ((), None)
        extras = []
        for name in self._extras:
            if name == "iscrowd":
                extras.append(is_crowd)
            elif name == "ids":
                extras.append(whole_number(entry.get("id"), "id", _LEAST_ID, _MOST_ID))
            else:
                extras.append(numbers([entry.get("area")], "area", 1, 1e30)[0])
        self.builder.add(
            (self.name, f"{_named('annotation', entry, number)} of image {image.id}"),
            (float(left), float(top), float(left + width), float(top + height)),
            self._labels[category],
            polygons=polygons,
            runs=runs,
            keypoints=self._keypoints(entry) if self.keypoint_names else (),
            extras=extras,
        )

    def _segmentation(self, entry: dict[str, Any], image: _Image) -> tuple[list[list[float]], Int64s | None]:
        segmentation = entry.get("segmentation")
        if not segmentation:
            raise EntryError("it has no segmentation", "no mask")
        if isinstance(segmentation, list):
            for polygon in segmentation:
                numbers(polygon, "a polygon")
                if len(polygon) < _CORNERS or len(polygon) % 2:
                    raise EntryError(f"a polygon has {len(polygon)} numbers; expected an even number, at least 6")
            return segmentation, None
        if not isinstance(segmentation, dict):
            raise EntryError(f"segmentation is {shown(segmentation)}; expected polygons or run lengths")
        size = segmentation.get("size")
        if size != [image.height, image.width]:
            raise EntryError(f"the size of the run lengths is {shown(size)}; expected {[image.height, image.width]}")
        try:
            return [], decode_counts(segmentation.get("counts"), image.height, image.width)
        except ValueError as error:
            raise EntryError(f"run lengths: {error}") from None

    def _keypoints(self, entry: dict[str, Any]) -> list[float]:
        count = 3 * len(self.keypoint_names)
        if entry.get("keypoints") is None:  # of an object without: none is labelled
            return [0.0] * count
        points = numbers(entry["keypoints"], "keypoints", count)
        if not set(points[2::3]) <= {0, 1, 2}:
            raise EntryError(f"the visibility of keypoints is {shown(points[2::3])}; expected 0, 1 or 2 for each")
        return points

    def _all_categories(self) -> Iterator[_Category]:
        known = set[int]()
        for number, entry in enumerate(self._list("categories")):
            id, name = entry.get("id"), entry.get("name")
            if type(id) is not int or not isinstance(name, str) or not _LEAST_ID <= id <= _MOST_ID or id in known:
                raise DatasetError(
                    f'"{self.name}", category {number} has the id {shown(id)} and the name {shown(name)}; expected '
                    "a whole number of its own and a text."
                )
            known.add(id)
            yield _Category(id, name, entry)

    def _read_keypoint_names(self) -> None:
        found = [each for each in self.categories if each.entry.get("keypoints")]
        for category in found:
            names, pairs = category.entry["keypoints"], category.entry.get("skeleton", [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DatasetError(f'"{self.name}", category {category.id}: keypoints is not a list of names.')
            if self.keypoint_names and names != self.keypoint_names:
                raise DatasetError(
                    f'"{self.name}": categories {found[0].id} and {category.id} have different keypoints; samples '
                    "need one list. Split the file by category."
                )
            self.keypoint_names = names
            try:
                ends = [(whole_number(a, "", 1, len(names)), whole_number(b, "", 1, len(names))) for a, b in pairs]
                self.skeleton = [(a - 1, b - 1) for a, b in ends]
            except (EntryError, TypeError, ValueError):
                raise DatasetError(
                    f'"{self.name}", category {category.id}: skeleton is {shown(pairs)}; expected pairs of keypoints, '
                    "counted from 1."
                ) from None
        if not self.keypoint_names:
            raise DatasetError(f'"{self.name}": no category has keypoints; leave keypoints= out.')

    def _list(self, key: str) -> list[dict[str, Any]]:
        found = self._content.get(key)
        if not isinstance(found, list):
            raise DatasetError(
                f'"{self.name}": {key!r} is {"missing" if found is None else f"a {type(found).__name__}"}; expected '
                'the lists "images", "annotations" and "categories" of a COCO file for detection.'
            )
        for number, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise DatasetError(f'"{self.name}": {key}[{number}] is {shown(entry)}; expected an object.')
        return found

    def _bad(self, entry: str, what: str, kind: str) -> None:
        self._problems.add(kind, self.name, entry, what)


def _loaded(file: str | os.PathLike[str], name: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            content = json.load(opened)
    except OSError as error:
        raise DatasetError(f'"{name}" cannot be read: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of too many digits
        raise DatasetError(f'"{name}" is not JSON, or cut short: {error}.') from error
    if not isinstance(content, dict):
        raise DatasetError(f'"{name}" holds a {type(content).__name__}; expected the object of a COCO file.')
    return content


def _join(folder: str, name: str) -> str:
    return os.path.join(folder, *name.split("/"))


def _named(kind: str, entry: Mapping[str, Any], number: int) -> str:
    id = entry.get("id")
    return f"{kind} {id}" if type(id) is int and abs(id) <= _MOST_ID else f"{kind} at place {number} of the list"
