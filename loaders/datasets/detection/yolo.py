"""YOLO folders: a text file of normalised boxes beside each picture's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from loaders.datasets.detection.dataset import DetectionDataset
from loaders.datasets.detection.found import read_small
from loaders.datasets.detection.problems import EntryError, OnBad, Problems, checked_on_bad
from loaders.datasets.detection.table import AnnotationsBuilder, shown
from loaders.datasets.detection.yolo_folder import YoloFolder, read_yolo_folder
from loaders.errors import DatasetError
from loaders.images.decode import printable

_MOST_NBYTES = 1 << 28  # of a label file; thousands of times the largest that anybody wrote
_MOST_SHARE = 1e4  # of the picture's size
_MOST_LABEL = float(1 << 53)
_BOX, _LEAST_OUTLINE = 4, 6  # numbers after the class


class YoloDetection(DetectionDataset):
    """Boxes, outlines and keypoints of a YOLO folder: `YoloDetection("coco8", "train")`.

    A picture's labels are in the text file of its name, with the last folder `images` of its path replaced by `labels`,
    or next to it if there is no such folder; a picture without one has no objects. Each line is a class and a box
    (centre x, centre y, width, height), an outline (x, y, x, y, …), or a box with keypoints if the description has
    `kpt_shape`, all as shares of the picture's size. The box of an outline is the smallest one around it.

    Args:
        root: the folder, or its description `data.yaml`. Without a description the pictures are those in
            `images/SPLIT` or `SPLIT/images`.
        split: "train", "val" or "test", as named in the description; None for all pictures in `images`.
        transform: sample → sample, applied to the dict, such as `Albumentations`.
        classes: the names of the classes by number; None takes those of the description, which is necessary then.
        masks: whether samples have "masks", made of the outlines.
        on_bad: "error" refuses files with entries that cannot be used: lines that are neither, unknown classes, labels
            without a picture, boxes without an outline where masks are wanted. "drop" leaves these out and counts them.
            Boxes that exceed their picture are clipped, and boxes without area in it left out, either way.

    Attributes:
        classes: the names of the classes by label.
        paths, annotations, problems, ragged_fields: as in `CocoDetection`.

    Sample:
        {"image": uint8 (H, W, 3) RGB, upright; "boxes": float32 (N, 4), left, top, right, bottom in pixels; "labels":
        int64 (N,); "masks": uint8 (N, H, W); "keypoints": float32 (N * K, 3), x, y and visibility, which is 2 if the
        file has none; "keypoint_labels": int64 (N * K, 2), the row of the box and the number of the keypoint; "rows":
        int64 (N,), 0 to N - 1}: masks if requested, keypoints if the description has `kpt_shape`.

    Raises:
        DatasetError: the folder, its description or the class names are missing, or there are entries that cannot be
            used.
        ValueError: `on_bad` is unknown.
        DecodeError: on reading; the picture is damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        masks: bool = False,
        on_bad: OnBad = "error",
    ) -> None:
        checked_on_bad(on_bad)
        problems = Problems()
        folder = read_yolo_folder(root, split, classes)
        points = None if folder.keypoints is None else folder.keypoints[0]
        builder = AnnotationsBuilder(problems, is_normalized=True, keypoints=points, masks=masks)
        top = os.fspath(root) if os.path.isdir(root) else os.path.dirname(os.fspath(root))
        paths, label_files = [], {image: _label_file(image, top) for image in folder.images}
        if label_files and not any(map(os.path.exists, label_files.values())):
            image, file = next(iter(label_files.items()))
            raise DatasetError(
                f'"{printable(os.fspath(root))}": none of the {len(label_files):,} pictures of the split {split!r} has '
                f'labels; those of "{printable(image)}" would be "{printable(file)}".'
            )
        for image, file in label_files.items():
            lines = _lines(image, file, problems)
            if lines is None:
                continue
            paths.append(image)
            builder.begin(0, 0)
            for number, line in enumerate(lines, 1):
                try:
                    _add(line.split(), (printable(file), f"line {number}"), folder, builder, masks)
                except EntryError as error:
                    problems.add(error.kind, printable(file), f"line {number}", str(error))
        if not folder.is_listed:  # a list may leave out pictures
            _count_orphans(label_files, problems)
        if on_bad == "error":
            problems.refuse()
        if not paths:
            raise DatasetError(f'"{printable(os.fspath(root))}" has no picture of the split {split!r}: {problems!r}.')
        super().__init__(root, paths, builder.build(), folder.classes, problems, transform)


