"""Samples from image files, given as a list or as a folder with one subfolder per class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from loaders.datasets.image_samples import ImageSamples
from loaders.datasets.protocol import in_range
from loaders.errors import DatasetError
from loaders.images.crops import Crop
from loaders.images.decode import EXTENSIONS, printable
from loaders.images.multi_crop import MultiCrop
from loaders.images.walk import is_folder, walk

_NAMES_SHOWN = 4


class PackedPaths:
    """A read-only list of paths in two arrays.

    A list of a million str is a million objects, and reading one writes its reference count: in a forked worker that
    copies the page it is on. The arrays contain no objects.

    Items are str, as `os.fsdecode` returns them: names that are not valid text are preserved.
    """

    def __init__(self, paths: Iterable[str | bytes | os.PathLike[str]]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
        self._offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(path) for path in encoded], out=self._offsets[1:])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: SupportsIndex) -> str:
        position = in_range(index, len(self))
        start, end = self._offsets[position : position + 2]
        return os.fsdecode(self._bytes[start:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    @classmethod
    def from_arrays(cls, encoded: np.ndarray[Any, np.dtype[np.uint8]], offsets: np.ndarray[Any, Any]) -> PackedPaths:
        """The list that `arrays` describes; the arrays are not copied."""
        paths = cls.__new__(cls)
        paths._bytes, paths._offsets = encoded, offsets
        return paths

    @property
    def arrays(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
        """All paths in sequence, uint8 (bytes,), and where each begins and the last one ends, int64 (paths + 1,)."""
        return self._bytes[: self._offsets[-1]], self._offsets

    @property
    def nbytes(self) -> int:
        """Memory of the two arrays, in bytes."""
        return self._bytes.nbytes + self._offsets.nbytes


class ImageFiles(ImageSamples):
    """Images by path, each with a label if there are labels: `ImageFiles(table["path"], table["label"])`.

    Args:
        paths: the image files, in the order of the samples. Stored as `PackedPaths`.
        labels: one per path: an ndarray (a row may be a vector or a mask), a table's column, or any sequence. Stored as
            an ndarray, of dtype object if the labels have no common shape.
        transform: sample → sample, applied to the dict.
        crop: the region of each image to decode, and the size to resize it to, before the transform:
            `RandomResizedCrop`, `CenterCrop`, `Resize`, `RandomPatches`, which may make several samples of one file, or
            `MultiCrop`, which makes several pictures one sample. None decodes the whole image. In a
            `loaders.DataLoader`, without a transform, the pixels are written directly into the batch.
        normalize: (mean, std), one number per channel, for pixels scaled to 0 … 1. Applied after the transform, which
            must leave the image uint8; the result is float32 (3, H, W), `(x / 255 - mean) / std`. In a
            `loaders.DataLoader` it is written directly into the batch. For training on a CPU; for an accelerator copy
            uint8, a quarter of the bytes, and normalise there with `loaders.Normalize`.

    Sample:
        {"image": uint8 (H, W, 3) RGB as `read_image` gives it, "label": int, str, NumPy scalar or ndarray}; no "label"
        without labels. Integers of any width become Python ints, which collate to int64 as losses require. With a
        `MultiCrop`, "image" is a tuple of stacks, uint8 (how many, H, W, 3), or float32 (how many, 3, H, W).

    Raises:
        DatasetError: paths and labels differ in length.
        ValueError: `normalize` is not (mean, std), or is used with a crop that stacks several windows.
        DecodeError: on reading; names the sample's index and path.
        FieldNameError, FieldDtypeError, FieldShapeError: on reading; the result of the transform cannot be normalised.
    """

    def __init__(
        self,
        paths: Iterable[str | bytes | os.PathLike[str]] | PackedPaths,
        labels: Sequence[Any] | np.ndarray | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        crop: Crop | MultiCrop | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__(transform, crop, normalize)
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError(
                f"paths is one path, {os.fspath(paths)!r}, not several; did you mean ImageFolder or [path]?"
            )
        self.paths = paths if isinstance(paths, PackedPaths) else PackedPaths(paths)
        self.labels = None if labels is None else _as_rows(labels)
        if self.labels is not None and len(self.labels) != len(self.paths):
            raise DatasetError(f"{len(self.paths):,} paths but {len(self.labels):,} labels; each image needs one.")

    def __len__(self) -> int:
        return self._per_file * len(self.paths)

    def _read(self, index: int) -> dict[str, Any]:
        return self._whole_sample(index)

    def _image_source(self, index: int) -> str:
        return self._path_of(index)

    def _other_fields(self, index: int) -> dict[str, Any]:
        return {} if self.labels is None else {"label": self._label_of(index)}

    def _path_of(self, index: int) -> str:
        return self.paths[index // self._per_file]

    def _label_of(self, index: int) -> Any:
        label = self.labels[index // self._per_file]  # type: ignore[index]  # only where there are labels
        return label.item() if isinstance(label, (np.integer, np.str_)) else label

    read_into = ImageSamples.read_into  # `_read` returns what it writes

    def _others_are_fixed(self) -> bool:
        return self.labels is None or self.labels.dtype != object

    def _write_other_fields(self, index: int, out: dict[str, Any]) -> None:
        if self.labels is not None:
            out["label"][...] = self._label_of(index)

    def describe(self, index: SupportsIndex) -> str:
        """The path of the sample's file, as printable text."""
        return printable(self._path_of(in_range(index, len(self))))

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", labels {self.labels.dtype} {self.labels.shape}"
        return f"ImageFiles({self._count()}{labels})"

    def _count(self) -> str:
        several = f", {self._per_file} samples of each" if self._per_file > 1 else ""
        return f"{len(self.paths):,} images{several}"


