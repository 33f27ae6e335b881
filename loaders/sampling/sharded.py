"""Each sample once per epoch, shuffled or in order."""

from __future__ import annotations

import operator
from typing import Any

from loaders.randomness.streams import Domain
from loaders.sampling.base import KeyedSampler
from loaders.sampling.permutation import Indices, permutation
from loaders.sampling.shard import Tail


class ShardedSampler(KeyedSampler):
    """Shuffles `n` samples without a list of them, and shards them over ranks.

    For `sampler=` of any DataLoader, in place of torch's RandomSampler and DistributedSampler: the first of a billion
    indices takes no longer than the first of a thousand, in constant memory. Call `set_epoch` before each epoch, on
    every rank. Lightning and Accelerate shard samples over the ranks themselves: there pass rank=0 and num_replicas=1,
    or to Lightning `use_distributed_sampler=False`.

    Args:
        n: number of samples, `len(dataset)`; at most 2⁴⁰.
        shuffle: a new order each epoch, determined by (seed, epoch); else 0, 1, 2, ….
        seed: the same on all ranks.
        rank, num_replicas: this share, and the number of shares. By default those of torch.distributed if it is
            initialised, else of the environment (RANK and WORLD_SIZE, as torchrun sets them), else 0 and 1.
        tail: if the global batch, num_replicas · batch_size samples, does not divide `n`: "pad" repeats samples from
            the beginning of the epoch's order until it does, "drop" leaves out the remainder, "uneven" does neither, so
            shares differ in length by at most one sample.
        batch_size: of one rank; a sampler cannot see its loader's. Pass it if the epoch must be the same on another
            number of ranks. By default the tail depends on num_replicas alone, as in torch's DistributedSampler.

    Yields:
        int, an index in [0, n).

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        n: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        tail: Tail = "pad",
        batch_size: int = 1,
    ) -> None:
        try:
            n = operator.index(n)
        except TypeError:
            raise TypeError(
                f"n should be a number of samples, such as len(dataset), but got {type(n).__name__}"
            ) from None
        super().__init__(n, seed, rank, num_replicas, tail, batch_size)
        self.shuffle = bool(shuffle)

    def _at(self, positions: Indices, epoch: int) -> Indices:
        return permutation(self.n, Domain.ORDER, self.seed, epoch)(positions) if self.shuffle else positions

    def _identity(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle}
