"""Where every member of every shard lies: a few arrays, and no object per sample.

A million samples as Python objects would be copied page by page in every forked worker, since reading an object writes
its reference count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loaders.datasets.image_files import PackedPaths
from loaders.datasets.tar.scan import Found, scan_shard
from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.decode.files import is_remote
from loaders.system.limits import whole_cores

_THREADS_PER_CORE = 2
REMOTE_THREADS = 32  # they wait for answers
_MOST_EXTENSIONS = 1 << 16
_SHOWN_FROM = 16  # shards; fewer are scanned before a bar could be read

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Samples are numbered through all shards; so are members, those of a sample being neighbours.

    Attributes:
        paths: of the shards, as str.
        shard_sizes, shard_times: int64 (shards,), bytes and nanoseconds; a time of 0 is not compared.
        shard_starts: int64 (shards + 1,), number of the first sample of each shard, and of all samples.
        keys: names without extension, in the order of the samples.
        member_starts: int64 (samples + 1,), number of the first member of each sample, and of all members.
        extensions: the different ones, in lower case and without the first dot.
        kinds: uint16 (members,), numbers of extensions.
        starts, sizes: int64 (members,), where the content of each member is in its shard, in bytes.
        checksums: uint32 (members,), CRC-32 of the two blocks before each: the end of a long name, and the header.
    """

    paths: list[str]
    shard_sizes: Integers
    shard_times: Integers
    shard_starts: Integers
    keys: PackedPaths
    member_starts: Integers
    extensions: list[str]
    kinds: np.ndarray[Any, np.dtype[np.uint16]]
    starts: Integers
    sizes: Integers
    checksums: np.ndarray[Any, np.dtype[np.uint32]]

    def __len__(self) -> int:
        """How many samples."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(value.nbytes for value in vars(self).values() if not isinstance(value, list))

    def shard_of(self, sample: int) -> int:
        """The number of a sample's shard."""
        return int(self.shard_starts.searchsorted(sample, side="right")) - 1

    def holders(self, kinds: Sequence[int]) -> Integers:
        """How many members of these extensions each sample has, int64 (samples,)."""
        is_one = np.zeros(len(self.extensions), np.int64)
        is_one[list(kinds)] = 1
        # Every sample has a member, so no part is empty.
        held: Integers = np.add.reduceat(is_one[self.kinds], self.member_starts[:-1])
        return held

    def only(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> TarIndex:
        """The index of some samples; bool (samples,) says which."""
        ends, of_members = ends_of(kept), np.repeat(kept, np.diff(self.member_starts))
        text, text_ends = self.keys.arrays
        lengths = np.diff(text_ends)
        return replace(
            self,
            shard_starts=ends[self.shard_starts],
            keys=PackedPaths.from_arrays(text[np.repeat(kept, lengths)], ends_of(lengths[kept])),
            member_starts=ends_of(np.diff(self.member_starts)[kept]),
            kinds=self.kinds[of_members],
            starts=self.starts[of_members],
            sizes=self.sizes[of_members],
            checksums=self.checksums[of_members],
        )


def scan(paths: Sequence[str], show: Callable[[int], None] | None = None) -> TarIndex:
    """The index of shards, found by reading the headers of all of them, several at once.

    Args:
        paths: of the shards, in the order of their samples.
        show: called with the number of shards that are done; None shows a bar if there are many and stderr is a
            terminal.

    Raises:
        DatasetError: a shard is unsuitable; it is named.
    """
    if show is None and len(paths) >= _SHOWN_FROM:
        return _with_bar(paths)
    threads = REMOTE_THREADS if any(map(is_remote, paths)) else _THREADS_PER_CORE * whole_cores()
    found: list[Found] = []
    pool = ThreadPoolExecutor(max(1, min(threads, len(paths))), "scan")
    try:
        for one in pool.map(scan_shard, paths):
            found.append(one)
            if show is not None:
                show(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    return _joined(paths, found)


def _with_bar(paths: Sequence[str]) -> TarIndex:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return scan(paths, lambda done: None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Reading the headers of shards", total=len(paths))
        return scan(paths, lambda done: bar.update(task, completed=done))


def _joined(paths: Sequence[str], found: Sequence[Found]) -> TarIndex:
    extensions: dict[bytes, int] = {}
    kinds = []
    for path, one in zip(paths, found, strict=True):
        numbers = [extensions.setdefault(each, len(extensions)) for each in one.extensions]
        if len(extensions) > _MOST_EXTENSIONS:
            raise DatasetError(
                f"The members have more than {_MOST_EXTENSIONS:,} different extensions, the last of them "
                f'"{printable(os.fsdecode(one.extensions[-1]))}" in shard "{printable(path)}".\n  An extension begins '
                "at the first dot of a name: write the shards with keys that have none."
            )
        kinds.append(np.array(numbers, np.uint16)[one.kinds])
    return TarIndex(
        list(paths),
        np.array([one.nbytes for one in found], np.int64),
        np.array([one.mtime_ns for one in found], np.int64),
        ends_of([len(one.keys) for one in found]),
        PackedPaths(key for one in found for key in one.keys),
        ends_of(_all([one.counts for one in found], np.int64)),
        [os.fsdecode(each) for each in extensions],
        _all(kinds, np.uint16),
        _all([one.starts for one in found], np.int64),
        _all([one.sizes for one in found], np.int64),
        _all([one.checksums for one in found], np.uint32),
    )


def ends_of(counts: Any) -> Integers:
    """0, and the sums of the first counts: int64 (counts + 1,)."""
    ends = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends


def _all(parts: Sequence[np.ndarray[Any, Any]], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.empty(0, dtype), *parts])
