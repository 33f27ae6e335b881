"""Pixels as normalised float32 planes on the CPU: `ImageFolder(…, normalize=(mean, std))`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np


def checked_mean_and_std(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`mean` and `std` as floats.

    Raises:
        ValueError: they are of different length, empty or not finite, or a std is 0.
    """
    means, stds = tuple(map(float, mean)), tuple(map(float, std))
    if len(means) != len(stds) or not means:
        raise ValueError(f"mean={mean!r}, std={std!r}: expected one number per channel in both.")
    if not all(map(math.isfinite, means + stds)) or 0 in stds:
        raise ValueError(f"mean={mean!r}, std={std!r}: expected finite numbers, and no std of 0.")
    return means, stds


class NormalizedPlanes:
    """`(x / 255 - mean) / std`, channels first, in one pass: each of the 256 values is looked up in a table.

    The tables are computed in float64 and rounded once: each result is the float32 nearest to the exact value.

    Args:
        mean: one number per channel, of pixels scaled to 0 … 1.
        std: one number per channel, on the same scale.

    Raises:
        ValueError: mean and std are of different length, empty or not finite, or a std is 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = checked_mean_and_std(mean, std)
        values = np.arange(256) / 255
        self._tables = [
            ((values - mean) / std).astype(np.float32) for mean, std in zip(self.mean, self.std, strict=True)
        ]

    def __call__(
        self, image: np.ndarray[Any, np.dtype[np.uint8]], out: np.ndarray[Any, np.dtype[np.float32]] | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Normalise an image.

        Args:
            image: uint8 (H, W, C), one channel per mean.
            out: where the planes are written, float32 (C, H, W); None allocates a new array.

        Returns:
            float32 (C, H, W); `out` if it was given.

        Raises:
            ValueError: `image` or `out` has the wrong dtype or shape.
        """
        channels = len(self.mean)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or not image.size:
            raise ValueError(
                f"{image.dtype} of shape {image.shape}: expected uint8 pixels of shape (H, W, {channels}), with one "
                "channel per mean."
            )
        shape = (channels, *image.shape[:2])
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise ValueError(f"out is {out.dtype} of shape {out.shape}; the planes are float32 of shape {shape}.")
        for channel, (plane, table) in enumerate(zip(out, self._tables, strict=True)):
            target = plane if plane.flags.c_contiguous else None
            values = cv2.LUT(cv2.extractChannel(image, channel), table, dst=target)
            if values is not plane:
                plane[...] = values
        return out

    def __repr__(self) -> str:
        return f"NormalizedPlanes(mean={self.mean}, std={self.std})"