class ImageFolder(ImageFiles):
    """A folder of photos with one folder per class: `train/cat/1.jpg`, `train/cat/more/2.png`, `train/dog/3.jpg`.

    Folders inside a class folder belong to that class. Links are followed; hidden files and folders, and files directly
    in the root, are ignored. Classes and images are sorted by name, as in torchvision. A folder that a class reaches by
    several links counts once. A pipe, a device or a broken link with the name of an image counts as an image, and
    reading it raises an error.

    Args:
        root: the folder that holds the class folders.
        transform: sample → sample, applied to the dict.
        extensions: file name endings of images; case is ignored.
        crop: the region to decode and its size, such as `RandomResizedCrop(224)`; as in `ImageFiles`.
        normalize: (mean, std), for float32 (3, H, W); as in `ImageFiles`.

    Attributes:
        classes: names of the class folders, sorted. A class without images keeps its label, and a warning names it.
        class_to_idx: name → label.
        paths: the image files, in the order of the samples.
        labels: int64 (N,).

    Sample:
        {"image": uint8 (H, W, 3) RGB as `read_image` gives it, "label": int}

    Raises:
        DatasetError: `root` is not a folder, a folder cannot be listed, or no class folder holds an image.
        DecodeError: on reading; names the sample's index and path.
        Others: as in `ImageFiles`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        extensions: Sequence[str] = EXTENSIONS,
        crop: Crop | MultiCrop | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.root = root
        self.extensions = (extensions,) if isinstance(extensions, str) else tuple(extensions)
        folders = _class_folders(root)
        self.classes = [os.fsdecode(os.path.basename(folder)) for folder in folders]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        endings = tuple(os.fsencode(ending.lower()) for ending in self.extensions)
        images = [_images_below(folder, endings) for folder in folders]
        empty = [printable(name) for name, found in zip(self.classes, images, strict=True) if not found]
        known = ", ".join(self.extensions)
        if len(empty) == len(images):
            raise DatasetError(
                f'No images in "{printable(os.fspath(root))}": it holds {len(images)} class folders and none of them '
                f"has a file ending in {known}.\n  Put images into one folder per class, root/cat/1.jpg; "
                "for a flat list of files use ImageFiles."
            )
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(images)} classes have no image ending in {known}: {_first(empty)}. They keep "
                "their labels.",
                stacklevel=2,
            )
        labels = np.repeat(np.arange(len(images)), [len(found) for found in images])
        paths = [path for found in images for path in found]
        super().__init__(paths, labels, transform, crop=crop, normalize=normalize)

    def __repr__(self) -> str:
        names = _first([printable(name) for name in self.classes])
        root = printable(os.fspath(self.root))
        return f'ImageFolder("{root}", {self._count()}, {len(self.classes)} classes: {names})'


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


def _as_rows(labels: Any) -> np.ndarray:
    try:
        return np.asarray(labels)
    except ValueError:  # no common shape, such as a different number of boxes per image
        rows = np.empty(len(labels), object)
        for position, label in enumerate(labels):
            rows[position] = label
        return rows


def _class_folders(root: str | os.PathLike[str]) -> list[bytes]:
    if not os.path.isdir(root):
        raise DatasetError(
            f'"{printable(os.fspath(root))}" is not a folder; ImageFolder needs the one that holds the class folders.'
        )
    # Names as bytes: they sort as text does, and names that are not valid text need no special handling.
    try:
        with os.scandir(os.fsencode(root)) as entries:
            return sorted(entry.path for entry in entries if is_folder(entry) and not entry.name.startswith(b"."))
    except OSError as error:
        raise _unlisted(os.fsencode(root), error) from error


def _images_below(top: bytes, endings: tuple[bytes, ...]) -> list[bytes]:
    images: dict[bytes, list[bytes]] = {}
    for folder in walk(top, hidden=False):
        if folder.error is not None:
            raise _unlisted(folder.path, folder.error) from folder.error
        before = os.path.join(folder.path, b"")
        images[folder.path] = [before + name for name in folder.files if name.lower().endswith(endings)]
    return [path for folder in sorted(images) for path in images[folder]]


def _unlisted(folder: bytes, error: OSError) -> DatasetError:
    return DatasetError(
        f'"{printable(os.fsdecode(folder))}" cannot be listed: {error.strerror}.\n  Make it readable, or move it out '
        "of the dataset."
    )
