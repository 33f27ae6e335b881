"""What the user names on the command line: `module:factory`, `file.py:factory`, or a folder of images."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from loaders.benchmark.alone import is_dataset
from loaders.errors import DatasetError

_HOW = "Name a folder of images, or module:factory, where factory() gives a loader or a dataset."


def load_target(text: str, crop: int = 0) -> Any:
    """The loader or dataset that `text` names.

    Args:
        text: a folder with one folder of images per class (`ImageFolder`) or with images (`ImageFiles`);
            `module:name` or `path/file.py:name`, where name is a loader or dataset, or a function without arguments
            that returns one. Modules are also searched for in the working folder.
        crop: side in pixels of a `RandomResizedCrop` of a folder's images; 0 decodes whole images.

    Raises:
        DatasetError: it does not exist, or is neither a loader nor a dataset.
    """
    if Path(text).is_dir():
        return _images(Path(text), crop)
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise DatasetError(f'"{text}" is no folder.\n  {_HOW}')
    found = _attribute(_module(place), name, text)
    made = found() if callable(found) and (isinstance(found, type) or not _is_measurable(found)) else found
    if not _is_measurable(made):
        raise DatasetError(
            f'"{text}" gave a {type(made).__name__}, which can be neither iterated nor indexed.\n  {_HOW}'
        )
    return made


def dataset_of(made: Any) -> Any:
    """The dataset of a loader, or `made` itself if it is a dataset; None for any other iterable."""
    if hasattr(made, "batch_sampler"):
        return made.dataset
    return made if is_dataset(made) else None


def _images(folder: Path, crop: int) -> Any:
    from loaders.datasets.image_files import ImageFiles, ImageFolder
    from loaders.images.crops import RandomResizedCrop
    from loaders.images.decode import EXTENSIONS

    step = RandomResizedCrop(crop) if crop else None
    flat = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return ImageFiles(flat, crop=step) if flat else ImageFolder(folder, crop=step)


def _module(place: str) -> Any:
    path = Path(place)
    folder = str(path.parent.resolve()) if path.suffix == ".py" else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.suffix == ".py" else place
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the target itself imports
        raise DatasetError(f'there is no module "{place}" here.\n  {_HOW}') from error


def _attribute(module: Any, name: str, text: str) -> Any:
    try:
        for part in name.split("."):
            module = getattr(module, part)
    except AttributeError as error:
        raise DatasetError(f'"{text}": {error}.\n  {_HOW}') from error
    return module


def _is_measurable(value: Any) -> bool:
    return hasattr(value, "__iter__") or is_dataset(value)


def loader_argument(target: Any, name: str) -> Any:
    """An attribute of a loader; None if it is missing, or for a dataset, whose attribute may mean something else."""
    return getattr(target, name, None) if hasattr(target, "batch_sampler") else None


def is_stock(target: Any) -> bool:
    """Whether this is torch's own DataLoader."""
    from loaders.dataloader.loader import DataLoader

    return hasattr(target, "batch_sampler") and not isinstance(target, DataLoader)
