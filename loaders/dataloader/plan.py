"""How a loader makes its batches: decided from its arguments, then adapted to the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, default_convert

from loaders.batch.collate import numpy_collate, registered_collation
from loaders.batch.spec import BatchSpec, Needs
from loaders.datasets.wrapped import reads_batches
from loaders.workers.messages import Fetch, Parcel

# Open batches by default, besides those that the consumer holds: more would only exceed the cache, fewer would let
# workers wait while the consumer is busy.
_DEPTH = 3
# Batches this large fill the processor's cache by themselves: one fewer is open.
_LARGE_NBYTES = 24 << 20


@dataclass(frozen=True)
class Options:
    """The other arguments of a loader, as they are when an iteration begins."""

    dataset: Any
    num_workers: int
    in_order: bool
    timeout_s: float
    on_error: str
    max_errors: int
    pin_memory: bool
    return_index: bool


class Plan:
    """How one loader reads samples and makes batches.

    Attributes:
        collate_fn: the user's, or torch's default.
        fetch: how samples are read; see `Job`.
        batched: False with `batch_size=None`.
        by_rows: samples are written into the rows of a slot; else a collate_fn makes the batch in one worker.
        by_spans: several workers share a batch.
        spec: of the rows; None until the first sample was read.
        room: rows of a slot: those of the largest batch so far.
    """

    def __init__(self, dataset: Any, collate_fn: Any, batch_size: int | None, batched: bool, depth: int | None) -> None:
        self.batched = batched
        self.collate_fn = collate_fn
        self.fetch: Fetch = "each"
        if isinstance(dataset, IterableDataset):
            self.fetch = "stream"
        elif batched and reads_batches(dataset):
            self.fetch = "all"
        self.by_rows = batched and collate_fn in (default_collate, numpy_collate) and not registered_collation()
        self.by_spans = self.by_rows and self.fetch == "each"
        # default_convert only wraps, which costs the consumer nothing; any other function runs in the worker.
        self.collate = None if self.by_rows or (not batched and collate_fn is default_convert) else collate_fn
        # The rows of a stream's batch are known only once it is read; else room grows with the sampler's batches.
        self.room = (batch_size or 1) if batched and self.fetch == "stream" else 1
        self.spec: BatchSpec | None = None
        self._depth = depth
        self._batch_size = (batch_size or 1) if batched else 1
        self._parcel_sizes: list[int] = []
        self._sized: tuple[BatchSpec | None, int, list[int]] = (None, 0, [])  # spec, room and their sizes, kept

    def depth(self, workers: int) -> int:
        """How many batches are open at once."""
        if self._depth is not None:
            return max(1, self._depth)
        if not self.by_spans:
            return workers + 2
        depth = _DEPTH if sum(self.sizes()) < _LARGE_NBYTES else _DEPTH - 1
        return max(depth, math.ceil(4 * workers / max(self.room, self._batch_size)) + 1)

    def sizes(self) -> list[int]:
        """Bytes of the blocks of the next slot; 0 where a field has none."""
        return self.layout()[1]

    def layout(self) -> tuple[BatchSpec | None, list[int], int]:
        """The spec, bytes per block and rows of the next slot, read together: other threads may iterate."""
        spec, room = self.spec, self.room
        if not self.by_rows:
            return spec, list(self._parcel_sizes), room
        sized = self._sized
        if spec is not None and (sized[0] is not spec or sized[1] != room):
            self._sized = sized = (spec, room, spec.sizes(room))
        return spec, sized[2] if spec is not None else [], room

    def learn(self, needs: Needs, parcel: Parcel | None) -> None:
        """Make room in later slots for what did not fit into this one.

        Args:
            needs: what did not fit.
            parcel: the result of a collate_fn. A larger one than before gets room for a quarter more than it took.
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
        """What `return_index=True` delivers: int64 (B,), or a list where the keys are not ints."""
        return torch.tensor(keys, dtype=torch.int64) if all(type(key) is int for key in keys) else list(keys)
