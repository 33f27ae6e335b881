"""An epoch of shards is the same whoever reads it, also killed in the middle and finished by other ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import inside
from support.photo_zoo import jpeg, photo
from support.tars import write_tar
from support.waiting import assert_no_workers

from loaders import ArrowDataset, DataLoader, GroupedSampler, RandomResizedCrop, ShardedSampler, TarFiles
from loaders.randomness.streams import enter_sample, leave_sample

SEED, SIZES, GLOBAL_BATCH = 11, [7, 3, 0, 12, 5, 8], 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate(SIZES):
        entries, rows = [], []
        for _ in range(size):
            rows.append({"image": jpeg(photo(60 + number, 50), restart=number % 3), "label": number})
            entries += [(f"{number:03}.jpg", rows[-1]["image"]), (f"{number:03}.cls", b"%d" % number)]
            number += 1
        write_tar(folder / f"{shard}.tar", entries)
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet", row_group_size=5)
    TarFiles(folder / "*.tar", index=folder / "index")
    return folder


def made(root: Path, kind: str) -> TarFiles | ArrowDataset:
    if kind == "parquet":
        return ArrowDataset(root / "*.parquet", image="image", crop=RandomResizedCrop(12, flip=0.5))
    return TarFiles(root / "*.tar", crop=RandomResizedCrop(12, flip=0.5), index=root / "index")


def sampler_of(kind: str, dataset: TarFiles | ArrowDataset, rank: int, world: int) -> Any:
    options: dict[str, Any] = {"seed": 3, "rank": rank, "num_replicas": world, "batch_size": GLOBAL_BATCH // world}
    if kind != "sharded":
        return GroupedSampler(dataset.group_sizes, groups_open=2, **options)
    return ShardedSampler(len(dataset), **options)


def plain_loop(root: Path, kind: str) -> list[dict[str, np.ndarray]]:
    """Global batches by their definition: one sample after the other."""
    dataset = made(root, kind)
    sampler, rows = sampler_of(kind, dataset, 0, 1), []
    sampler.set_epoch(1)
    for position, index in enumerate(sampler):
        enter_sample(SEED, 1, position)
        rows.append(dataset[index])
    leave_sample()
    return [
        {name: np.stack([row[name] for row in rows[at : at + GLOBAL_BATCH]]) for name in ("image", "label")}
        for at in range(0, len(rows), GLOBAL_BATCH)
    ]


def read(
    root: Path, kind: str, world: int, options: dict[str, Any], state: Any, stop: int, kill: bool
) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Up to `stop` global batches, and the state behind them."""
    ranks, states = [], []
    for rank in range(world):
        dataset = made(root, kind)
        sampler = sampler_of(kind, dataset, rank, world)
        loader = DataLoader(dataset, GLOBAL_BATCH // world, sampler=sampler, seed=SEED, **options)
        if state is None:
            loader.set_epoch(1)
        else:
            loader.load_state_dict(state)
        iterator, batches = iter(loader), []
        for batch in iterator:
            batches.append({name: value.clone() for name, value in batch.items()})
            if kill and len(batches) == 1:
                os.kill(next(iter(inside.processes_of(iterator))).process.pid, signal.SIGKILL)
            if len(batches) == stop:
                break
        ranks.append(batches)
        states.append(loader.state_dict())
        del iterator
    assert all(each == states[0] for each in states)
    joined = [
        # Row j of rank r stands at position j * world + r.
        {name: torch.stack([rank[name] for rank in batch], 1).flatten(0, 1).numpy() for name in batch[0]}
        for batch in zip(*ranks, strict=True)
    ]
    return joined, states[0]


@pytest.mark.parametrize("kind", ["grouped", "sharded", "parquet"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, {"num_workers": 2}), (2, {"num_workers": 0})),
        ((2, {"num_workers": 1}), (4, {"num_workers": 2, "worker_method": "thread"})),
        ((4, {"num_workers": 0}), (1, {"num_workers": 2})),
    ],
)
def test_a_killed_and_resumed_epoch_has_the_bits_of_a_plain_loop(
    kind: str, first: Any, second: Any, root: Path
) -> None:
    expected = plain_loop(root, kind)
    assert len(expected) == 9
    begun, state = read(root, kind, *first, None, 3, "worker_method" not in first[1] and first[1]["num_workers"] > 0)
    rest, _ = read(root, kind, *second, state, 6, False)
    for mine, other in zip(begun + rest, expected, strict=True):
        for name in ("image", "label"):
            np.testing.assert_array_equal(mine[name], other[name])
    assert_no_workers()
