"""Ranks draw apart, also where nothing but the processes themselves tells them apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed
from torch.utils.data import DistributedSampler, IterableDataset, Subset

from loaders import DataLoader, ShardedSampler, sample_rng
from loaders.randomness.ranks import drawing_rank, process_rank


class Draws:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return {"index": index, "drawn": sample_rng().random(), "legacy": np.random.rand()}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ({"drawn": sample_rng().random(), "legacy": np.random.rand()} for _ in range(8))


def drawn(*arguments: Any, **more: Any) -> set[float]:
    rows = [batch for _ in range(2) for batch in DataLoader(*arguments, seed=3, **more)]
    return {value for batch in rows for name in ("drawn", "legacy") for value in np.atleast_1d(batch[name]).tolist()}


LOADERS: dict[str, Any] = {
    "a subset for each rank": lambda rank: drawn(Subset(Draws(), range(rank * 8, rank * 8 + 8)), 4),
    "a sampler of the user's": lambda rank: drawn(Draws(), 4, sampler=range(rank * 8, rank * 8 + 8)),
    "a batch sampler of the user's": lambda rank: drawn(Draws(), batch_sampler=[[rank, 2], [3]]),
    "a stream": lambda rank: drawn(Stream(), 4),
    "a stream in workers": lambda rank: drawn(Stream(), 4, num_workers=2, multiprocessing_context="fork"),
    "one sample at a time": lambda rank: drawn(Draws(), None),
    "torch's sampler": lambda rank: drawn(Draws(), 4, sampler=DistributedSampler(Draws(), 2, rank)),  # type: ignore[arg-type]
    "our sampler": lambda rank: drawn(Draws(), 4, sampler=ShardedSampler(16, rank=rank, num_replicas=2, seed=0)),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    def launch(rank: int, ranks: int = 2) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return launch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("what", LOADERS)
def test_two_ranks_with_one_seed_draw_different_numbers(what: str, launched: Any) -> None:
    launched(0)
    first, again = LOADERS[what](0), LOADERS[what](0)
    launched(1)
    assert not first & LOADERS[what](1)
    assert first == again


def test_one_process_draws_as_it_does_without_a_launcher(launched: Any) -> None:
    alone = drawn(Draws(), 4)
    launched(0, 1)
    assert drawn(Draws(), 4) == alone


def test_a_state_goes_on_with_the_same_numbers_on_its_rank(launched: Any) -> None:
    launched(1)
    loader = DataLoader(Draws(), 4, seed=3)
    straight = [batch["drawn"].tolist() for batch in loader]
    iterator = iter(first := DataLoader(Draws(), 4, seed=3))
    next(iterator)
    other = DataLoader(Draws(), 4, seed=3)
    other.load_state_dict(first.state_dict())
    assert [batch["drawn"].tolist() for batch in other] == straight[1:]


@pytest.mark.parametrize(
    ("rank", "ranks", "expected"),
    [
        ("1", "4", (1, 4)),
        ("x", "4", (0, 1)),
        ("4", "4", (0, 1)),
        ("-1", "4", (0, 1)),
        ("0", "0", (0, 1)),
        ("", "", (0, 1)),
    ],
)
def test_what_a_launcher_says_counts_if_it_makes_sense(
    rank: str, ranks: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert process_rank() == expected


def test_torch_distributed_comes_before_the_environment(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(0)
    running = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 5, get_world_size=lambda: 8
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", running)
    assert process_rank() == (5, 8)
    running.is_initialized = lambda: False
    assert process_rank() == (0, 2)
    assert drawing_rank(3, 4) == (3, 4)


def test_a_real_process_group_is_asked(tmp_path: Any, launched: Any) -> None:
    launched(1)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        assert process_rank() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert process_rank() == (1, 2)
