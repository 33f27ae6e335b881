"""Persistent processes make the next epoch's first batches while the last ones of this epoch are in use."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import inside
from support.waiting import assert_no_workers, assert_nothing_is_held, wait_until
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from loaders import DataLoader, ShardedSampler, WeightedSampler, sample_rng

N, SIZE = 40, 4
EPOCHS = 4
KEPT = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}


class Counted:
    """Samples that tell their index and draw; how often each was read is counted for all processes."""

    def __init__(self, length: int = N, draws: bool = True) -> None:
        self.length = length
        self.draws = draws  # from the process's generators: a worker reads its first samples twice then
        self.reads = multiprocessing.get_context("fork").Array("q", length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.reads.get_lock():
            self.reads[index] += 1
        return {"index": index, "draw": sample_rng().integers(1 << 30), "process": random.random() if self.draws else 0}

    def total(self) -> int:
        return sum(self.reads)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert_no_workers()


def plain(batch: Any) -> Any:
    return {name: np.asarray(value).tolist() for name, value in batch.items()}


def epoch_of(loader: DataLoader) -> list[Any]:
    return [plain(batch) for batch in loader]


def is_ahead(loader: DataLoader) -> bool:
    kept = inside.kept_of(loader)
    return kept is not None and kept.ahead is not None


def until_made(loader: DataLoader) -> None:
    """Wait until all batches made ahead are complete."""
    kept = inside.kept_of(loader)
    assert kept is not None
    assert kept.ahead is not None

    def all_complete() -> bool:
        kept.collect()
        return all(batch.complete for batch in kept.ahead.batches)

    wait_until(all_complete, "the batches of the next epoch are made")


WITHOUT_EPOCH: dict[str, Callable[[Counted], dict[str, Any]]] = {
    "in order": lambda dataset: {},
    "shuffle": lambda dataset: {"shuffle": True},
    "replacement": lambda dataset: {"sampler": RandomSampler(dataset, replacement=True, num_samples=30)},
    "subset": lambda dataset: {"sampler": SubsetRandomSampler(range(3, 33))},
    "weighted": lambda dataset: {"sampler": WeightedRandomSampler([1.0] * 10 + [3.0] * 30, 24)},
    "drop last": lambda dataset: {"shuffle": True, "batch_size": 7, "drop_last": True},
    "no batches": lambda dataset: {"sampler": RandomSampler(dataset), "batch_size": None},
    "one batch": lambda dataset: {"shuffle": True, "batch_size": N},
}
WITH_EPOCH: dict[str, Callable[[Counted], dict[str, Any]]] = {
    "sharded": lambda dataset: {"sampler": ShardedSampler(N, seed=2)},
    "one of two ranks": lambda dataset: {"sampler": ShardedSampler(N, seed=2, rank=1, num_replicas=2)},
    "drawn by weight": lambda dataset: {"sampler": WeightedSampler([1.0] * 10 + [3.0] * 30, num_samples=24)},
    "torch's": lambda dataset: {"sampler": DistributedSampler(dataset, num_replicas=2, rank=1, seed=4)},
}
EVERY = {**WITHOUT_EPOCH, **WITH_EPOCH}


def make(kind: str, engine: dict[str, Any], dataset: Counted | None = None) -> DataLoader:
    dataset = dataset or Counted()
    return DataLoader(dataset, **{"batch_size": SIZE, "seed": 7, **EVERY[kind](dataset), **engine})


@pytest.mark.parametrize("kind", EVERY)
def test_epochs_made_ahead_are_those_of_a_loader_without_workers(kind: str) -> None:
    loader, reference = make(kind, KEPT), make(kind, {})
    for epoch in range(EPOCHS):
        for each in (loader, reference):
            if kind in WITH_EPOCH:
                each.set_epoch(epoch)
        assert epoch_of(loader) == epoch_of(reference)
        assert loader.state_dict() == reference.state_dict()
        assert is_ahead(loader)
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("kind", EVERY)
def test_what_was_made_ahead_is_not_read_again(kind: str) -> None:
    dataset = Counted(draws=False)
    loader = make(kind, KEPT, dataset)
    for epoch in range(EPOCHS):
        if kind in WITH_EPOCH:
            loader.set_epoch(epoch)
        before = dataset.total()
        delivered = sum(np.size(batch["index"]) for batch in epoch_of(loader))
        until_made(loader)
        if epoch > 0:
            # As many were made ahead of this epoch as of the next one.
            assert dataset.total() - before == delivered
            assert sum(worker.samples for worker in loader.report().workers) == delivered


def test_the_next_epoch_begins_while_the_last_batch_is_in_use() -> None:
    loader = make("shuffle", KEPT)
    for number, _batch in enumerate(loader, start=1):
        if number == N // SIZE:
            until_made(loader)
            assert len(inside.kept_of(loader).ahead.batches) == inside.plan_of(loader).depth(2)
    assert number == N // SIZE


def test_without_set_epoch_a_sharded_order_repeats_and_is_foreseen_from_the_second_epoch_on() -> None:
    loader, reference = make("sharded", KEPT), make("sharded", {})
    for _ in range(EPOCHS):
        assert epoch_of(loader) == epoch_of(reference)


# -- what is not made ahead


@pytest.mark.parametrize("own", [False, True])
def test_nothing_is_drawn_early_from_a_generator(own: bool) -> None:
    states = []
    for engine in (KEPT, {}):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(Counted(), SIZE, shuffle=True, generator=generator, **engine)
        epoch_of(loader)
        states.append((generator or torch.default_generator).get_state())
        assert not is_ahead(loader)
    assert torch.equal(*states)


def test_an_order_of_the_users_own_is_not_asked_for_early() -> None:
    class Drawn:
        iterations = 0

        def __iter__(self) -> Iterator[int]:
            Drawn.iterations += 1
            return iter(range(N))

        def __len__(self) -> int:
            return N

    loader = DataLoader(Counted(), SIZE, sampler=Drawn(), seed=7, **KEPT)
    for epoch in range(1, 4):
        epoch_of(loader)
        assert Drawn.iterations == epoch
        assert not is_ahead(loader)


def test_a_sampler_that_refuses_the_next_epoch_is_asked_again_when_that_begins() -> None:
    class Two(ShardedSampler):
        def set_epoch(self, epoch: int) -> None:
            if epoch > 1:
                raise ValueError("there are two epochs")
            super().set_epoch(epoch)

    loader = DataLoader(Counted(), SIZE, sampler=Two(N), seed=7, **KEPT)
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(epoch_of(loader)) == N // SIZE
    assert not is_ahead(loader)
    with pytest.raises(ValueError, match="two epochs"):
        loader.set_epoch(2)


def test_threads_read_no_sample_of_an_epoch_before_it_begins() -> None:
    """They share the dataset with the caller, who may change it between two epochs."""
    dataset = Counted()
    loader = DataLoader(dataset, SIZE, seed=7, num_workers=2, worker_method="thread", persistent_workers=True)
    for epoch in range(1, 4):
        epoch_of(loader)
        assert not is_ahead(loader)
        assert dataset.total() == epoch * N


# -- what was made ahead and is not wanted


def in_the_last_batches(loader: DataLoader) -> None:
    for number, _ in enumerate(loader, start=1):
        if number == N // SIZE - 1:
            break


def raises_in_the_last_batches(loader: DataLoader) -> None:
    try:
        for number, _ in enumerate(loader, start=1):
            if number == N // SIZE - 1:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def loads_a_state(loader: DataLoader) -> None:
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    for _ in iterator:
        pass
    loader.load_state_dict(state)


def loads_the_end_of_an_epoch(loader: DataLoader) -> None:
    for number, _ in enumerate(loader, start=1):
        if number == N // SIZE:
            state = loader.state_dict()
    loader.load_state_dict(state)


def sets_another_epoch(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.set_epoch(11)


def sets_the_same_epoch(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.set_epoch(1)


def changes_the_batch_size(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.batch_sampler.batch_size = 5  # type: ignore[union-attr]


def seeds_the_sampler_anew(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.sampler.seed = 99  # type: ignore[attr-defined]


def moves_the_sampler(loader: DataLoader) -> None:
    epoch_of(loader)
    sampler = loader.sampler
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 1, "position": 8})  # type: ignore[attr-defined]


def gives_the_sampler_a_generator(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.sampler.generator = torch.Generator().manual_seed(1)  # type: ignore[attr-defined]


def changes_indices_in_place(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.sampler.indices[:] = [5] * len(loader.sampler.indices)  # type: ignore[attr-defined]


def changes_weights_in_place(loader: DataLoader) -> None:
    epoch_of(loader)
    loader.sampler.weights[5:] = 0  # type: ignore[attr-defined]


def begins_twice(loader: DataLoader) -> None:
    epoch_of(loader)
    iter(loader)


def begins_two_at_once(loader: DataLoader) -> None:
    epoch_of(loader)
    for _ in zip(loader, loader, strict=True):
        pass


def iterates_inside_the_last_batches(loader: DataLoader) -> None:
    for number, _ in enumerate(loader, start=1):
        if number == N // SIZE - 1:
            epoch_of(loader)


@pytest.mark.parametrize(
    ("kind", "disturb"),
    [
        ("shuffle", in_the_last_batches),
        ("shuffle", raises_in_the_last_batches),
        ("shuffle", loads_a_state),
        ("shuffle", loads_the_end_of_an_epoch),
        ("shuffle", sets_another_epoch),
        ("shuffle", sets_the_same_epoch),
        ("shuffle", changes_the_batch_size),
        ("shuffle", gives_the_sampler_a_generator),
        ("shuffle", begins_twice),
        ("shuffle", begins_two_at_once),
        ("shuffle", iterates_inside_the_last_batches),
        ("sharded", in_the_last_batches),
        ("sharded", loads_a_state),
        ("sharded", loads_the_end_of_an_epoch),
        ("sharded", sets_another_epoch),
        ("sharded", sets_the_same_epoch),
        ("sharded", seeds_the_sampler_anew),
        ("sharded", moves_the_sampler),
        ("sharded", begins_two_at_once),
        ("torch's", sets_another_epoch),
        ("torch's", seeds_the_sampler_anew),
        ("subset", changes_indices_in_place),
        ("weighted", changes_weights_in_place),
    ],
)
def test_nothing_is_delivered_that_was_made_ahead_in_vain(kind: str, disturb: Callable[[DataLoader], None]) -> None:
    subset = {"sampler": SubsetRandomSampler(list(range(3, 33)))} if kind == "subset" else {}
    options: dict[str, Any] = {"batch_size": SIZE, "seed": 7}
    found = []
    for engine in (KEPT, {}):
        dataset = Counted()
        sampler = {"sampler": SubsetRandomSampler(list(range(3, 33)))} if subset else EVERY[kind](dataset)
        loader = DataLoader(dataset, **{**options, **sampler, **engine})
        disturb(loader)
        states = [loader.state_dict()]
        epochs = []
        for _ in range(2):
            epochs.append(epoch_of(loader))
            states.append(loader.state_dict())
        found.append((epochs, states))
        assert_nothing_is_held(loader)
    assert found[0][0] == found[1][0]
    if disturb is not gives_the_sampler_a_generator:  # whose state tells whether workers have drawn their base seed
        assert found[0][1] == found[1][1]


def test_memory_and_descriptors_do_not_grow_with_epochs_that_were_foreseen_in_vain() -> None:
    loader = make("sharded", KEPT)
    reserved = set()
    for epoch in range(12):
        loader.set_epoch(epoch * 5)
        epoch_of(loader)
        if epoch > 1:
            reserved.add(inside.pool_of(loader).arena.reserved_nbytes)
    assert max(reserved) <= 2 * min(reserved)
    assert_nothing_is_held(loader)


def test_a_sample_that_fails_ahead_is_raised_in_its_own_epoch() -> None:
    class Fails(Counted):
        def __getitem__(self, index: int) -> Any:
            if index == 0 and self.reads[N - 1] > 0:
                raise ValueError("read before")
            return super().__getitem__(index)

    loader = DataLoader(Fails(), SIZE, seed=7, **KEPT)
    first = iter(loader)
    assert [next(first)["index"].tolist()[0] for _ in range(N // SIZE)] == list(range(0, N, SIZE))
    until_made(loader)
    assert next(first, None) is None
    second = iter(loader)
    with pytest.raises(ValueError, match="read before"):
        next(second)
    assert next(second)["index"].tolist() == [4, 5, 6, 7]


def test_a_worker_killed_over_what_it_makes_ahead_changes_no_batch() -> None:
    loader, reference = make("shuffle", KEPT), make("shuffle", {})
    for _ in range(EPOCHS):
        assert epoch_of(loader) == epoch_of(reference)
        for worker in inside.kept_processes_of(loader):
            worker.process.kill()


def test_dropping_the_loader_ends_workers_that_are_ahead() -> None:
    loader = make("shuffle", KEPT)
    epoch_of(loader)
    assert is_ahead(loader)
    del loader  # nothing that was made ahead refers to it: no collection is needed
    assert not multiprocessing.active_children()
