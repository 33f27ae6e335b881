"""How probable counts are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def chi_square_p(counts: Any, expected: Any) -> float:
    """The probability of counts at least as far from `expected` as these, by the Wilson-Hilferty approximation.

    Cells whose expectation is 0 must be empty; the others must expect five or more.
    """
    counts, expected = np.ravel(counts).astype(float), np.broadcast_to(expected, np.shape(counts)).ravel().astype(float)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() >= 5
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def bin_uniform_p(values: Any, size: int, bins: int = 64) -> float:
    """`chi_square_p` of values that should be uniform on [0, size)."""
    bins = min(bins, size)
    edges = [-(-size * edge // bins) for edge in range(bins + 1)]  # bin k holds the values from edges[k] on
    counts = np.bincount(np.asarray(values) * bins // size, minlength=bins)
    return chi_square_p(counts, np.diff(edges) / size * len(values))
