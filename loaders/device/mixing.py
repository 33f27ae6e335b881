"""`MixUp` and `CutMix`: each sample of a batch mixed with its neighbour, and their labels likewise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from loaders.bridge import dtypes
from loaders.device.normalize import describe_fields
from loaders.errors import ArrayKindError, DtypeError, FieldNameError, FieldShapeError, ImageShapeError
from loaders.nested import children, leaves, map_named
from loaders.randomness.streams import sample_rng

_IMAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
# (rows, their neighbours): each row goes with the one before it, the first with the last. Not `torch.roll`: it makes a
# contiguous copy on CUDA, whatever the memory format.
_NEIGHBOURS = ((slice(1, None), slice(None, -1)), (slice(None, 1), slice(-1, None)))


class _Mixing:
    """What both have in common: the paths of image and label, and the mixing of labels."""

    def __init__(self, num_classes: int, alpha: float, image: str | int | None, label: str | int | None) -> None:
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r}: expected the number of classes, 1 or more.")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha={alpha!r}: expected a positive number, the parameter of Beta(alpha, alpha).")
        self.num_classes = num_classes
        self.alpha = alpha
        self.image = image
        self.label = label

    def __call__(self, batch: Any) -> Any:
        """A new batch with image and label mixed; the class says how."""
        image_path, label_path = self._paths(batch)
        image = self._tensor(batch, image_path, "image")
        label = self._tensor(batch, label_path, "label")
        self._check_image(image, image_path)
        soft = self._soft(label, label_path, len(image))
        rng = sample_rng()
        mixed, share = self._mix(image, 1 - float(rng.beta(self.alpha, self.alpha)), rng)
        new = {image_path: mixed, label_path: _blend(soft, share)}
        return map_named(new.get, batch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_classes={self.num_classes}, alpha={self.alpha})"

    def _mix(self, image: torch.Tensor, share: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
        """The mixed image, in memory of its own, and the neighbour's share of it; `share` is the value drawn."""
        raise NotImplementedError

    def _paths(self, batch: Any) -> tuple[str, str]:
        defaults = ["image", "label"]
        if isinstance(batch, (tuple, list)):
            names = [name for name, _ in children(batch) or ()]
            defaults = [*names, *map(str, range(len(names), 2))]
        return (
            defaults[0] if self.image is None else str(self.image),
            defaults[1] if self.label is None else str(self.label),
        )

    def _tensor(self, batch: Any, path: str, role: str) -> torch.Tensor:
        for name, leaf in leaves(batch):
            if name == path:
                if isinstance(leaf, torch.Tensor):
                    return leaf
                raise ArrayKindError(
                    f'field "{path}": expected a tensor, got {type(leaf).__name__}.\n'
                    f"  Name the {role} of the batch: {type(self).__name__}(…, {role}=…)."
                )
        raise FieldNameError(
            f'The batch has no {role} by the name of "{path}". It has {describe_fields(batch)}.\n'
            f"  Name it as it is listed here: {type(self).__name__}(…, {role}=…).",
            field=path,
        )

    def _check_image(self, image: torch.Tensor, path: str) -> None:
        if image.dtype not in _IMAGE_DTYPES:
            raise DtypeError(
                f'field "{path}": {dtypes.describe(image)}: expected uint8 or floating pixels.\n'
                "  Convert the images in the dataset, or on the device with loaders.Normalize."
            )
        if image.ndim != 4:
            raise ImageShapeError(
                f'field "{path}": {dtypes.describe(image)}: expected uint8 (B, H, W, C) or floating (B, C, H, W).\n'
                "  Images are mixed by the batch: not one at a time in the dataset, but behind the loader."
            )

    def _soft(self, label: torch.Tensor, path: str, rows: int) -> torch.Tensor:
        """float32 (B, num_classes)."""
        is_soft = label.is_floating_point()
        if label.dtype == torch.bool or label.is_complex():
            raise DtypeError(
                f'field "{path}": {dtypes.describe(label)}: expected integers (B,) or floats (B, {self.num_classes}).\n'
                "  Convert it with tensor.long() or tensor.float()."
            )
        if label.shape != ((rows, self.num_classes) if is_soft else (rows,)):
            expected = f"({rows}, {self.num_classes}): num_classes={self.num_classes}" if is_soft else f"({rows},)"
            raise FieldShapeError(
                f'field "{path}": {dtypes.describe(label)}: expected {expected}, for images of {rows} samples.\n'
                f"  Labels are integers (B,), the number of a class each, or floats (B, {self.num_classes}), "
                "a weight for each class.",
                field=path,
            )
        if is_soft:
            return label.to(torch.float32)
        # Not one_hot or scatter: they read the labels on the host on some devices, or end the process on a wrong one.
        classes = torch.arange(self.num_classes, device=label.device)
        return (label.long()[:, None] == classes).to(torch.float32)


