"""Samples by weight, with replacement."""

from __future__ import annotations

import operator
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.sampling.base import KeyedSampler
from loaders.sampling.permutation import Indices, draw_keys, scramble
from loaders.sampling.shard import Tail

_KEPT_BITS = 53  # of a float64


class WeightedSampler(KeyedSampler):
    """Draws samples with replacement, in proportion to their weights; each position of an epoch is drawn on its own.

    Like torch's WeightedRandomSampler, but determined by (seed, epoch, position), so that shares, resuming and world
    sizes work as in `ShardedSampler`; the other arguments are as there. Each sample costs one binary search.

    Args:
        weights: float (n,), finite and not negative, in any unit; array, sequence or CPU tensor. A sample of weight 0
            is never drawn.
        num_samples: draws per epoch over all ranks; at most 2⁴⁰.

    Yields:
        int, an index in [0, len(weights)).

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        num_samples: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        tail: Tail = "pad",
        batch_size: int = 1,
    ) -> None:
        super().__init__(operator.index(num_samples), seed, rank, num_replicas, tail, batch_size)
        array = np.ascontiguousarray(weights, np.float64)
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"weights should be finite and not negative, shape (n,), but got {array!r}")
        with np.errstate(over="ignore"):  # reported below
            self._ends = np.cumsum(array)
        total = self._ends[-1] if len(array) else 0.0
        if not 0 < total < np.inf:
            raise ValueError(f"weights should have a positive and finite sum, but {len(array):,} have the sum {total}")
        self._checksum = zlib.crc32(array.data)

    def _at(self, positions: Indices, epoch: int) -> Indices:
        (key,) = draw_keys(KeyedGenerator().rekey(Domain.WEIGHTED, self.seed, epoch, 0), 1)
        draws = positions.astype(np.uint64)
        scramble(draws, key, draws, np.empty_like(draws))
        uniform = (draws >> np.uint64(64 - _KEPT_BITS)) * 2.0**-_KEPT_BITS
        # Rounding may raise the product to the sum itself, which is past the last sample.
        heights = np.minimum(uniform * self._ends[-1], np.nextafter(self._ends[-1], 0))
        return np.asarray(np.searchsorted(self._ends, heights, side="right"), np.int64)

    def _identity(self) -> dict[str, Any]:
        return {"weights_crc32": self._checksum}
