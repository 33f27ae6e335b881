"""Batches of several structures, and a loader that counts how many are requested."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import torch

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


class CountingLoader:
    """Batches 0 … n-1. Counts how many were requested in the current pass, and raises at `error_at`."""

    def __init__(self, n, error_at=None):
        self.n = n
        self.error_at = error_at
        self.pulled = 0
        self.passes = 0
        self.batch_size = 3
        self.epoch = None

    def __len__(self):
        return self.n

    def __iter__(self):
        self.passes += 1
        self.pulled = 0
        return self._batches()

    def _batches(self):
        for step in range(self.n):
            if step == self.error_at:
                raise OSError(f"batch {step} cannot be read")
            self.pulled += 1
            yield torch.tensor([step])

    def set_epoch(self, epoch):
        self.epoch = epoch
