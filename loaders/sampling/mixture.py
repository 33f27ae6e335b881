"""Several datasets as one, mixed by ratio."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from loaders.datasets.protocol import Dataset, in_range
from loaders.errors import DatasetError
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.sampling.base import KeyedSampler
from loaders.sampling.permutation import Indices, draw_keys, permutation, scale, scramble
from loaders.sampling.shard import Tail


class Mixture:
    """Mixes datasets: `DataLoader(mixture, batch_size=64, sampler=mixture.sampler())`.

    An epoch is divided into blocks with a little more than two samples of the rarest dataset. At the end of every
    block, counted from the first epoch on, each dataset has had its exact share to within one sample; within a block,
    datasets alternate in a pattern that is fixed per epoch and rotated for each block. Each dataset is read in its own
    shuffled order, continues in the next epoch where it stopped, and is reshuffled when it is exhausted: no sample is
    repeated before all others were read, except in the block in which one round ends and the next begins.

    The sampler's keys are pairs (dataset number, index in it), so that workers do not need the epoch.
    `mixture[position]` is a sample of the first epoch: a loader without the sampler mixes too, but repeats that epoch.

    Args:
        datasets: each with a length and samples by index.
        ratios: shares of the samples of an epoch, one per dataset, positive, in any unit.
        seed: fixes everything that is random.
        num_samples: in an epoch; by default the sum over all datasets.

    Raises:
        DatasetError: no datasets, an empty one, invalid ratios, or an epoch that is too short for them.
    """

    def __init__(
        self, datasets: Sequence[Dataset], ratios: Sequence[float], *, seed: int = 0, num_samples: int | None = None
    ) -> None:
        self.datasets = list(datasets)
        self.ratios = [float(ratio) for ratio in ratios]
        self.seed = operator.index(seed)
        self.lengths = [len(dataset) for dataset in self.datasets]
        if not self.lengths or 0 in self.lengths:
            raise DatasetError(f"A mixture needs datasets that have samples; these have {self.lengths}.")
        if len(self.ratios) != len(self.lengths) or not all(0 < ratio < np.inf for ratio in self.ratios):
            raise DatasetError(
                f"A mixture of {len(self.lengths)} datasets needs as many positive ratios, not {ratios}."
            )
        edges = np.cumsum([0.0, *self.ratios])
        self._shares = edges / edges[-1]
        self._length = sum(self.lengths) if num_samples is None else operator.index(num_samples)
        # More than two samples of each dataset: rounding at both ends of a block cannot make their number negative.
        self._block = int(2 * edges[-1] / min(self.ratios)) + 1
        if self._length < self._block:
            raise DatasetError(
                f"An epoch of {self._length:,} samples is too short for the ratios {self.ratios}: pass num_samples= of "
                f"at least {self._block:,}, for more than two samples of each dataset."
            )
        self._turn_key = draw_keys(KeyedGenerator().rekey(Domain.MIXTURE, self.seed, 0, 0), 1)[0]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: SupportsIndex | tuple[int, int]) -> Any:
        number, index = self._resolve(key)
        return self.datasets[number][index]

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def describe(self, key: SupportsIndex | tuple[int, int]) -> str:
        """The dataset's description of the sample; else its index in the dataset."""
        number, index = self._resolve(key)
        describe = getattr(self.datasets[number], "describe", None)
        return (str(describe(index)) if describe else "") or f"sample {index} of dataset {number}"

    def _resolve(self, key: SupportsIndex | tuple[int, int]) -> tuple[int, int]:
        if isinstance(key, tuple):
            return key
        number, index = self.locate(np.array([in_range(key, len(self))]))[0].tolist()
        return number, index

    def sampler(
        self, *, rank: int | None = None, num_replicas: int | None = None, tail: Tail = "pad", batch_size: int = 1
    ) -> MixtureSampler:
        """The sampler for a DataLoader over this mixture. Arguments as in `ShardedSampler`."""
        return MixtureSampler(self, rank, num_replicas, tail, batch_size)

    def locate(self, positions: Indices, epoch: int = 0) -> Indices:
        """The dataset number and the index in it at each of the given positions of an epoch.

        Args:
            positions: int64 (N,), in [0, len(self)).

        Returns:
            int64 (N, 2), rows of (dataset number, index).
        """
        blocks = self._length // self._block
        block = np.minimum(positions // self._block, blocks - 1)  # the last one takes what remains
        start = block * self._block
        stop = np.where(block == blocks - 1, self._length, start + self._block)
        before, after = (np.rint(self._shares * (epoch * self._length + at)[:, None]) for at in (start, stop))
        edges = (after - before).astype(np.int64)  # (N, datasets + 1): the block's slots, dataset by dataset
        slots = self._slots(positions - start, stop - start, epoch * blocks + block, epoch)
        number = (slots[:, None] >= edges[:, 1:]).sum(axis=1)
        row = np.arange(len(positions))
        drawn = (before[row, number + 1] - before[row, number]).astype(np.int64) + slots - edges[row, number]
        located = np.stack([number, drawn], axis=1)
        for dataset, length in enumerate(self.lengths):
            mine = np.flatnonzero(number == dataset)
            rounds, at = np.divmod(drawn[mine], length)
            for number_of_round in np.unique(rounds).tolist():
                now = rounds == number_of_round
                order = permutation(length, Domain.MIXTURE, self.seed, number_of_round, 2 + dataset)
                located[mine[now], 1] = order(at[now])
        return located

    def _slots(self, slots: Indices, sizes: Indices, blocks: Indices, epoch: int) -> Indices:
        """Permute slots within their blocks: by the epoch's pattern, rotated by a hash of the block's number."""
        turns = blocks.astype(np.uint64)
        scramble(turns, self._turn_key, turns, np.empty_like(turns))
        scale(turns, sizes.astype(np.uint64))
        turned = (slots + turns.view(np.int64)) % sizes
        for size in np.unique(sizes).tolist():
            pattern = permutation(size, Domain.MIXTURE, self.seed, epoch, 1)
            turned[sizes == size] = pattern(turned[sizes == size])
        return turned


class MixtureSampler(KeyedSampler):
    """The order of a `Mixture`; made by `mixture.sampler()`.

    Yields:
        (int, int), the dataset's number and the index in it.
    """

    def __init__(
        self, mixture: Mixture, rank: int | None, num_replicas: int | None, tail: Tail, batch_size: int
    ) -> None:
        super().__init__(len(mixture), mixture.seed, rank, num_replicas, tail, batch_size)
        self._mixture = mixture

    def _at(self, positions: Indices, epoch: int) -> Indices:
        return self._mixture.locate(positions, epoch)

    def _keys(self, rows: Indices) -> list[Any]:
        return list(zip(*rows.T.tolist(), strict=True))

    def _identity(self) -> dict[str, Any]:
        return {"lengths": self._mixture.lengths, "ratios": self._mixture.ratios}