def _lines(image: str, file: str, problems: Problems) -> list[str] | None:
    """The lines of a picture's label file; None if the picture or the file cannot be used, which is counted."""
    try:
        if not os.path.exists(image):
            raise EntryError("the picture that a list of the split names does not exist", "missing image")
        return read_small(file, _MOST_NBYTES).decode("utf-8").splitlines()
    except FileNotFoundError:
        return []  # a picture without objects
    except (OSError, ValueError, EntryError) as error:  # ValueError: not UTF-8, or a NUL in the name
        is_missing = isinstance(error, EntryError) and error.kind == "missing image"
        what = getattr(error, "strerror", None) or str(error)
        problems.add(
            error.kind if isinstance(error, EntryError) else "malformed entry",
            printable(image if is_missing else file),
            "",
            what,
        )
        return None


def _add(
    words: list[str], where: tuple[str, str], folder: YoloFolder, builder: AnnotationsBuilder, masks: bool
) -> None:
    if not words:
        return
    label, values = _number(words[0], _MOST_LABEL), [_number(word) for word in words[1:]]
    if label != int(label):
        raise EntryError(f"the class is {words[0]}; expected a whole number")
    if not 0 <= label < len(folder.classes):
        raise EntryError(f"there is no class {words[0]}; there are {len(folder.classes)}", "unknown category")
    keypoints: list[float] = []
    outline: list[float] = []
    if folder.keypoints is not None:
        count, columns = folder.keypoints
        if len(values) != _BOX + count * columns:
            raise EntryError(
                f"{1 + len(values)} numbers; expected {1 + _BOX + count * columns}: a class, a box and "
                f"{count} keypoints"
            )
        for at in range(_BOX, len(values), columns):
            keypoints += values[at : at + columns] if columns > 2 else [*values[at : at + 2], 2.0]
        if not set(keypoints[2::3]) <= {0, 1, 2}:
            raise EntryError(f"the visibility of keypoints is {shown(keypoints[2::3])}; expected 0, 1 or 2 for each")
    elif len(values) >= _LEAST_OUTLINE and len(values) % 2 == 0:
        outline = values
    elif len(values) != _BOX:
        raise EntryError(
            f"{1 + len(values)} numbers; expected a class and a box of 4, or an outline of an even number, at least 6"
        )
    if outline:
        box = (min(outline[::2]), min(outline[1::2]), max(outline[::2]), max(outline[1::2]))
    elif masks:
        raise EntryError("it has a box and no outline", "no mask")
    else:
        x, y, width, height = values[:_BOX]
        if width < 0 or height < 0:
            raise EntryError(f"the width and height are {width:g} and {height:g}; expected none below 0")
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    builder.add(where, box, int(label), polygons=[outline] if outline else [], keypoints=keypoints)


def _number(word: str, most: float = _MOST_SHARE) -> float:
    try:
        # `float` also takes underscores, and digits of other scripts.
        value = float(word) if word.isascii() and "_" not in word else math.nan
    except ValueError:
        value = math.nan
    if not -most < value < most:  # NaN is neither
        beyond = "beyond any share of a picture's size" if most == _MOST_SHARE else "too large"
        raise EntryError(f"{shown(word)} is not a number, or {beyond}")
    return value


def _label_file(image: str, root: str) -> str:
    """Where the labels of a picture are: the last `images` of its folders is `labels`, inside of the dataset's root."""
    folders = image.split(os.sep)
    above = len(root.rstrip(os.sep).split(os.sep)) - 1 if image.startswith(root.rstrip(os.sep) + os.sep) else 0
    for place in range(len(folders) - 2, above - 1, -1):
        if folders[place] == "images":
            folders[place] = "labels"
            break
    return os.path.splitext(os.sep.join(folders))[0] + ".txt"


def _count_orphans(label_files: dict[str, str], problems: Problems) -> None:
    """Count the label files that belong to no picture, in folders of labels alone."""
    known = set(label_files.values())
    pairs = ((os.path.dirname(file), os.path.dirname(image)) for image, file in label_files.items())
    for folder in sorted({labels for labels, images in pairs if labels != images}):
        if not os.path.isdir(folder):
            continue
        with os.scandir(folder) as entries:
            found = sorted(entry.path for entry in entries if entry.name.endswith(".txt") and entry.is_file())
        for file in found:
            if file not in known and os.path.basename(file) != "classes.txt":  # a list of names that some tools write
                problems.add("missing image", printable(file), "", "there is no picture for these labels")
