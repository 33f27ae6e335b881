"""What datasets of images share: `crop=`, `normalize=`, and writing pixels directly into a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from loaders.datasets.protocol import IndexedDataset, in_range
from loaders.datasets.read_into import copy_into, owns_read_into, settle, without_image
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError, SampleError, describe_sample
from loaders.images.crops import Crop
from loaders.images.decode import Source, read_image
from loaders.images.multi_crop import MultiCrop
from loaders.images.normalize import NormalizedPlanes
from loaders.nested import leaves
from loaders.timing.stages import AUGMENT


class ImageSamples(IndexedDataset):
    """Samples with an image in one field, and other fields; a subclass defines where they come from.

    It also defines `_read`, by `_whole_sample`, and takes over `read_into` by name: that both are in one class says
    that they agree (`owns_read_into`).

    Args:
        transform, crop, normalize: as documented for `ImageFiles`.

    Raises:
        TypeError, ValueError: `crop` or `normalize` is invalid.
    """

    image_field = "image"  # a subclass may name another

    def __init__(
        self,
        transform: Callable[[Any], Any] | None,
        crop: Crop | MultiCrop | None,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        super().__init__(transform)
        if crop is not None and not isinstance(crop, (Crop, MultiCrop)):
            raise TypeError(f"crop is {crop!r}: expected a loaders.Crop, such as loaders.RandomResizedCrop(224).")
        self.crop = crop
        self.normalize = normalize
        self._planes = None if normalize is None else _planes_of(normalize)
        if normalize is not None and isinstance(crop, Crop) and crop.shape is not None and len(crop.shape) > 2:
            raise ValueError("normalize= takes one image per sample, and the crop stacks several: leave stacked= out.")
        self._per_file = 1 if crop is None else crop.per_file

    @abstractmethod
    def _image_source(self, index: int) -> Source:
        """The image of a sample."""

    @abstractmethod
    def _other_fields(self, index: int) -> dict[str, Any]:
        """The fields of a sample besides the image."""

    def __getitem__(self, index: SupportsIndex) -> Any:
        sample = super().__getitem__(index)
        if self._planes is None:
            return sample
        with AUGMENT:
            image = self._to_planes(self._checked_image(sample, in_range(index, len(self))))
        return {**sample, self.image_field: image}

    def _whole_sample(self, index: int) -> dict[str, Any]:
        """The sample before the transform."""
        source = self._image_source(index)
        image: Any = read_image(source, index=index) if self.crop is None else self.crop.read(source, index=index)
        return {self.image_field: image, **self._other_fields(index)}

    @property
    def read_into(self) -> Callable[[SupportsIndex, Any], None]:
        """`read_into(index, out)` writes a sample into the arrays of `out`, which has the same structure.

        It exists where it saves a copy of the image: with `normalize`, or with a `crop` of fixed size, no transform,
        and other fields of one shape. A subclass that overrides the indexing has none.

        Raises:
            AttributeError: it does not exist.
        """
        if owns_read_into(type(self)):
            if self._planes is not None:
                return self._read_planes_into
            one_size = self.crop is not None and self.crop.shape is not None
            if one_size and self.transform is None and self._others_are_fixed():
                return self._read_crop_into
        raise AttributeError(f"this {type(self).__name__} has no read_into: it would save no copy")

    def _others_are_fixed(self) -> bool:
        """Whether the other fields may be written into a row: False where their shapes are known to differ."""
        return True

    def _read_crop_into(self, index: SupportsIndex, out: dict[str, Any]) -> None:
        position = in_range(index, len(self))
        assert self.crop is not None
        place = out[self.image_field]
        settle(self.crop.read(self._image_source(position), place, index=position), place)
        self._write_other_fields(position, out)

    def _write_other_fields(self, index: int, out: dict[str, Any]) -> None:
        for name, value in self._other_fields(index).items():
            place = out[name]
            if type(value) is int and isinstance(place, np.ndarray) and place.dtype == np.int64 and not place.shape:
                place[...] = value  # the usual label, six times faster
            else:
                copy_into({name: place}, {name: value}, index, self.describe)

    def _read_planes_into(self, index: SupportsIndex, out: dict[str, Any]) -> None:
        position = in_range(index, len(self))
        sample, name = super().__getitem__(position), self.image_field
        image = self._checked_image(sample, position)
        places = [place.shape[-2:] for _, place in leaves(out[name])]
        if places != [each.shape[-3:-1] for _, each in leaves(image)]:
            # Raises: shapes differ.
            copy_into(out, {**sample, name: self._to_planes(image)}, position, self.describe)
        with AUGMENT:
            self._to_planes(image, out[name])
        copy_into(without_image(out, name), without_image(sample, name), position, self.describe)

    def _to_planes(self, image: Any, out: Any = None) -> Any:
        """Normalise an image, or those of a `MultiCrop`: a tuple of stacks."""
        planes = self._planes
        assert planes is not None
        if not isinstance(image, tuple):
            return planes(image, out)
        if out is None:
            out = tuple(np.empty((len(stack), 3, *stack.shape[1:3]), np.float32) for stack in image)
        for stack, places in zip(image, out, strict=True):
            for each, place in zip(stack, places, strict=True):
                planes(each, place)
        return out

    def _checked_image(self, sample: Any, index: int) -> Any:
        """The image of a sample after the transform, checked to be uint8 (H, W, 3) and not empty.

        With a `MultiCrop` it is a tuple of stacks of such images.
        """
        image = sample.get(self.image_field) if isinstance(sample, dict) else None
        is_several = isinstance(self.crop, MultiCrop)
        images = image if is_several and isinstance(image, tuple) and image else (image,)
        for each in images:
            self._check_image(each, 4 if is_several else 3, sample, index)
        return image

    def _check_image(self, image: Any, dimensions: int, sample: Any, index: int) -> None:
        kind: type[SampleError]
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            if image.ndim == dimensions and image.shape[-1] == 3 and image.size:
                return
            kind, found = FieldShapeError, f"uint8 {image.shape}"
        elif image is not None:
            kind = FieldDtypeError
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        else:
            kind, found = FieldNameError, f"a {type(sample).__name__} without one"
        expected = "uint8 (H, W, 3)" if dimensions == 3 else "a tuple of uint8 (N, H, W, 3)"
        raise kind(
            f'{describe_sample(index, self.describe(index))}, field "{self.image_field}": the transform returned '
            f"{found}; normalize= needs {expected} in a dict.\n"
            "  Remove normalisation and ToTensorV2 from the transform.",
            index=index,
            source=self.describe(index),
            field=self.image_field,
        )


def _planes_of(normalize: Any) -> NormalizedPlanes:
    try:
        mean, std = (tuple(map(float, values)) for values in normalize)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"normalize={normalize!r}: expected (mean, std), three numbers each, for red, green and blue.")
    return NormalizedPlanes(mean, std)