class MixUp(_Mixing):
    """Mixes each image of a batch with its neighbour's, pixel by pixel, and their labels (Zhang et al. 2018).

        mixup = MixUp(num_classes=1000)
        DevicePrefetcher(loader, "cuda", transform=lambda batch: mixup(normalize(batch)))

    One lambda ~ Beta(alpha, alpha) for the batch: image and label become lambda of their own and 1 - lambda of the
    previous sample, for the first one of the last; in a shuffled batch that is a random pair. lambda is drawn on the
    host from `loaders.sample_rng()`, and nothing waits for the device. The input batch is not changed.

    Floats are mixed in their own precision or better, and keep dtype and memory format. uint8 is mixed in float32 and
    rounded to the nearest, with a float32 copy on the way: put `Normalize` first.

    Args:
        num_classes: how many classes the labels count.
        alpha: of the Beta distribution; a smaller alpha mixes less.
        image: the path of the images in the batch, such as "image", "views.left" or 0. None is "image"; in tuples,
            namedtuples and lists it is the first item.
        label: likewise. None is "label", or the second item.

    Returns:
        A batch like the input, with image: uint8 (B, H, W, C) or floating (B, C, H, W), as it was, and label: float32
        (B, num_classes). Labels that are so already are taken as they are, so mixings can follow each other. A label
        outside 0 … num_classes - 1 counts as no class, and its sample contributes 0 to the labels: to reject it, the
        host would have to wait for the device.

    Raises:
        ValueError: `num_classes` or `alpha` is not positive.
        FieldNameError: the batch has no such field.
        ArrayKindError: the field is no tensor.
        DtypeError: images neither uint8 nor floating, or labels neither integers nor floating.
        ImageShapeError: images of another number of dimensions.
        FieldShapeError: labels neither (B,) nor, as floats, (B, num_classes).
    """

    def __init__(
        self, num_classes: int, alpha: float = 0.2, image: str | int | None = None, label: str | int | None = None
    ) -> None:
        super().__init__(num_classes, alpha, image, label)

    def _mix(self, image: torch.Tensor, share: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
        return _blend(image, share), share


class CutMix(_Mixing):
    """Pastes a box of its neighbour into each image of a batch, and mixes their labels by its area (Yun et al. 2019).

        cutmix = CutMix(num_classes=1000)
        DevicePrefetcher(loader, "cuda", transform=lambda batch: cutmix(normalize(batch)))

    One box for the batch: lambda ~ Beta(alpha, alpha), the centre uniform, the sides sqrt(1 - lambda) of the image's,
    clipped to the image; then lambda becomes the share of the image outside the box. Everything is drawn on the host
    from `loaders.sample_rng()`, and nothing waits for the device. The input batch is not changed. Images keep dtype and
    memory format.

    To do one or the other: `(mixup if loaders.sample_rng().random() < 0.5 else cutmix)(batch)`.

    Args:
        num_classes: how many classes the labels count.
        alpha: of the Beta distribution; 1 makes every lambda equally likely.
        image: the path of the images, as for `MixUp`.
        label: the path of the labels, as for `MixUp`.

    Returns:
        A batch as from `MixUp`.

    Raises:
        ImageShapeError: also images that seem to have their channels elsewhere: uint8 (B, C, H, W) or floating
            (B, H, W, C).
        ValueError, FieldNameError, ArrayKindError, DtypeError, FieldShapeError: as from `MixUp`.
    """

    def __init__(
        self, num_classes: int, alpha: float = 1.0, image: str | int | None = None, label: str | int | None = None
    ) -> None:
        super().__init__(num_classes, alpha, image, label)

    def _check_image(self, image: torch.Tensor, path: str) -> None:
        super()._check_image(image, path)
        expected, other, seems = (-1, 1, "(B, C, H, W)") if image.dtype == torch.uint8 else (1, -1, "(B, H, W, C)")
        # A box on the wrong axes would go unnoticed.
        if image.shape[expected] not in (1, 3, 4) and image.shape[other] in (1, 3, 4):
            raise ImageShapeError(
                f'field "{path}": {dtypes.describe(image)} seems to be {seems}: expected uint8 (B, H, W, C) or '
                "floating (B, C, H, W).\n"
                f"  Move its channels with tensor.movedim({other}, {expected}), a view."
            )

    def _mix(self, image: torch.Tensor, share: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
        rows_axis = 1 if image.dtype == torch.uint8 else 2
        height, width = image.shape[rows_axis : rows_axis + 2]
        top, bottom, left, right = _box(height, width, share, rng)
        mixed = image.clone()
        source, target = (
            whole.narrow(rows_axis, top, bottom - top).narrow(rows_axis + 1, left, right - left)
            for whole in (image, mixed)
        )
        for rows, neighbours in _NEIGHBOURS:
            target[rows].copy_(source[neighbours])
        return mixed, (bottom - top) * (right - left) / (height * width)


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of about `share` of the area, before it is clipped to the image."""
    half_height, half_width = int(height * math.sqrt(share)) // 2, int(width * math.sqrt(share)) // 2
    x, y = int(rng.integers(width)), int(rng.integers(height))
    return max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)


def _blend(own: torch.Tensor, share: float) -> torch.Tensor:
    """1 - `share` of each row and `share` of its neighbour, in the same dtype and memory format."""
    out = torch.empty_like(own)
    for rows, neighbours in _NEIGHBOURS:
        # `share` is a Python number: an argument of the kernel, where a tensor would have to be copied to the device.
        if own.is_floating_point():
            torch.lerp(own[rows], own[neighbours], share, out=out[rows])
        else:
            mixed = own[rows].to(torch.float32).mul_(1 - share).add_(own[neighbours], alpha=share)
            out[rows].copy_(mixed.round_())
    return out
