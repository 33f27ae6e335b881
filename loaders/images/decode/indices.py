"""Masks: what a PNG stores for each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np

from loaders.images.decode.files import Source
from loaders.images.decode.image import open_image


def read_indices(source: Source, *, index: int | None = None) -> np.ndarray[Any, Any]:
    """Read a mask: what a PNG stores for each pixel, with nothing converted.

    Args:
        source: a path, a URL for fsspec, or encoded bytes, of a PNG with grey values or a palette.
        index: the number of the sample, for error messages.

    Returns:
        uint8 (H, W), or uint16 of a file with 16 bits: grey values, or the indices of the palette. A file of 1, 2 or 4
        bits has values up to 1, 3 or 15. It is not turned: an EXIF orientation is ignored.

    Raises:
        DecodeError: the file is missing, damaged, no PNG, or has colours or alpha.
    """
    with open_image(source, index) as image:
        return image.indices()
