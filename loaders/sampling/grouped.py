"""Each sample once per epoch, shuffled, but from few groups at a time."""

from __future__ import annotations

import operator
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.randomness.streams import Domain
from loaders.sampling.base import KeyedSampler
from loaders.sampling.permutation import Indices, permutation
from loaders.sampling.shard import Tail

# Streams of the permutations of an epoch: one for the groups, then one per buffer.
_OF_GROUPS, _OF_BUFFERS = 0, 1


class _Layout(NamedTuple):
    """Where the groups are in one epoch.

    Attributes:
        epoch: which.
        firsts: int64 (groups,), in the epoch's order: index of the first sample of each group.
        begins: int64 (groups,), its position in the epoch, before samples are shuffled.
        ends: int64 (groups,), where it ends.
        buffers: int64 (buffers + 1,), position at which each buffer begins, and the number of samples.
    """

    epoch: int
    firsts: Indices
    begins: Indices
    ends: Indices
    buffers: Indices


class GroupedSampler(KeyedSampler):
    """Shuffles samples that are stored in groups, of which it reads few at a time: `GroupedSampler(d.group_sizes)`.

    For shards on disks, and for stores where random access is dear. Groups are shuffled, and every `groups_open` of
    them form a buffer, whose samples are shuffled completely; buffers follow one another. So the samples of a run of
    positions that is not longer than a buffer come from at most `groups_open` groups, or twice as many where a buffer
    ends in it. Nothing is stored but a few numbers per group: the sample at any position is computed, so that resuming
    costs nothing, and shares, world sizes and states are as in `ShardedSampler`.

    How well it mixes: a batch is drawn from the k random groups of a buffer and not from all G: k = G / ceil(G /
    groups_open), which is `groups_open` where that divides G, and less otherwise, since buffers are of equal size. If a
    property of the samples differs from group to group with variance b, and within groups with variance w, then its
    mean over a batch of B samples has the variance (b + w) / B of a full shuffle, and b / k in addition, times (G - k)
    / (G - 1). Where groups are alike, b is 0 and nothing is lost. Where each group holds one class, open many, or write
    them again in a random order.

    Args:
        group_sizes: int (groups,), the number of samples in each group; the samples of a group are neighbours, in the
            order of the groups. `TarFiles` and `ArrowDataset` have them as `group_sizes`.
        groups_open: groups per buffer, at most. Several ranks read the same ones at the same time.
        seed, rank, num_replicas, tail, batch_size: as in `ShardedSampler`.

    Yields:
        int, an index in [0, sum(group_sizes)).

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        group_sizes: npt.ArrayLike,
        *,
        groups_open: int = 16,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        tail: Tail = "pad",
        batch_size: int = 1,
    ) -> None:
        sizes = np.asarray(group_sizes)
        if sizes.ndim != 1 or not (sizes.dtype.kind in "iu" or sizes.size == 0) or (sizes < 0).any():
            raise ValueError(f"group_sizes should be numbers of samples, int (groups,), but got {group_sizes!r}")
        self.groups_open = operator.index(groups_open)
        if self.groups_open < 1:
            raise ValueError(f"groups_open should be a positive integer, but got {groups_open}")
        self._sizes = np.ascontiguousarray(sizes, np.int64)
        super().__init__(int(self._sizes.sum()), seed, rank, num_replicas, tail, batch_size)
        self._checksum = zlib.crc32(self._sizes.astype("<i8").data)
        self._layout: _Layout | None = None

    def _at(self, positions: Indices, epoch: int) -> Indices:
        layout = self._laid_out(epoch)
        numbers = layout.buffers.searchsorted(positions, side="right") - 1
        mixed = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            begin, end = layout.buffers[number : number + 2].tolist()
            order = permutation(end - begin, Domain.GROUPED, self.seed, epoch, _OF_BUFFERS + number)
            mixed[mine] = begin + order(positions[mine] - begin)
        group = layout.ends.searchsorted(mixed, side="right")
        found: Indices = layout.firsts[group] + mixed - layout.begins[group]
        return found

    def _laid_out(self, epoch: int) -> _Layout:
        layout = self._layout
        if layout is None or layout.epoch != epoch:
            groups = len(self._sizes)
            order = permutation(groups, Domain.GROUPED, self.seed, epoch, _OF_GROUPS)(np.arange(groups))
            sizes = self._sizes[order]
            ends = np.cumsum(sizes)
            # Buffers of as equal numbers of groups as possible: a last one of few groups would mix badly.
            buffers = -(-groups // self.groups_open)
            cuts = np.arange(buffers + 1) * groups // max(1, buffers)
            starts = np.concatenate([[0], ends])[cuts]
            firsts = (np.cumsum(self._sizes) - self._sizes)[order]
            # Empty buffers would be found in place of the one that begins at the same position.
            layout = self._layout = _Layout(epoch, firsts, ends - sizes, ends, np.unique(starts))
        return layout

    def _identity(self) -> dict[str, Any]:
        return {"groups_open": self.groups_open, "group_sizes_crc32": self._checksum}
