"""What the samplers share: sharding over ranks, iteration in blocks, and a state of a few numbers."""

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
# Long enough that NumPy's cost per call vanishes, short enough that the block's arrays stay in the cache.
_BLOCK = 1 << 14


class _Walk:
    """How far one iteration has come: `ahead` are the keys of its block that were not taken yet."""

    def __init__(self, epoch: int, end: int) -> None:
        self.epoch = epoch
        self.end = end
        self.ahead: Iterator[Any] = iter([])


class KeyedSampler(ABC):
    """An order of `n` positions per epoch, shared out over ranks.

    Rank r of w takes positions r, r + w, r + 2w, …: all ranks' batches number k are together the same samples for any
    w, as long as w · batch_size is the same. A subclass says which sample belongs to a position, as a pure function of
    the epoch and the position: so nothing is stored, any position can be asked for, and resuming costs nothing.

    Attributes:
        n: positions in an epoch, before the tail.
        length: positions in an epoch over all ranks, with what the tail adds or takes away.
        epoch: the epoch that the next iteration goes through; `set_epoch` sets it.
        rank, num_replicas: which share is this one's.
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
        """What fixes the order besides `n`, `seed` and `tail`: plain values that a state must agree with."""

    def _keys(self, rows: Indices) -> list[Any]:
        """The rows of `_at` as the keys that the dataset takes."""
        keys: list[Any] = rows.tolist()
        return keys

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through, as with torch's DistributedSampler."""
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"epoch should not be negative, but got {epoch}")
        self.epoch = epoch

    def positions(self) -> range:
        """The positions in the epoch that are this rank's: sample j of this sampler stands at `positions()[j]`."""
        return range(self.rank, self.length, self.num_replicas)

    def indices(self, start: int, stop: int) -> Indices:
        """What stands at positions `start` to `stop` of the epoch, all ranks together.

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
        # What pads the epoch is its own beginning.
        return self._at(at % self.n if positions.stop > self.n else at, epoch)

    def __len__(self) -> int:
        return len(self.positions())

    def __iter__(self) -> Iterator[Any]:
        """The keys of this rank's share; after `load_state_dict`, once, of what is left of it."""
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterator[Any]]:
        # A generator begins with the first key asked for: an iterator that is dropped unused changes nothing.
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
        """Where the iteration that began last has come to, in numbers, strings and lists of them.

        "position" counts the samples of the epoch that were taken over all ranks, which go in step: a state fits any
        rank, and any world size that makes the epoch as long (see `batch_size`). A loader that draws ahead may put the
        position that it has delivered in its place.
        """
        # A list's iterator knows exactly how much is left of it, at no cost while iterating.
        taken = self._walk.end - operator.length_hint(self._walk.ahead) * self.num_replicas
        position = min(taken, self.length) if self._walk.epoch == self.epoch else 0
        return {**self._must_agree(), "epoch": self.epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken; the epoch becomes the state's.

        Costs the same wherever it is. A state of a finished epoch leaves nothing of it: choose the next by `set_epoch`.

        Raises:
            StateError: the state is of another order of samples, or is no such state. Nothing has changed then.
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
                "it was when the state was taken. If only length differs, the world size changed: give batch_size= so "
                "that num_replicas * batch_size stays the same."
            )
        self.epoch = epoch
        # Of shares that differ in length, the longest one ends past the epoch when it is counted for all ranks.
        self._walk = self._resumed = _Walk(epoch, min(position, self.length))

    def _must_agree(self) -> dict[str, Any]:
        common = {"version": _VERSION, "n": self.n, "seed": self.seed, "tail": self.tail, "length": self.length}
        return common | self._identity()
