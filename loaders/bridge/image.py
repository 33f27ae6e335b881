"""`to_image`: a network's input or output as an image that matplotlib and OpenCV take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loaders.bridge import dtypes
from loaders.bridge.arrays import copy_to_array, require_dense
from loaders.errors import DtypeError, ImageShapeError

Channels = float | Sequence[float] | np.ndarray[Any, Any] | torch.Tensor


def to_image(
    tensor: torch.Tensor, mean: Channels | None = None, std: Channels | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A CHW or NCHW tensor as uint8 HWC or NHWC pixels, in memory of their own.

    Floats are denormalised, `x * std + mean`, taken as 0 … 1, scaled to 0 … 255, rounded to the nearest and clipped;
    NaN becomes 0. uint8 pixels are taken as they are, and `mean` and `std` do not apply. Channels keep their order:
    RGB stays RGB. The arithmetic runs on the tensor's device, in float32 (float64 for float64).

    Args:
        tensor: (C, H, W) or (N, C, H, W) with 1, 3 or 4 channels, of uint8 or any float dtype, in any memory format.
        mean: one number or one per channel, as given to the normalisation; None is 0.
        std: likewise; None is 1.

    Returns:
        uint8 (H, W, C) or (N, H, W, C), C-contiguous.

    Raises:
        ImageShapeError: another shape, or a mean or std of another length than the channels.
        DtypeError: neither uint8 nor a float.
        ArrayKindError: not a tensor with memory of its own.
    """
    pixels = require_dense(tensor)
    if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3, 4):
        raise ImageShapeError(
            f"{dtypes.describe(pixels)} is no image: expected (C, H, W) or (N, C, H, W) with 1, 3 or 4 channels.\n"
            "  Add the channel axis with tensor[None], or move it to the front with tensor.movedim(-1, -3)."
        )
    if pixels.dtype != torch.uint8:
        pixels = _quantize(pixels, mean, std)
    return copy_to_array(pixels.movedim(-3, -1))


def _quantize(pixels: torch.Tensor, mean: Channels | None, std: Channels | None) -> torch.Tensor:
    if dtypes.numpy_dtype(pixels).kind != "f":
        raise DtypeError(
            f"{dtypes.describe(pixels)}: an image is uint8, or a float from 0 to 1.\n"
            "  Call .to(torch.uint8) on values from 0 to 255, or .float() on a mask."
        )
    values = pixels.to(torch.float64 if pixels.dtype == torch.float64 else torch.float32)
    if std is not None:
        values = values * _per_channel(std, "std", values)
    if mean is not None:
        values = values + _per_channel(mean, "mean", values)
    # NaN passes `clamp`, and what an integer cast makes of it is up to the processor.
    return (values * 255).round().clamp(0, 255).nan_to_num(nan=0.0).to(torch.uint8)


def _per_channel(numbers: Channels, name: str, values: torch.Tensor) -> torch.Tensor:
    listed = numbers.tolist() if isinstance(numbers, (np.ndarray, torch.Tensor)) else numbers
    column = torch.tensor(listed, dtype=values.dtype, device=values.device).reshape(-1, 1, 1)
    if len(column) not in (1, values.shape[-3]):
        raise ImageShapeError(
            f"{dtypes.describe(values)}: {name} has {len(column)} values for {values.shape[-3]} channels.\n"
            "  Pass one number, or one per channel."
        )
    return column
