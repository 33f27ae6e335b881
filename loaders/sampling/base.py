"""The base class of the samplers: sharding over ranks, iteration in blocks, and a state of a few numbers."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from loaders.errors import StateError
from loaders.sampling.permutation import MAX_N, Indices
from loaders.sampling.shard import Tail, epoch_length, find_rank

_VERSION = 1
# Long enough that NumPy's cost per call is negligible, short enough that a block's arrays stay in the CPU cache.
_BLOCK = 1 << 14


class _Walk:
    """The progress of one iteration; `ahead` yields the keys of its block that are not taken yet."""

    def __init__(self, epoch: int, end: int) -> None:
        self.epoch = epoch
        self.end = end
        self.ahead: Iterator[Any] = iter([])


class KeyedSampler(ABC):
    """An order of `n` positions per epoch, sharded over ranks.

    Rank r of w takes positions r, r + w, r + 2w, …: batch k of all ranks together contains the same samples for any w,
    as long as w · batch_size is the same. A subclass defines which sample belongs to a position, as a pure function of
    epoch and position: nothing is stored, any position can be computed directly, and resuming costs nothing.

    Attributes:
        n: positions in an epoch, before the tail.
        length: positions in an epoch over all ranks, after padding or dropping the tail.
        epoch: the epoch of the next iteration, set by `set_epoch`.
        rank, num_replicas: this sampler's share.
    """

    def __init__(
        self, n: int, seed: int, rank: int | None, num_replicas: int | None, tail: Tail, batch_size: int
    ) -> None:
        if not 0 <= n <= MAX_N:
            raise ValueError(f"an epoch has between 0 and 2**40 samples, not {n:,}")
        if batch_size < 1:
            raise ValueError(f"batch_size should be a positive integer, but got {batch_size}")
        self.n = n
        self.seed = operator.index(seed)
        self.tail: Tail = tail
        self.rank, self.num_replicas = find_rank(rank, num_replicas)
        self.length = epoch_length(n, tail, self.num_replicas * batch_size)
        self.epoch = 0
        self._walk = _Walk(0, 0)
        self._resumed: _Walk | None = None

    @abstractmethod
    def _at(self, positions: Indices, epoch: int) -> Indices:
        """The samples at positions in [0, n), int64 with one row per position."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What determines the order besides `n`, `seed` and `tail`: plain values that a state must match."""

    def _keys(self, rows: Indices) -> list[Any]:
        """The rows of `_at` as the keys that the dataset takes."""
        keys: list[Any] = rows.tolist()
        return keys

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, as with torch's DistributedSampler."""
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"epoch should not be negative, but got {epoch}")
        self.epoch = epoch

    def positions(self) -> range:
        """This rank's positions in the epoch: sample j of this sampler is at `positions()[j]`."""
        return range(self.rank, self.length, self.num_replicas)

    def indices(self, start: int, stop: int) -> Indices:
        """The indices at positions `start` to `stop` of the epoch, over all ranks.

        Returns:
            int64 (stop - start,), or (stop - start, 2) where keys are pairs.

        Raises:
            IndexError: not 0 <= start <= stop <= length.
        """
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"positions {start} to {stop} are out of range: the epoch has {self.length:,}")
        return self._padded(range(start, stop), self.epoch)

    def _padded(self, positions: range, epoch: int) -> Indices:
        at = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        # An epoch is padded with its own beginning.
        return self._at(at % self.n if positions.stop > self.n else at, epoch)

    def __len__(self) -> int:
        return len(self.positions())

    def __iter__(self) -> Iterator[Any]:
        """The keys of this rank's share; the first iteration after `load_state_dict` yields the rest of it."""
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterator[Any]]:
        # A generator starts when its first key is requested: an iterator that is never used changes nothing.
        resumed, self._resumed = self._resumed, None
        walk = self._walk = _Walk(self.epoch, resumed.end if resumed and resumed.epoch == self.epoch else 0)
        rest = range(walk.end + self.rank, self.length, self.num_replicas)
        for at in range(0, len(rest), _BLOCK):
            block = rest[at : at + _BLOCK]
            keys = self._keys(self._padded(block, walk.epoch))
            walk.ahead, walk.end = iter(keys), walk.end + len(block) * self.num_replicas
            yield walk.ahead
        walk.end = self.length

    def state_dict(self) -> dict[str, Any]:
        """The progress of the iteration that was started last, as numbers, strings and lists of them.

        "position" counts the samples taken in this epoch over all ranks, which advance in step: a state fits any rank,
        and any world size for which the epoch has the same length (see `batch_size`). A loader that takes keys ahead
        may replace it with the position that it has delivered.
        """
        # The length hint of a list's iterator is exact, and costs nothing while iterating.
        taken = self._walk.end - operator.length_hint(self._walk.ahead) * self.num_replicas
        position = min(taken, self.length) if self._walk.epoch == self.epoch else 0
        return {**self._must_agree(), "epoch": self.epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the next iteration where `state` was taken, in the epoch of the state.

        Takes the same time at any position. After the state of a finished epoch the next iteration is empty: call
        `set_epoch` for the next epoch.

        Raises:
            StateError: the state is of another order of samples, or is not a valid one. The sampler is then unchanged.
        """
        differences = [
            f"{name} is {state[name]!r} in the state and {mine!r} here" if name in state else f"the state has no {name}"
            for name, mine in self._must_agree().items()
            if name not in state or state[name] != mine
        ]
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if not (isinstance(epoch, int) and isinstance(position, int) and epoch >= 0 and position >= 0):
            differences.append(f"there is no position {position!r} of epoch {epoch!r}")
        if differences:
            raise StateError(
                f"This state does not fit this {type(self).__name__}: {'; '.join(differences)}.\n  Make the sampler as "
                "it was when the state was taken. If only length differs, the world size changed: pass batch_size= so "
                "that num_replicas * batch_size stays the same."
            )
        self.epoch = epoch
        # With shares of different lengths, the position at the end of the longest one may exceed the epoch.
        self._walk = self._resumed = _Walk(epoch, min(position, self.length))

    def next_order(self) -> dict[str, Any] | None:
        """What fixes the next iteration; None if it does not begin at the start of its epoch."""
        if self._resumed is not None:
            return None
        return {**self._must_agree(), "epoch": self.epoch, "rank": self.rank, "num_replicas": self.num_replicas}

    def follow(self, sampler: KeyedSampler) -> None:
        """Count the iteration of another sampler of the same order as one's own."""
        self._walk = sampler._walk

    def _must_agree(self) -> dict[str, Any]:
        common = {"version": _VERSION, "n": self.n, "seed": self.seed, "tail": self.tail, "length": self.length}
        return common | self._identity()
