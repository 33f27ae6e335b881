"""Where a YOLO folder has its pictures, and what its classes are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from loaders.datasets.detection.found import files_below
from loaders.datasets.detection.table import checked_classes, shown
from loaders.errors import DatasetError
from loaders.images.decode import printable

_DESCRIPTIONS = ("data.yaml", "dataset.yaml", "data.yml")
_MOST_NBYTES = 1 << 24  # of a description
_MOST_CLASSES = 1 << 20
_SPLITS = {"val": ("val", "valid"), "valid": ("valid", "val")}


class YoloFolder(NamedTuple):
    """What a YOLO folder holds.

    Attributes:
        images: the paths of its pictures, sorted by folder.
        classes: names by number.
        is_listed: whether a list names the pictures of the split.
        keypoints: how many an object has, and the numbers of each, 2 or 3; None for boxes and outlines.
    """

    images: list[str]
    classes: list[str]
    is_listed: bool
    keypoints: tuple[int, int] | None


def read_yolo_folder(
    root: str | os.PathLike[str], split: str | None, classes: Sequence[str] | None = None
) -> YoloFolder:
    """Find the pictures of one split, and the names of the classes.

    Args:
        root: the folder, or its description.
        split: as named in the description; None for all pictures in `images`.
        classes: the names, instead of those in the description.

    Raises:
        DatasetError: something is missing, or the description is not one.
    """
    top, file = _described(os.fspath(root))
    description = {} if file is None else _read(file)
    name = printable(file or os.fspath(root))
    if classes is None:
        if file is None:
            raise DatasetError(
                f'"{name}" has no {_DESCRIPTIONS[0]}, so the names of its classes are unknown.\n  Pass classes=.'
            )
        names = _names(description.get("names"), name)
    else:
        names = checked_classes(classes)
    places = _places(top, description, split, name)
    images = []
    for place in places:
        try:
            images += _listed(place) if place.endswith(".txt") else files_below(place)
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f'"{printable(place)}" cannot be read: {error}.') from error
    is_listed = any(place.endswith(".txt") for place in places)
    return YoloFolder(images, names, is_listed, _keypoint_shape(description.get("kpt_shape"), name))


def _described(root: str) -> tuple[str, str | None]:
    """The folder, and its description if there is one."""
    if os.path.isfile(root):
        return os.path.dirname(root) or ".", root
    if not os.path.isdir(root):
        raise DatasetError(f'"{printable(root)}" is neither a folder nor a description such as {_DESCRIPTIONS[0]}.')
    found = [os.path.join(root, name) for name in _DESCRIPTIONS if os.path.isfile(os.path.join(root, name))]
    return root, found[0] if found else None


def _read(file: str) -> dict[str, Any]:
    import yaml

    name = printable(file)
    try:
        with open(file, "rb") as opened:
            text = opened.read(_MOST_NBYTES)
        # The loader for plain data: it makes no objects of classes, and an alias is the same object, not a copy.
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise DatasetError(f'"{name}" cannot be read as YAML: {what}.') from error
    if not isinstance(content, dict):
        raise DatasetError(f'"{name}" holds a {type(content).__name__}; expected names, train and val.')
    return content


def _names(names: object, name: str) -> list[str]:
    if isinstance(names, dict) and names and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(names) > _MOST_CLASSES:
        raise DatasetError(f'"{name}": names is {_brief(names)}; expected a list, or a mapping from 0, 1, 2 … on.')
    for each in names:
        if isinstance(each, bool):  # YAML 1.1 reads yes, no, on and off as these
            raise DatasetError(f'"{name}": names has {each}; put the name in quotes.')
        if not isinstance(each, (str, int, float)):
            raise DatasetError(f'"{name}": names has {_brief(each)}; expected a text for each class.')
    return [str(each) for each in names]


def _keypoint_shape(shape: object, name: str) -> tuple[int, int] | None:
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and all(type(each) is int for each in shape):
        count, columns = shape
        if 0 < count < _MOST_CLASSES and columns in (2, 3):
            return count, columns
    raise DatasetError(f'"{name}": kpt_shape is {_brief(shape)}; expected [how many, 2 or 3].')


def _places(top: str, description: dict[str, Any], split: str | None, name: str) -> list[str]:
    """The folders of pictures, or lists of them, of a split."""
    if split is None:
        folder = os.path.join(_base(top, description), "images")
        if os.path.isdir(folder):
            return [folder]
        raise DatasetError(f'"{printable(folder)}" is not a folder.\n  Pass split=, such as "train".')
    entries = description.get(split)
    if entries is None:
        tried = [
            os.path.join(top, *parts)
            for each in _SPLITS.get(split, (split,))
            for parts in (("images", each), (each, "images"))
        ]
        found = [folder for folder in tried if os.path.isdir(folder)]
        if not found:
            where = " and ".join(f'"{printable(folder)}"' for folder in tried[:2])
            raise DatasetError(f'"{name}" says nothing of the split {split!r}, and there is no {where}.')
        return found[:1]
    entries = entries if isinstance(entries, list) else [entries]
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise DatasetError(f'"{name}": {split} is {_brief(entries)}; expected a path, or a list of paths.')
    return [_existing(entry, top, _base(top, description), name) for entry in entries]


def _base(top: str, description: dict[str, Any]) -> str:
    """The folder that the paths of a description are relative to."""
    path = description.get("path")
    base = os.path.join(top, path) if isinstance(path, str) else top
    return base if os.path.isdir(base) else top  # many name a folder on the machine that wrote them


def _existing(entry: str, top: str, base: str, name: str) -> str:
    # Descriptions from Roboflow say ../train/images and mean train/images.
    for path in (os.path.join(base, entry), os.path.join(top, entry.removeprefix("../"))):
        if "\0" not in path and os.path.exists(path):
            return path
    raise DatasetError(f'"{name}": "{printable(entry)}" does not exist in "{printable(base)}".')


def _listed(file: str) -> list[str]:
    """The pictures of a list; its paths are relative to its folder."""
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        paths = [line.strip() for line in lines if line.strip()]
    return [os.path.normpath(os.path.join(os.path.dirname(file), path)) for path in paths]


def _brief(value: object) -> str:
    return "missing" if value is None else shown(value)
