"""How a loader makes its batches: decided once from its arguments, then learned from what comes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, default_convert

from loaders.batch.collate import numpy_collate, registered_collation
from loaders.batch.spec import BatchSpec
from loaders.datasets.wrapped import reads_batches
from loaders.workers.messages import Fetch, Parcel

# Open batches by default, besides those in the consumer's hands: more would only leave the cache, fewer would let
# workers wait while the consumer looks away.
_DEPTH = 3
# Batches this large fill the processor's cache by themselves: of these one less is open.
_LARGE_NBYTES = 24 << 20


class Plan:
    """The shape of the work of one loader.

    Attributes:
        fetch: how samples are read.
        batched: False with `batch_size=None`.
        by_rows: samples go into the rows of a slot; else a collate_fn makes the batch in one worker.
        by_runs: a batch is shared by several workers.
        spec: of the rows, once the first sample was seen.
        room: rows of a slot, the largest batch so far.
    """

    def __init__(self, dataset: Any, collate_fn: Any, batch_size: int | None, batched: bool, depth: int | None) -> None:
        self.batched = batched
        self.fetch: Fetch = "each"
        if isinstance(dataset, IterableDataset):
            self.fetch = "stream"
        elif batched and reads_batches(dataset):
            self.fetch = "all"
        self.by_rows = batched and collate_fn in (default_collate, numpy_collate) and not registered_collation()
        self.by_runs = self.by_rows and self.fetch == "each"
        # default_convert only wraps, which the consumer does for nothing; any other function runs in the worker.
        self.collate = None if self.by_rows or (not batched and collate_fn is default_convert) else collate_fn
        self.room = (batch_size or 1) if batched else 1
        self.spec: BatchSpec | None = None
        self._depth = depth
        self._parcel_sizes: list[int] = []

    def depth(self, workers: int) -> int:
        """How many batches are open at once."""
        if self._depth is not None:
            return max(1, self._depth)
        if not self.by_runs:
            return workers + 2
        depth = _DEPTH if sum(self.sizes()) < _LARGE_NBYTES else _DEPTH - 1
        return max(depth, math.ceil(2 * workers / self.room) + 1)

    def sizes(self) -> list[int]:
        """Bytes of the blocks of the next slot; 0 where a field has none."""
        return self.layout()[1]

    def layout(self) -> tuple[BatchSpec | None, list[int]]:
        """The spec of the next slot and the bytes of its blocks, of one moment: other threads may iterate as well."""
        spec = self.spec
        if not self.by_rows:
            return spec, list(self._parcel_sizes)
        return spec, spec.sizes(self.room) if spec is not None else []

    def learn(self, needs: Mapping[int, tuple[int, ...]], parcel: Parcel | None) -> None:
        """Make room in the slots to come for what did not fit into this one.

        Args:
            needs: field number → the largest shape that did not fit into its row.
            parcel: the result of a collate_fn. Results of another size get a quarter more than they took.
        """
        if self.spec is not None:
            self.spec = self.spec.grown(needs)
        for number, piece in enumerate(parcel.pieces if parcel is not None else ()):
            if number == len(self._parcel_sizes):
                self._parcel_sizes.append(0)
            if not isinstance(piece, int) and len(piece) > 0:
                room = len(piece) if self._parcel_sizes[number] == 0 else len(piece) + (len(piece) >> 2)
                self._parcel_sizes[number] = max(self._parcel_sizes[number], room)

    @staticmethod
    def as_indices(keys: Sequence[Any]) -> Any:
        """What `return_index=True` delivers: int64 (B,), or a list where the keys are no ints."""
        return torch.tensor(keys, dtype=torch.int64) if all(type(key) is int for key in keys) else list(keys)
