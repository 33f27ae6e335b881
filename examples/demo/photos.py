"""Cuts the demo's folder of JPEG files out of photographs that other packages ship; nothing is downloaded.

A class is a photograph, a sample a square crop of it. Each photograph is divided into four by four cells: validation
crops are inside four of them, training crops touch none of those four, so no pixel is in both.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from loaders import __version__
from loaders.errors import DecodeError, MissingExtraError

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
PER_CLASS = {"train": 320, "val": 60}
FILE_SIZE = 160  # pixels, the side of every JPEG file

_GRID = 4
_VAL_CELLS = ((0, 2), (1, 0), (2, 3), (3, 1))  # (row, column): one in each row and column
_SIDE = (0.18, 0.25)  # of a crop, as a share of the photograph's shorter side; a cell is at least 1/4 of it

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the photograph; right and bottom are outside


def demo_photos() -> Path:
    """The folder that holds train/<class>/*.jpg and val/<class>/*.jpg, cut on first use (a few seconds).

    The same OpenCV version cuts the same bytes on every machine.

    Raises:
        MissingExtraError: a package whose photographs are used is not installed.
    """
    folder = cache_folder() / "photos"
    if not folder.exists():
        _build(folder)
    return folder


def cache_folder() -> Path:
    """The folder for the demo's photographs and its trained network: $XDG_CACHE_HOME or the platform's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root and sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA")
    elif not root and sys.platform == "darwin":
        root = str(Path.home() / "Library" / "Caches")
    return Path(root or Path.home() / ".cache") / "loaders" / f"demo-{__version__}"


def package_folder(package: str) -> Path:
    """The folder of an installed package of the `demo` extra, found without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(f"the demo needs {package}, which is not installed: pip install 'loaders[demo]'.")
    return Path(found.submodule_search_locations[0])


def read_photo(name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """The photograph of the class `name`: uint8 (H, W, 3), BGR.

    Raises:
        MissingExtraError: the package that ships it is not installed.
        DecodeError: OpenCV cannot read the file.
    """
    package, file = PHOTOS[name]
    path = package_folder(package) / file
    photo = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if photo is None:
        raise DecodeError(f'OpenCV cannot read the photograph "{path}".', source=str(path))
    return photo


def crop_boxes(name: str, split: str, height: int, width: int) -> list[Box]:
    """The crops of a photograph of height by width pixels for the split "train" or "val": PER_CLASS[split] boxes."""
    # Python guarantees that random() repeats for a seed in later versions; NumPy does not for its generators.
    rng = random.Random(f"{name}/{split}")
    val_cells = [_cell(row, column, height, width) for row, column in _VAL_CELLS]
    boxes: list[Box] = []
    while len(boxes) < PER_CLASS[split]:
        side = int(min(height, width) * (_SIDE[0] + (_SIDE[1] - _SIDE[0]) * rng.random()))
        if split == "val":
            left, top, right, bottom = val_cells[len(boxes) % len(val_cells)]
        else:
            left, top, right, bottom = 0, 0, width, height
        x = left + int(rng.random() * (right - left - side + 1))
        y = top + int(rng.random() * (bottom - top - side + 1))
        box = (x, y, x + side, y + side)
        if split == "val" or not any(_overlap(box, cell) for cell in val_cells):
            boxes.append(box)
    return boxes


def _cell(row: int, column: int, height: int, width: int) -> Box:
    return (
        width * column // _GRID,
        height * row // _GRID,
        width * (column + 1) // _GRID,
        height * (row + 1) // _GRID,
    )


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _build(folder: Path) -> None:
    # Cut under another name and renamed when complete: a killed build leaves nothing that looks like the folder,
    # and of two builds at once the first to finish wins.
    folder.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in PHOTOS:
            _cut(name, workshop / folder.name)
        try:
            (workshop / folder.name).rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _cut(name: str, folder: Path) -> None:
    photo = read_photo(name)
    for split in PER_CLASS:
        target = folder / split / name
        target.mkdir(parents=True)
        for number, (left, top, right, bottom) in enumerate(crop_boxes(name, split, *photo.shape[:2])):
            crop = photo[top:bottom, left:right]
            method = cv2.INTER_AREA if right - left > FILE_SIZE else cv2.INTER_CUBIC
            image = cv2.resize(crop, (FILE_SIZE, FILE_SIZE), interpolation=method)
            _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            (target / f"{number:03}.jpg").write_bytes(jpeg.tobytes())
