"""Samplers, batch samplers and datasets: ours draws from them what torch's DataLoader draws, and when it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same, assert_same_seen, watch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import loaders

WITH_WORKERS = [name for name in ENGINES if name != "inline"]


class Numbers:
    """Ten samples; `read` may fail."""

    def __init__(self, n: int = 10, read: Callable[[int], Any] = lambda i: {"x": np.full(3, i), "i": i}) -> None:
        self.n = n
        self.read = read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


class Batches(Numbers):
    """Reads a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [(*self.read(index), len(indices)) for index in indices]


class Named:
    """A dataset whose keys are no ints."""

    def __getitem__(self, key: Any) -> Any:
        return {"key": str(key), "length": len(key)}

    def __len__(self) -> int:
        return 4


class EagerSampler:
    """Draws when it is asked for an iterator, and gives that as it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())

    def __len__(self) -> int:
        return 10


class DrawsPerIndex:
    """Draws from all global generators for every index."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(10):
            yield (int(torch.randint(3, ())) + random.randrange(3) + int(np.random.randint(3))) % 10

    def __len__(self) -> int:
        return 10


# name → (dataset, arguments made anew for each loader)
SAMPLERS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "defaults": (Numbers, dict),
    "batches": (Numbers, lambda: {"batch_size": 4}),
    "drop_last": (Numbers, lambda: {"batch_size": 4, "drop_last": True}),
    "drop_last of everything": (Numbers, lambda: {"batch_size": 11, "drop_last": True}),
    "one batch of all": (Numbers, lambda: {"batch_size": 100}),
    "shuffle": (Numbers, lambda: {"batch_size": 4, "shuffle": True}),
    "shuffle by a generator": (
        Numbers,
        lambda: {"batch_size": 3, "shuffle": True, "generator": torch.Generator().manual_seed(5)},
    ),
    "a generator and no shuffle": (Numbers, lambda: {"generator": torch.Generator().manual_seed(5)}),
    "unbatched": (Numbers, lambda: {"batch_size": None}),
    "unbatched and shuffled": (Numbers, lambda: {"batch_size": None, "shuffle": True}),
    "list as a sampler": (Numbers, lambda: {"batch_size": 2, "sampler": [3, 3, -1]}),
    "NumPy ints as a sampler": (Numbers, lambda: {"batch_size": 2, "sampler": np.array([3, 1, 2])}),
    "tensor as a sampler": (
        lambda: TensorDataset(torch.arange(10.0)),
        lambda: {"batch_size": 2, "sampler": torch.tensor([3, 1, 2])},
    ),
    "empty sampler": (Numbers, lambda: {"batch_size": 2, "sampler": []}),
    "sampler without length": (Numbers, lambda: {"batch_size": 2, "sampler": (i for i in [4, 2, 1])}),
    "text keys": (Named, lambda: {"batch_size": 2, "sampler": ["a", "bcd", ""]}),
    "tuple keys": (Named, lambda: {"batch_size": 2, "sampler": [("a", 1), (), (2,)]}),
    "text keys, unbatched": (Named, lambda: {"batch_size": None, "sampler": ["a", "bcd"]}),
    "keys are lists": (
        lambda: TensorDataset(torch.arange(10.0)),
        lambda: {"batch_size": None, "sampler": BatchSampler(SequentialSampler(range(10)), 3, False)},
    ),
    "random sampler with replacement": (
        Numbers,
        lambda: {"batch_size": 4, "sampler": RandomSampler(range(10), replacement=True, num_samples=7)},
    ),
    "subset random sampler": (Numbers, lambda: {"batch_size": 2, "sampler": SubsetRandomSampler([5, 1, 3])}),
    "weighted sampler": (
        Numbers,
        lambda: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 10, 9, generator=torch.Generator())},
    ),
    "eager sampler": (Numbers, lambda: {"batch_size": 4, "sampler": EagerSampler()}),
    # With workers torch begins such a sampler twice, and drops what it drew first; ours begins it once at all times.
    "eager sampler, unbatched": (Numbers, lambda: {"batch_size": None, "sampler": EagerSampler()}),
    "sampler that draws per index": (Numbers, lambda: {"batch_size": 4, "sampler": DrawsPerIndex()}),
    "batch sampler": (Numbers, lambda: {"batch_sampler": [[1, 2], [5], [3, 4, 5, 6, 0, 0], [9]]}),
    "batch sampler of tuples": (Numbers, lambda: {"batch_sampler": [(1, 2), (5,)]}),
    "batch sampler of arrays": (Numbers, lambda: {"batch_sampler": [np.array([1, 2]), np.array([5])]}),
    "empty batch sampler": (Numbers, lambda: {"batch_sampler": []}),
    "empty first batch": (Numbers, lambda: {"batch_sampler": [[], [1, 2], [3]]}),
    "empty batch in the middle": (Numbers, lambda: {"batch_sampler": [[1, 2], [], [3]]}),
    "empty batches for a collate_fn": (Numbers, lambda: {"batch_sampler": [[], [1, 2], []], "collate_fn": len}),
    "empty batches for __getitems__": (
        lambda: Batches(read=lambda i: (i,)),
        lambda: {"batch_sampler": [[1, 2], [], [3]]},
    ),
    "empty dataset": (lambda: Numbers(0), lambda: {"batch_size": 4}),
    "empty dataset, unbatched": (lambda: Numbers(0), lambda: {"batch_size": None}),
    "a list as dataset": (lambda: [1.5, 2.5, 3.5], lambda: {"batch_size": 2}),
    "an array as dataset": (lambda: np.arange(12, dtype=np.float32).reshape(6, 2), lambda: {"batch_size": 4}),
    "a tensor as dataset": (lambda: torch.arange(6.0), lambda: {"batch_size": 4}),
    "a dict as dataset": (lambda: {0: 1, 1: 2}, lambda: {"batch_size": 2}),
    "range as dataset": (lambda: range(7), lambda: {"batch_size": 3, "shuffle": True}),
    "__getitems__": (lambda: Batches(read=lambda i: (i, str(i))), lambda: {"batch_size": 4}),
    "__getitems__, unbatched": (lambda: Batches(read=lambda i: (i, str(i))), lambda: {"batch_size": None}),
    "__getitems__ and collate_fn": (
        lambda: Batches(read=lambda i: (i,)),
        lambda: {"batch_size": 4, "collate_fn": lambda samples: samples},
    ),
    "subset": (lambda: Subset(Numbers(), [7, 1, 1, 3]), lambda: {"batch_size": 3}),
    "subset of subset": (lambda: Subset(Subset(Numbers(), [7, 1, 5, 3]), [3, 0, 1]), lambda: {"batch_size": 2}),
    "subset of __getitems__": (
        lambda: Subset(Batches(read=lambda i: (i,)), [7, 1, 5]),
        lambda: {"batch_size": 2},
    ),
    "concatenation": (lambda: ConcatDataset([Numbers(3), Numbers(2)]), lambda: {"batch_size": 4, "shuffle": True}),
    "nested concatenation": (
        lambda: ConcatDataset([Subset(Numbers(), [8, 9]), ConcatDataset([Numbers(2), Subset(Numbers(), [5])])]),
        lambda: {"batch_size": 2, "sampler": [4, 3, 2, 1, 0, -1, -5]},
    ),
    "subset of concatenation": (
        lambda: Subset(ConcatDataset([Numbers(3), Numbers(2)]), [4, 2, 0]),
        lambda: {"batch_size": 2},
    ),
    "random_split": (
        lambda: torch.utils.data.random_split(Numbers(), [7, 3], torch.Generator().manual_seed(1))[0],
        lambda: {"batch_size": 3, "shuffle": True},
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_two_epochs_of_any_sampler_and_dataset_are_those_of_torch(name: str, engine: str) -> None:
    make, arguments = SAMPLERS[name]
    dataset = make()
    theirs = watch(lambda: torch.utils.data.DataLoader(dataset, **arguments()), epochs=2)
    ours = watch(lambda: loaders.DataLoader(dataset, **arguments(), **ENGINES[engine]), epochs=2)
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", WITH_WORKERS)
@pytest.mark.parametrize("shuffle_by", [None, 7])
def test_persistent_workers_leave_the_generators_where_those_of_torch_do(engine: str, shuffle_by: int | None) -> None:
    def arguments() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(shuffle_by) if shuffle_by is not None else None
        return {"batch_size": 4, "shuffle": True, "persistent_workers": True, "generator": generator}

    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    theirs = watch(lambda: torch.utils.data.DataLoader(Numbers(), **arguments(), **workers), epochs=3)
    ours = watch(lambda: loaders.DataLoader(Numbers(), **arguments(), **ENGINES[engine]), epochs=3)
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize(("arguments"), [{"prefetch_factor": 1}, {"prefetch_factor": 5}, {"timeout": 60}])
@pytest.mark.parametrize("engine", WITH_WORKERS)
def test_arguments_for_workers_change_no_batch(arguments: dict[str, Any], engine: str) -> None:
    theirs = watch(lambda: torch.utils.data.DataLoader(Numbers(), 3, shuffle=True))
    ours = watch(lambda: loaders.DataLoader(Numbers(), 3, shuffle=True, **arguments, **ENGINES[engine]))
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_out_of_order_delivers_the_same_batches(engine: str) -> None:
    theirs = watch(lambda: torch.utils.data.DataLoader(Numbers(), 3, in_order=False))
    ours = watch(lambda: loaders.DataLoader(Numbers(), 3, in_order=False, **ENGINES[engine]))
    assert_same_seen(ours, theirs, ordered=False)


def test_without_workers_nothing_is_drawn_from_the_sampler_before_it_is_needed() -> None:
    states = []
    for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        iterator = iter(kind(Numbers(), 2, sampler=DrawsPerIndex()))
        batches = [next(iterator), next(iterator)]
        states.append([batches, torch.get_rng_state(), random.getstate(), np.random.get_state()])
    assert_same(states[1], states[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_indices_come_beside_the_batches_on_request(engine: str) -> None:
    loader = loaders.DataLoader(Numbers(), 4, sampler=[3, 1, 4, 1, 5], return_index=True, **ENGINES[engine])
    (first, indices), (second, more) = loader
    assert_same([indices, more], [torch.tensor([3, 1, 4, 1]), torch.tensor([5])])
    assert_same([first["i"], second["i"]], [indices, more])
    named = loaders.DataLoader(Named(), 2, sampler=["a", "b"], return_index=True, **ENGINES[engine])
    assert next(iter(named))[1] == ["a", "b"]
