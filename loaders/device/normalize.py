"""`Normalize`: bytes are copied to the device and converted there to the network's input, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from loaders.bridge import dtypes
from loaders.errors import ArrayKindError, DtypeError, FieldNameError, ImageShapeError
from loaders.images.normalize import checked_mean_and_std
from loaders.nested import leaves, map_named

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# There one kernel reads uint8, computes in float32 and writes any of _DTYPES. Elsewhere operators of mixed dtypes first
# copy each operand to float32 (CPU), or may not take the mixture (MPS): there the pixels are converted once, in place.
_CASTS_IN_KERNELS = ("cuda",)


class Normalize:
    """Pixels as a network takes them: `(x / 255 - mean) / std`, channels first, in `dtype`.

        prefetcher = DevicePrefetcher(loader, "cuda", transform=Normalize(mean, std))

    Takes a tensor, or a batch of nested dicts, tuples, namedtuples, lists and dataclasses: then the tensors named by
    `fields` are normalised, and everything else passes through unchanged. Nothing is changed in place. The arithmetic
    runs on the tensor's device, in float32, rounded once to `dtype`. Only the first call on a device waits for it, to
    copy mean and std there: make that call outside of CUDA graphs.

    Args:
        mean: one number per channel, of pixels scaled to 0 … 1.
        std: likewise.
        dtype: torch.bfloat16, float16 or float32.
        channels_last: True gives tensors in the channels-last memory format, which is how loaders write images, so no
            pixel moves; convolutions in bfloat16 and float16 are fastest on it. False gives contiguous ones.
        fields: the paths of the tensors to normalise, such as "image" or ["views.left", "views.right"]; a path stands
            for all tensors under it. None takes every uint8 tensor of shape (B, H, W, C) with one channel per mean.
            Named tensors may also be (B, N, H, W, C), of N pictures per sample.

    Returns:
        The tensor as (B, C, H, W) of `dtype`, as (B, N, C, H, W), or as (C, H, W) for a single image of shape
        (H, W, C); or the batch with such tensors in it.

    Raises:
        ValueError: mean and std are of different length, empty or not finite, a std is 0, or `fields` is empty.
        DtypeError: a tensor that is not uint8, or a `dtype` that is none of the three.
        ImageShapeError: a tensor of another shape, or with another number of channels.
        ArrayKindError: a field in `fields` is not a tensor.
        FieldNameError: a path in `fields` is not in the batch, or without `fields` there is nothing to normalise.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.bfloat16,
        channels_last: bool = True,
        fields: str | Iterable[str] | None = None,
    ) -> None:
        self.mean, self.std = checked_mean_and_std(mean, std)
        if dtype not in _DTYPES:
            raise DtypeError(f"dtype={dtype!r}: expected one of {', '.join(map(str, _DTYPES))}.")
        self.dtype = dtype
        self.channels_last = channels_last
        self.fields = (fields,) if isinstance(fields, str) else None if fields is None else tuple(fields)
        if self.fields == ():
            raise ValueError("fields is empty: expected the path of at least one tensor, or None to find them.")
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: Any) -> Any:
        """The tensor, or the batch with its images, normalised; the class says how."""
        if isinstance(batch, torch.Tensor):
            return self._normalized(batch, "")
        chosen = self._chosen(batch)
        return map_named(lambda path, leaf: self._normalized(leaf, path) if path in chosen else leaf, batch)

    def _chosen(self, batch: Any) -> set[str]:
        """The paths of what is to be normalised."""
        if self.fields is None:
            chosen = {path for path, leaf in leaves(batch) if self._is_image(leaf)}
            if not chosen:
                raise FieldNameError(
                    f"The batch has nothing to normalise. It has {describe_fields(batch)}; expected a uint8 tensor of "
                    f"shape (B, H, W, {len(self.mean)}).\n"
                    f"  Batches of loaders.DataLoader have one where the dataset gives uint8 ndarrays (H, W, C). "
                    f"mean and std must have one number per channel."
                )
            return chosen
        chosen = set()
        for name in self.fields:
            below = {path for path, _ in leaves(batch) if path == name or path.startswith(f"{name}.")}
            if not below:
                raise FieldNameError(
                    f'The batch has no field "{name}". It has {describe_fields(batch)}.\n'
                    f"  Name the images as they are listed here: Normalize(…, fields=[…]).",
                    field=name,
                )
            chosen |= below
        return chosen

    def _is_image(self, leaf: Any) -> bool:
        wanted = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.uint8 and leaf.ndim == 4
        return wanted and leaf.shape[-1] == len(self.mean)

    def _normalized(self, image: Any, path: str) -> torch.Tensor:
        self._check(image, path)
        scale, bias = self._constants_on(image.device)
        if self.channels_last:
            out = torch.empty(image.shape, dtype=self.dtype, device=image.device)
        else:
            out = torch.empty(image.movedim(-1, -3).shape, dtype=self.dtype, device=image.device).movedim(-3, -1)
        if image.device.type in _CASTS_IN_KERNELS:
            torch.addcmul(bias, image, scale, out=out)
        else:
            values = out if self.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            torch.addcmul(bias, values.copy_(image), scale, out=values)
            if values is not out:
                out.copy_(values)
        return out.movedim(-1, -3)

    def _check(self, image: Any, path: str) -> None:
        where = f'field "{path}": ' if path else ""
        if not isinstance(image, torch.Tensor):
            raise ArrayKindError(
                f"{where}expected a uint8 tensor, got {type(image).__name__}.\n"
                "  loaders.as_tensor makes one of an ndarray. fields= names what is to be normalised."
            )
        if image.dtype != torch.uint8:
            raise DtypeError(
                f"{where}{dtypes.describe(image)}: expected uint8 pixels from 0 to 255.\n"
                "  Let the dataset give uint8: it is a quarter of float32's bytes on the way. Floats that are "
                "normalised already need no Normalize."
            )
        if image.ndim not in (3, 4, 5) or image.shape[-1] != len(self.mean):
            raise ImageShapeError(
                f"{where}{dtypes.describe(image)}: expected (B, H, W, {len(self.mean)}) or (H, W, {len(self.mean)}), "
                "or (B, N, H, W, C) of several pictures per sample, with one channel per mean.\n"
                "  Move channels to the end with tensor.movedim(-3, -1), add a missing channel axis with "
                "tensor[..., None], or pass mean and std of as many channels."
            )

    def _constants_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """scale and bias, float32 (C,) each: x * scale + bias is the normalised value."""
        constants = self._constants.get(device)
        if constants is None:
            # Cached, since each copy of pageable memory to the device would wait for it.
            scale = [1 / (255 * std) for std in self.std]
            bias = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
            both = torch.tensor([scale, bias], dtype=torch.float32, device=device)
            constants = self._constants[device] = (both[0], both[1])
        return constants

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_constants": {}}

    def __repr__(self) -> str:
        return f"Normalize(mean={self.mean}, std={self.std}, dtype={self.dtype})"


def describe_fields(batch: Any) -> str:
    """How messages list what a batch has: `"image": uint8 tensor of shape (8, 4, 4, 3), "name": list`."""
    listed = [
        f'"{path}": {dtypes.describe(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__}'
        for path, leaf in leaves(batch)
    ]
    return ", ".join(listed[:12]) + (" …" if len(listed) > 12 else "") or "no fields"
