"""Pictures and masks of classes in two folders, matched by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from loaders.datasets.detection.found import files_below
from loaders.datasets.detection.problems import OnBad, Problems, checked_on_bad
from loaders.datasets.image_files import PackedPaths
from loaders.datasets.protocol import IndexedDataset, in_range
from loaders.errors import DatasetError, FieldShapeError, describe_sample
from loaders.images.decode import EXTENSIONS, printable, read_image
from loaders.images.decode.indices import read_indices

_MASKS = (".png",)


class MaskFolder(IndexedDataset):
    """Pictures with a mask each, of which a pixel is the number of a class: `MaskFolder("images", "masks")`.

    A mask belongs to the picture with the same path below its folder, apart from the ending: `images/a/1.jpg` and
    `masks/a/1.png`. Masks are read as stored: of a PNG with a palette the indices, as in Pascal VOC.

    Args:
        images: the folder of the pictures, and of folders with pictures.
        masks: the folder of the masks: PNG files with grey values or a palette, of up to 16 bits.
        transform: sample → sample, applied to the dict, such as `Albumentations`.
        names: the pictures to use, as paths below `images` without ending, in this order; None for all, sorted. A split
            of Pascal VOC: `Path("ImageSets/Segmentation/train.txt").read_text().split()`.
        suffix: what follows the picture's name in the mask's, before the ending: "_mask" for `1_mask.png`.
        on_bad: "error" refuses pictures without a mask and masks without a picture. "drop" leaves them out and counts
            them in `problems`.

    Attributes:
        paths, mask_paths: the files, as `PackedPaths`.
        problems: what was left out: `problems.counts`, `problems.listed`.

    Sample:
        {"image": uint8 (H, W, 3) RGB, upright; "mask": uint8 or uint16 (H, W), as stored}

    Raises:
        DatasetError: a folder cannot be listed, two files have one name, or a picture or a mask has no partner.
        DecodeError: on reading; the picture or the mask is damaged, or the mask has colours.
        FieldShapeError: on reading; the picture and the mask differ in size.
    """

    moves_with_image = True  # a crop of the image alone would leave the mask as it was

    def __init__(
        self,
        images: str | os.PathLike[str],
        masks: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        names: Sequence[str] | None = None,
        suffix: str = "",
        on_bad: OnBad = "error",
    ) -> None:
        super().__init__(transform)
        checked_on_bad(on_bad)
        self._root = os.fspath(images)
        self.problems = Problems()
        pictures, marks = _by_name(self._root, EXTENSIONS, ""), _by_name(os.fspath(masks), _MASKS, suffix)
        chosen = sorted(pictures) if names is None else list(names)
        for name in [] if names is not None else sorted(marks.keys() - pictures.keys()):
            self.problems.add("missing image", printable(marks[name]), "", "the mask has no picture")
        pairs = []
        for name in chosen:
            if name not in pictures:
                path = printable(os.path.join(self._root, name))
                self.problems.add("missing image", path, "", "there is no such picture")
            elif name not in marks:
                self.problems.add("missing mask", printable(pictures[name]), "", "the picture has no mask")
            else:
                pairs.append((pictures[name], marks[name]))
        if on_bad == "error":
            self.problems.refuse()
        if not pairs:
            raise DatasetError(f'"{printable(self._root)}" has no picture with a mask: {self.problems!r}.')
        self.paths, self.mask_paths = (PackedPaths(paths) for paths in zip(*pairs, strict=True))

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, index: int) -> dict[str, Any]:
        image = read_image(self.paths[index], index=index)
        mask: np.ndarray[Any, Any] = read_indices(self.mask_paths[index], index=index)
        if mask.shape != image.shape[:2]:
            raise FieldShapeError(
                f'{describe_sample(index, self.describe(index))}, field "mask": '
                f'"{printable(self.mask_paths[index])}" has {mask.shape[1]} x {mask.shape[0]} pixels, the picture '
                f"{image.shape[1]} x {image.shape[0]}.\n  Make the mask from this picture, or leave both out. A "
                "picture that EXIF turns upright needs a mask of the upright picture.",
                index=index,
                source=self.describe(index),
                field="mask",
            )
        return {"image": image, "mask": mask}

    def describe(self, index: SupportsIndex) -> str:
        """The path of the picture, as printable text."""
        return printable(self.paths[in_range(index, len(self))])

    def __repr__(self) -> str:
        problems = f", {len(self.problems):,} problems" if len(self.problems) else ""
        return f'MaskFolder("{printable(self._root)[-60:]}", {len(self)} images{problems})'


def _by_name(folder: str, extensions: Sequence[str], suffix: str) -> dict[str, str]:
    """Path below the folder, without ending and suffix → path."""
    try:
        paths = files_below(folder, extensions)
    except OSError as error:
        raise DatasetError(f'"{printable(folder)}" cannot be listed: {error.strerror}.') from error
    found: dict[str, str] = {}
    for path in paths:
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        if name in found:
            raise DatasetError(f'"{printable(found[name])}" and "{printable(path)}" have the same name: keep one.')
        found[name] = path
    return found
