"""Run lengths of masks as COCO writes them: a list of counts, or text of six bits per character.

A mask is read column by column, each from top to bottom. The counts are the lengths of its runs, by turns outside and
inside of the object; the first run is outside, and may be empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Runs = np.ndarray[Any, np.dtype[np.int64]]

_FIRST = 48  # the character of the value 0
_MORE = 0x20  # another character of the same number follows
_SIGN = 0x10  # of the last character of a number
_CHARACTERS = 7  # of a number, at most: 35 bits


def decode_counts(counts: object, height: int, width: int) -> Runs:
    """The run lengths of a mask of `height` by `width` pixels.

    Args:
        counts: a list of whole numbers, or the compressed text, as str or bytes.
        height, width: of the mask, in pixels.

    Returns:
        int64 (R,): none is negative, and their sum is height * width.

    Raises:
        ValueError: they are anything else; the message says what.
    """
    if isinstance(counts, (str, bytes)):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        try:
            runs = np.array(counts, np.int64)
        except OverflowError:
            raise ValueError("a run length is out of range") from None
    else:
        raise ValueError("expected run lengths, as a list of whole numbers or as text")
    if (runs < 0).any() or (runs > height * width).any():
        raise ValueError("a run length is out of range")
    if runs.sum() != height * width:
        raise ValueError(f"the runs have {runs.sum():,} pixels, but the mask has {width} x {height}")
    return runs


def _decompressed(text: str | bytes) -> Runs:
    """The numbers of a compressed text: each from the third on is the difference to the last but one."""
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise ValueError("the text of the run lengths has a character that is not ASCII") from None
    values = np.frombuffer(data, np.uint8).astype(np.int64) - _FIRST
    if (values < 0).any() or (values >= 64).any():
        raise ValueError("the text of the run lengths has a character out of range")
    if not len(values):
        return values
    is_last = (values & _MORE) == 0
    if not is_last[-1]:
        raise ValueError("the text of the run lengths is cut short")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() >= _CHARACTERS:
        raise ValueError("a run length is out of range")
    place = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((values & 0x1F) << (5 * place), starts)
    numbers[(values[ends] & _SIGN) != 0] -= np.int64(1) << (5 * (place[ends] + 1))[(values[ends] & _SIGN) != 0]
    # The first three stand for themselves; then come sums over every second number.
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
