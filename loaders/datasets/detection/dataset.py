"""What the readers of COCO, YOLO and Pascal VOC share: a picture and its rows of the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from loaders.batch.spec import Field
from loaders.datasets.detection.problems import Problems
from loaders.datasets.detection.table import Annotations
from loaders.datasets.image_files import PackedPaths
from loaders.datasets.protocol import IndexedDataset, in_range
from loaders.errors import FieldShapeError, describe_sample
from loaders.images.decode import printable, read_image


class DetectionDataset(IndexedDataset):
    """Pictures with boxes; `CocoDetection`, `YoloDetection` and `VocDetection` read the table from files.

    Attributes:
        paths: the pictures, as `PackedPaths`.
        annotations: the table of all boxes.
        classes: the names of the labels, in their order.
        problems: what was corrected or left out: `problems.counts`, `problems.listed`.
    """

    moves_with_image = True  # a crop of the image alone would leave the boxes where they were

    def __init__(
        self,
        source: str | os.PathLike[str],
        paths: Sequence[str | bytes],
        annotations: Annotations,
        classes: Sequence[str],
        problems: Problems,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(transform)
        self._source = source
        self.paths = PackedPaths(paths)
        self.annotations = annotations
        self.classes = list(classes)
        self.problems = problems

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Name → label."""
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def ragged_fields(self) -> dict[str, Field]:
        """`fields=` of a DataLoader for the fields whose number of rows differs between samples."""
        table = self.annotations
        names = ["boxes", "labels"]
        names += ["masks"] if table.segments is not None else []
        names += ["keypoints", "keypoint_labels", "rows"] if table.keypoints is not None else []
        return {name: Field(ragged=True) for name in (*names, *table.extras)}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: SupportsIndex) -> Any:
        sample = super().__getitem__(index)
        if self.transform is not None and isinstance(sample, dict) and "boxes" in sample:
            self._check_rows(sample, in_range(index, len(self)))
        return sample

    def _check_rows(self, sample: dict[str, Any], index: int) -> None:
        """A pipeline that drops boxes must drop the rows of all other fields, or masks belong to other boxes."""
        count = len(sample["boxes"])
        for name in self.ragged_fields:
            if name not in ("keypoints", "keypoint_labels") and name in sample and len(sample[name]) != count:
                raise FieldShapeError(
                    f'{describe_sample(index, self.describe(index))}, field "{name}": {len(sample[name])} rows for '
                    f"{count} boxes: the transform has dropped boxes alone.\n  Pass "
                    f'loaders.Albumentations(pipeline, box_rows=("{name}", …)), or declare it in label_fields=.',
                    index=index,
                    source=self.describe(index),
                    field=name,
                )

    def _read(self, index: int) -> dict[str, Any]:
        image = read_image(self.paths[index], index=index)
        height, width = image.shape[:2]
        if self.annotations.sizes is not None:
            expected = tuple(self.annotations.sizes[index].tolist())
            if expected != (width, height):
                raise FieldShapeError(
                    f'{describe_sample(index, self.describe(index))}, field "image": the picture is {width} x {height} '
                    f"pixels, its annotations are for {expected[0]} x {expected[1]}.\n  {_remedy(expected, image)}",
                    index=index,
                    source=self.describe(index),
                    field="image",
                )
        return {"image": image, **self.annotations.fields_of(index, width, height)}

    def describe(self, index: SupportsIndex) -> str:
        """The path of the picture, as printable text."""
        return printable(self.paths[in_range(index, len(self))])

    def __repr__(self) -> str:
        name = os.path.basename(os.path.abspath(printable(os.fspath(self._source))))
        problems = f", {len(self.problems):,} problems" if len(self.problems) else ""
        return (
            f'{type(self).__name__}("{name[-60:]}", {len(self)} images, {len(self.annotations):,} boxes, '
            f"{len(self.classes)} classes{problems})"
        )


def _remedy(expected: tuple[int, ...], image: Any) -> str:
    if expected == image.shape[:2]:
        return "It is turned upright by its EXIF orientation: annotate the upright picture, or remove the tag."
    return "Use the file that was annotated, or leave it out of the dataset."
