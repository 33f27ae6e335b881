"""What training frameworks do with a loader, and what odd samplers and states do to it."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from support import inside
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from loaders import DataLoader, ShardedSampler, StateError


class Numbers:
    def __init__(self, length: int = 32, nbytes: int = 8) -> None:
        self.length, self.nbytes = length, nbytes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "data": np.full(self.nbytes, index % 251, np.uint8)}


def seen(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


# -- resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_whose_last_batch_was_handed_out_is_over(workers: int) -> None:
    # A checkpoint inside the loop, on the last batch: the epochs after it must not be fewer.
    def fresh() -> DataLoader[Any]:
        return DataLoader(Numbers(), 4, shuffle=True, seed=1, num_workers=workers)

    loader, epochs, state = fresh(), [], {}
    for _ in range(3):
        epochs.append([])
        for batch in loader:
            epochs[-1].append(batch["index"].tolist())
            if len(epochs) == 1:
                state = loader.state_dict()
    assert state["batches"] == 8
    resumed = fresh()
    resumed.load_state_dict(state)
    assert [seen(resumed), seen(resumed)] == epochs[1:]


def test_setting_the_epoch_after_a_finished_one_was_loaded_warns_of_nothing() -> None:
    loader = DataLoader(Numbers(), 4, seed=1)
    states = [loader.state_dict() for _ in loader]
    resumed = DataLoader(Numbers(), 4, seed=1)
    resumed.load_state_dict(states[-1])
    resumed.set_epoch(1)
    assert len(seen(resumed)) == 8


def hostile(state: dict[str, Any], draw: random.Random) -> Any:
    """The state with something in it changed to something else."""
    odd = [
        None,
        -1,
        1 << 70,
        1.5,
        "x",
        b"x",
        [],
        {},
        [None],
        {"a": 1},
        (1, 2),
        float("nan"),
        np.arange(3),
        object(),
        True,
    ]
    changed = copy.deepcopy(state)
    key = draw.choice([*changed, "lanes", "streams", "lane"])
    if draw.random() < 0.2:
        changed.pop(key, None)
    elif isinstance(changed.get(key), dict) and changed[key] and draw.random() < 0.7:
        changed[key][draw.choice(list(changed[key]))] = draw.choice(odd)
    else:
        changed[key] = draw.choice(odd)
    return changed


@pytest.mark.parametrize(
    "arguments",
    [{}, {"shuffle": True}, {"generator": torch.Generator()}, {"sampler": ShardedSampler(32, rank=0, num_replicas=1)}],
    ids=["sequential", "shuffled", "generator", "sharded"],
)
def test_a_state_that_is_none_is_a_state_error_or_leaves_the_loader_as_it_was(arguments: dict[str, Any]) -> None:
    draw = random.Random(3)
    if "generator" in arguments:
        arguments = {"generator": torch.Generator().manual_seed(0), "shuffle": True}
    loader = DataLoader(Numbers(), 4, **arguments)
    next(iter(loader))
    state = loader.state_dict()
    refused = 0
    for _ in range(300):
        other = DataLoader(Numbers(), 4, **arguments)
        try:
            other.load_state_dict(hostile(state, draw))
            seen(other)
        except StateError:
            refused += 1
    assert refused > 50


# -- rebuilding


def public(loader: Any) -> dict[str, Any]:
    names = {name for name in vars(loader) if not name.startswith("_")}
    return {name: getattr(loader, name) for name in names}


def test_a_loader_can_be_made_again_from_its_public_attributes() -> None:
    loader = DataLoader(Numbers(), 4, num_workers="auto", seed=5, on_error="skip", return_index=True)
    arguments = public(loader)
    for name in ("sampler", "batch_sampler", "shuffle"):
        arguments.pop(name)
    again = DataLoader(**arguments)
    assert inside.tuner_of(again) is not None or inside.tuner_of(loader) is None, '"auto" did not survive'
    assert inside.plan_of(again).depth(2) == inside.plan_of(loader).depth(2)
    assert (again.seed, again.on_error, again.return_index) == (5, "skip", True)


def test_putting_none_where_torch_keeps_its_iterator_ends_persistent_workers() -> None:
    loader = DataLoader(Numbers(), 4, num_workers=1, persistent_workers=True)
    seen(loader)
    [process] = [each.process for each in inside.kept_of(loader).engine._supervisor.processes.values()][:1]
    loader._iterator = None
    gc.collect()
    assert inside.kept_of(loader) is None
    with pytest.raises(ValueError, match="closed"):
        process.is_alive()
    assert len(seen(loader)) == 8


def test_a_distributed_sampler_around_one_that_shards_by_itself_is_refused() -> None:
    sampler = ShardedSampler(32, rank=0, num_replicas=2)
    around = DistributedSampler(sampler, num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share of its share\. .*use_distributed_sampler=False"):
        DataLoader(Numbers(), 4, sampler=around)
    alone = DistributedSampler(ShardedSampler(32, rank=0, num_replicas=1), num_replicas=2, rank=0)  # type: ignore[arg-type]
    assert len(list(DataLoader(Numbers(), 4, sampler=alone).sampler)) == 16


# -- sizes and samplers


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_size_beyond_the_dataset_takes_no_more_memory_than_the_dataset(workers: int) -> None:
    loader = DataLoader(Numbers(10, 1 << 20), 10**6, num_workers=workers, max_buffer_bytes=64 << 20)
    for _ in range(2):
        [batch] = loader
        assert batch["index"].tolist() == list(range(10))


def test_a_batch_size_that_changes_in_the_middle_holds_from_the_next_batch_on_as_in_torch() -> None:
    def run(kind: Any) -> list[int]:
        batches = BatchSampler(SequentialSampler(range(32)), 4, False)
        loader, sizes = kind(Numbers(), batch_sampler=batches), []
        for batch in loader:
            sizes.append(len(batch["index"]))
            batches.batch_size = 8
        return sizes

    assert run(DataLoader) == run(torch.utils.data.DataLoader)


class Ranked(SequentialSampler):
    rank: Any = "zero"
    num_replicas = 2


class Stateful(SequentialSampler):
    def state_dict(self) -> Any:
        return 7

    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("what is this?")


def test_samplers_that_tell_nonsense_are_named() -> None:
    with pytest.raises(ValueError, match="Ranked has rank 'zero' of 2 ranks: expected two ints"):
        seen(DataLoader(Numbers(), 4, sampler=Ranked(Numbers())))
    with pytest.raises(StateError, match=r"Stateful\.state_dict\(\) gave a int: expected a dict"):
        seen(DataLoader(Numbers(), 4, sampler=Stateful(Numbers())))
