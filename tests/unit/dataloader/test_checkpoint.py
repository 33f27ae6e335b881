"""`state_dict()` and `load_state_dict()`: where the caller is, for any sampler, and refused where it does not fit."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loaders import DataLoader, GroupedSampler, ShardedSampler, StateError, sample_rng, worker_info

N = 40
PARALLEL: dict[str, dict[str, Any]] = {
    "inline": {"num_workers": 0},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
    "persistent": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}


class Noise:
    def __init__(self, n: int = N, bad: tuple[int, ...] = ()) -> None:
        self.n = n
        self.bad = bad
        self.read = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        if index in self.bad:
            raise ValueError("unreadable")
        return {"index": index, "noise": sample_rng().random()}


def seen(batches: Any) -> list[Any]:
    """What batches hold, for comparison."""
    return [(np.asarray(batch["index"]).tolist(), np.asarray(batch["noise"]).tolist()) for batch in batches]


def order(batches: Any) -> list[Any]:
    return [indices for indices, _ in seen(batches)]


def loader(dataset: Any = None, batch_size: int | None = 4, **arguments: Any) -> DataLoader[Any]:
    if not arguments.keys() & {"sampler", "batch_sampler", "shuffle"}:
        arguments["shuffle"] = True
    if "batch_sampler" in arguments:
        return DataLoader(dataset or Noise(), **{"seed": 7, **arguments})
    return DataLoader(dataset or Noise(), batch_size, **{"seed": 7, **arguments})


def resumed(state: dict[str, Any], *arguments: Any, **named: Any) -> DataLoader[Any]:
    made = loader(*arguments, **named)
    made.load_state_dict(state)
    return made


# -- when it may be taken, and what it holds


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
def test_state_counts_batches_delivered_not_prefetched(parallel: dict[str, Any]) -> None:
    whole = seen(loader())
    one = loader(**parallel)
    iterator = iter(one)
    first = seen(islice(iterator, 3))
    state = one.state_dict()
    assert (state["batches"], state["keys"]) == (3, 12)
    assert first + seen(resumed(state)) == whole


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
def test_every_moment_of_an_epoch_can_be_resumed(parallel: dict[str, Any]) -> None:
    one = loader()
    epochs = [seen(one), seen(one)]
    for stop in (0, 1, 9, 10):
        begun = loader(**parallel)
        iterator = iter(begun)
        taken = seen(islice(iterator, stop))
        other = resumed(begun.state_dict(), **parallel)
        # An epoch whose last batch was handed out is over: the next one begins.
        first = taken + (seen(other) if stop < 10 else [])
        assert [first, seen(other)] == epochs
    assert next(iterator, None) is None
    assert seen(resumed(begun.state_dict(), **parallel)) == epochs[1]


def test_a_state_from_before_the_first_epoch_is_the_whole_run() -> None:
    one = loader()
    other = resumed(one.state_dict())
    assert [seen(one), seen(one)] == [seen(other), seen(other)]


def test_a_break_out_of_the_loop_is_the_middle_of_the_epoch() -> None:
    one = loader()
    whole = seen(one)
    one.set_epoch(0)
    for number, _ in enumerate(one):
        if number == 5:
            break
    assert seen(resumed(one.state_dict())) == whole[6:]


@pytest.mark.parametrize("seed", [7, None])
def test_the_state_is_plain_numbers_and_survives_json(seed: int | None) -> None:
    one = loader(seed=seed)
    for stop in (0, 4, 10):
        iterator = iter(one)
        begun = seen(islice(iterator, stop))
        state = json.loads(json.dumps(one.state_dict()))
        other = resumed(state, seed=seed)
        rest = seen(iterator)
        assert begun == [] or (seen(other) == rest if rest else len(seen(other)) == 10)
        one.set_epoch(0)


def test_a_state_does_not_change_while_the_loader_goes_on() -> None:
    one = loader(Noise(bad=(3, 17, 20)), on_error="skip", shuffle=False)
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    kept = copy.deepcopy(state)
    list(iterator)
    assert state == kept
    other = resumed(state, Noise(bad=(3, 17, 20)), on_error="skip", shuffle=False)
    list(other)
    assert state == kept


def test_a_resumed_epoch_gives_the_same_states_as_an_undisturbed_one() -> None:
    one = loader()
    iterator = iter(one)
    next(iterator)
    other = resumed(one.state_dict())
    assert other.state_dict() == one.state_dict()
    for _ in zip(iterator, other, strict=True):
        assert other.state_dict() == one.state_dict()
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
def test_stray_iterators_before_and_after_loading_change_nothing(parallel: dict[str, Any]) -> None:
    whole = seen(loader())
    one = loader()
    next(iter(one))
    other = loader(**parallel)
    iter(other)
    other.load_state_dict(one.state_dict())
    iter(other)
    stray = iter(other)
    assert other.state_dict() == one.state_dict()
    assert seen(other) == whole[1:]
    del stray
    assert other.state_dict()["epoch"] == 1


def test_without_in_order_there_is_no_state_in_the_middle() -> None:
    one = loader(num_workers=2, worker_method="thread", in_order=False)
    assert one.state_dict()["batches"] == 0
    iterator = iter(one)
    next(iterator)
    with pytest.raises(StateError, match="in_order=False"):
        one.state_dict()


def test_where_torchs_own_loader_works_there_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader()
    state = one.state_dict()
    monkeypatch.setenv("LOADERS_DISABLE", "1")
    with pytest.raises(StateError, match="LOADERS_DISABLE"):
        one.state_dict()
    with pytest.raises(StateError, match="LOADERS_DISABLE"):
        one.load_state_dict(state)


# -- samplers


class Halves(Sampler[int]):
    """A custom order with no state: always the same."""

    def __iter__(self) -> Iterator[int]:
        return iter([*range(N // 2, N), *range(N // 2)])

    def __len__(self) -> int:
        return N


class Remembers(Sampler[int]):
    """A custom order that goes on through its epochs, and says where it is."""

    def __init__(self) -> None:
        self.round = 0

    def __iter__(self) -> Iterator[int]:
        self.round += 1
        return iter(np.random.RandomState(self.round).permutation(N).tolist())

    def __len__(self) -> int:
        return N

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = state["round"]


class Growing(Sampler[list[int]]):
    """Batches of 1, 2, 3, … samples of another sampler, as bucketing samplers make them."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        keys, size = iter(self.sampler), 1
        while batch := list(islice(keys, size)):
            yield batch
            size += 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def distributed(**arguments: Any) -> DistributedSampler[Any]:
    return DistributedSampler(range(N), num_replicas=2, rank=1, **arguments)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": lambda: {"sampler": SequentialSampler(range(N))},
    "shuffle": lambda: {"shuffle": True},
    "shuffle, generator": lambda: {"shuffle": True, "generator": generator()},
    "random": lambda: {"sampler": RandomSampler(range(N))},
    "random, generator": lambda: {"sampler": RandomSampler(range(N), generator=generator())},
    "random, more than all": lambda: {"sampler": RandomSampler(range(N), num_samples=100, generator=generator())},
    "replacement": lambda: {"sampler": RandomSampler(range(N), replacement=True, num_samples=100)},
    "replacement, generator": lambda: {
        "sampler": RandomSampler(range(N), replacement=True, num_samples=100, generator=generator())
    },
    "subset": lambda: {"sampler": SubsetRandomSampler(range(5, 35))},
    "subset, generator": lambda: {"sampler": SubsetRandomSampler(range(5, 35), generator=generator())},
    "weighted": lambda: {"sampler": WeightedRandomSampler(torch.arange(N) + 1.0, N)},
    "weighted, generator": lambda: {"sampler": WeightedRandomSampler(torch.arange(N) + 1.0, N, generator=generator())},
    "batch sampler of torch's": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(N)), 3, drop_last=True)},
    "batch sampler of torch's, generator": lambda: {
        "batch_sampler": BatchSampler(RandomSampler(range(N), generator=generator()), 3, drop_last=False)
    },
    "varying batches": lambda: {"batch_sampler": Growing(RandomSampler(range(N)))},
    "varying batches, generator": lambda: {"batch_sampler": Growing(RandomSampler(range(N), generator=generator()))},
    "varying batches, sharded": lambda: {"batch_sampler": Growing(ShardedSampler(N, seed=3, rank=0, num_replicas=1))},
    "list of batches": lambda: {"batch_sampler": [[1, 2], [3], [4, 5, 6], [7]]},
    "distributed": lambda: {"sampler": distributed()},
    "sharded": lambda: {"sampler": ShardedSampler(N, seed=3, rank=1, num_replicas=2)},
    "grouped": lambda: {"sampler": GroupedSampler([N // 8] * 8, groups_open=3, seed=3, rank=1, num_replicas=2)},
    "custom": lambda: {"sampler": Halves()},
    "custom with a state": lambda: {"sampler": Remembers()},
    "single samples": lambda: {"batch_size": None, "shuffle": True},
    "single samples, generator": lambda: {
        "batch_size": None,
        "sampler": RandomSampler(range(N), generator=generator()),
    },
}


@pytest.mark.parametrize("seed", [7, None], ids=["seed", "no seed"])
@pytest.mark.parametrize("arguments", SAMPLERS.values(), ids=SAMPLERS)
def test_any_sampler_is_resumed_in_its_order(arguments: Callable[[], dict[str, Any]], seed: int | None) -> None:
    torch.manual_seed(1)
    one = loader(seed=seed, **arguments())
    seen(one)
    for stop in (1, 3):
        iterator = iter(one)
        seen(islice(iterator, stop))
        state = one.state_dict()
        rest = seen(iterator)
        torch.manual_seed(2)  # another process
        parallel = {"num_workers": 2, "multiprocessing_context": "fork"} if stop == 3 else {}
        other = resumed(state, seed=seed, **arguments(), **parallel)
        assert seen(other) == rest


@pytest.mark.parametrize("parallel", [{}, PARALLEL["persistent"]], ids=["inline", "persistent"])
@pytest.mark.parametrize(
    "name", [name for name in SAMPLERS if "generator" in name or name in ("custom with a state", "sharded")]
)
def test_what_fixes_the_epochs_to_come_is_kept_between_epochs(name: str, parallel: dict[str, Any]) -> None:
    one = loader(seed=None, **SAMPLERS[name](), **parallel)
    for epochs in (0, 1):
        state = one.state_dict()
        other = resumed(state, seed=None, **SAMPLERS[name](), **parallel)
        if epochs:
            assert [seen(other), seen(other)] == [seen(one), seen(one)]
        else:
            assert order(other) == order(one)


def test_torchs_order_stays_what_it_is_without_a_seed() -> None:
    torch.manual_seed(5)
    ours = order(loader(seed=None))
    torch.manual_seed(5)
    assert ours == [batch["index"].tolist() for batch in torch.utils.data.DataLoader(Noise(), 4, shuffle=True)]


@pytest.mark.parametrize("seed", [7, None], ids=["seed", "no seed"])
@pytest.mark.parametrize("parallel", [{}, PARALLEL["process"]], ids=["inline", "process"])
def test_to_go_on_in_an_epoch_draws_nothing_from_torchs_generator(seed: int | None, parallel: dict[str, Any]) -> None:
    """A model's dropout goes on from the state that its checkpoint has restored."""
    one = loader(seed=seed)
    next(iter(one))
    before = torch.get_rng_state()
    list(resumed(one.state_dict(), seed=seed, **parallel))
    assert torch.equal(torch.get_rng_state(), before)


def test_with_a_seed_nothing_at_all_is_drawn_from_torchs_generator() -> None:
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generators_bytes_are_in_the_state_only_where_one_was_passed() -> None:
    one, other = loader(seed=None), loader(seed=None, generator=generator())
    for each in (one, other):
        next(iter(each))
    assert set(one.state_dict()["origin"]) == {"seed"}
    assert isinstance(other.state_dict()["origin"]["generator"], bytes)


# -- seeds and epochs


def test_two_loaders_with_the_same_seed_are_equal_and_with_another_are_not() -> None:
    assert seen(loader()) == seen(loader())
    assert seen(loader())[0] != seen(loader(seed=8))[0]


def test_a_seed_that_was_not_given_is_drawn_as_torch_draws_it_and_remembered() -> None:
    torch.manual_seed(4)
    first = seen(loader(seed=None))
    torch.manual_seed(4)
    one = loader(seed=None)
    iterator = iter(one)
    begun = seen(islice(iterator, 2))
    torch.manual_seed(99)
    assert begun + seen(resumed(one.state_dict(), seed=None)) == first


def test_epochs_count_themselves_and_differ() -> None:
    one = loader(shuffle=False)
    first, second = seen(one), seen(one)
    assert first != second
    one.set_epoch(0)
    assert [seen(one), seen(one)] == [first, second]


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
@pytest.mark.parametrize("how", ["loader", "sampler"])
def test_an_epoch_is_set_on_the_loader_or_on_its_sampler(how: str, parallel: dict[str, Any]) -> None:
    def epochs(parallel: dict[str, Any], how: str) -> list[Any]:
        one = loader(sampler=distributed(), **parallel)
        found = []
        for epoch in (0, 3, 1):
            (one if how == "loader" else one.sampler).set_epoch(epoch)  # type: ignore[attr-defined]
            found.append(seen(one))
        return found

    reference = epochs({}, "loader")
    assert epochs(parallel, how) == reference
    counted = loader(shuffle=False)
    assert len({str(seen(counted)) for _ in range(3)}) == 3


def test_a_samplers_own_epoch_is_never_advanced() -> None:
    one = loader(sampler=distributed())
    assert order(one) == order(one)
    assert one.sampler.epoch == 0  # type: ignore[attr-defined]
    assert one.state_dict()["epoch"] == 2


def test_setting_the_epoch_that_was_resumed_goes_on_in_it() -> None:
    for setter in ("loader", "sampler"):
        one = loader(sampler=distributed())
        one.set_epoch(2)
        iterator = iter(one)
        next(iterator)
        other = resumed(one.state_dict(), sampler=distributed())
        (other if setter == "loader" else other.sampler).set_epoch(2)  # type: ignore[attr-defined]
        assert seen(other) == seen(iterator)
        assert other.state_dict()["epoch"] == 3


@pytest.mark.parametrize("setter", ["loader", "sampler"])
@pytest.mark.parametrize("sampler", [distributed, SAMPLERS["sharded"]], ids=["distributed", "sharded"])
def test_setting_another_epoch_than_the_resumed_one_begins_that(setter: str, sampler: Any) -> None:
    make = (lambda: {"sampler": distributed()}) if sampler is distributed else sampler
    one = loader(**make())
    one.set_epoch(5)
    whole = seen(one)
    one.set_epoch(4)
    next(iter(one))
    other = resumed(one.state_dict(), **make())
    with pytest.warns(UserWarning, match="after batch 1 of epoch 4, is discarded: the epoch was set to 5"):
        assert _seen_after(other, setter) == whole


def _seen_after(other: DataLoader[Any], setter: str) -> Any:
    (other if setter == "loader" else other.sampler).set_epoch(5)  # type: ignore[attr-defined]
    return seen(other)


def test_a_state_between_epochs_lets_a_framework_set_the_next_epoch() -> None:
    one = loader(**SAMPLERS["sharded"]())
    one.sampler.set_epoch(2)  # type: ignore[attr-defined]
    seen(one)
    state = one.state_dict()
    other = resumed(state, **SAMPLERS["sharded"]())
    for each in (one, other):
        each.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert seen(other) == seen(one)


# -- what is refused


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"dataset": Noise(41)}, "length is 40 in the state and 41 here"),
    "batch size": ({"batch_size": 5}, "global_batch is 4 in the state and 5 here"),
    "batch sampler": ({"batch_sampler": BatchSampler(Halves(), 5, False)}, "global_batch is 4 in the state and 5 here"),
    "drop_last": ({"drop_last": True}, "drop_last is False in the state and True here"),
    "seed": ({"seed": 8}, "seed is 7 in the state and 8 here"),
    "no seed": ({"seed": None}, "seeded is True in the state and False here"),
    "a sampler's": (
        {"sampler": ShardedSampler(N, seed=1, rank=0, num_replicas=3)},
        "which 3 ranks cannot share evenly|12",
    ),
}


@pytest.mark.parametrize(("arguments", "difference"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_loader_is_refused_and_the_difference_named(
    arguments: dict[str, Any], difference: str
) -> None:
    one = loader()
    next(iter(one))
    other = loader(**arguments)
    before = other.state_dict()
    with pytest.raises(StateError, match=difference):
        other.load_state_dict(one.state_dict())
    assert other.state_dict() == before


def test_a_state_of_another_order_is_refused_when_it_is_loaded() -> None:
    one = loader(sampler=ShardedSampler(N, seed=1, rank=0, num_replicas=1))
    next(iter(one))
    other = loader(sampler=ShardedSampler(N, seed=2, rank=0, num_replicas=1))
    before = other.state_dict()
    with pytest.raises(StateError, match="seed is 1 in the state and 2 here"):
        other.load_state_dict(one.state_dict())
    assert other.state_dict() == before


GARBAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda state: None,
    "empty": lambda state: {},
    "a list": lambda state: [1, 2],
    "torch's": lambda state: {"_sampler_iter_yielded": 3},
    "another version": lambda state: {**state, "version": 999},
    "text": lambda state: {**state, "keys": "12"},
    "negative": lambda state: {**state, "epoch": -1},
    "no number": lambda state: {**state, "batches": None},
    "a seed that is none": lambda state: {**state, "seed": "7"},
    "no order": lambda state: {**state, "origin": 3},
    "no list": lambda state: {**state, "failed": 3},
    "half a failure": lambda state: {**state, "failed": [[1, 2]]},
}


@pytest.mark.parametrize("spoil", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], Any]) -> None:
    one = loader()
    iterator = iter(one)
    next(iterator)
    before = one.state_dict()
    with pytest.raises(StateError, match="state"):
        one.load_state_dict(spoil(before))
    assert one.state_dict() == before
    assert len(list(iterator)) == 9


# -- cost


class Counts(Noise):
    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return index


@pytest.mark.parametrize("sampler", ["shuffle", "sharded", "custom"])
def test_resuming_far_into_an_epoch_reads_no_skipped_sample(sampler: str) -> None:
    dataset, size, batches = Counts(800_000), 8, 100_000
    made = {
        "shuffle": lambda: {"shuffle": True},
        "sharded": lambda: {"sampler": ShardedSampler(800_000, rank=0, num_replicas=1)},
        "custom": lambda: {"sampler": range(800_000)},
    }[sampler]
    one = DataLoader(dataset, size, seed=7, **made())  # type: ignore[arg-type]
    iterator = iter(one)
    next(iterator)
    state = {**one.state_dict(), "batches": 90_000, "keys": 90_000 * size}
    dataset.read = 0
    other = DataLoader(dataset, size, seed=7, **made())  # type: ignore[arg-type]
    other.load_state_dict(state)
    batch = next(iter(other))
    assert dataset.read == size
    keys = list(islice(iter(DataLoader(dataset, size, seed=7, **made()).batch_sampler), 90_001, 90_002))  # type: ignore[arg-type]
    if sampler != "shuffle":
        assert batch.tolist() == list(islice(iter(made()["sampler"]), 90_000 * size, 90_001 * size))
    assert len(keys[0]) == size
    assert batches * size == len(dataset)


# -- policies


BAD = (2, 3, 11, 12, 13, 30)


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
@pytest.mark.parametrize("policy", ["skip", "substitute"])
def test_a_resumed_epoch_leaves_out_and_substitutes_the_same(policy: Any, parallel: dict[str, Any]) -> None:
    reference = loader(Noise(bad=BAD), on_error=policy)
    whole = seen(reference)
    errors = reference.errors
    for stop in (1, 4, 6):
        one = loader(Noise(bad=BAD), on_error=policy, **parallel)
        iterator = iter(one)
        begun = seen(islice(iterator, stop))
        other = resumed(json.loads(json.dumps(one.state_dict())), Noise(bad=BAD), on_error=policy)
        assert begun + seen(other) == whole
        assert other.errors == errors


def test_a_sample_that_was_skipped_ahead_stays_skipped_where_it_has_become_readable() -> None:
    reference = loader(Noise(bad=BAD), on_error="skip", shuffle=False)
    whole = seen(reference)
    one = loader(Noise(bad=BAD), on_error="skip", shuffle=False)
    iterator = iter(one)
    begun = seen(islice(iterator, 1))
    state = one.state_dict()
    assert [each[1] for each in state["failed"]] == [2, 3]
    other = resumed(state, Noise(bad=(11, 12, 13, 30)), on_error="skip", shuffle=False)
    assert begun + seen(other) == whole


# -- streams


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        info = worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(number, N, count):
            self.read += 1
            yield {"index": index, "noise": sample_rng().random()}


class Resumable(Stream):
    """Goes on where its state says."""

    def __init__(self) -> None:
        super().__init__()
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        info = worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        start, self.next = self.next, 0
        for at in range(start, N // count):
            self.next = at + 1
            self.read += 1
            yield {"index": number + at * count, "noise": sample_rng().random()}
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def stream(dataset: Any, **parallel: Any) -> DataLoader[Any]:
    return DataLoader(dataset, 4, seed=7, **parallel)


STREAMED = {name: PARALLEL[name] for name in ("inline", "process", "persistent")}


@pytest.mark.parametrize("parallel", STREAMED.values(), ids=STREAMED)
def test_a_stream_with_a_state_of_its_own_goes_on_from_it(parallel: dict[str, Any]) -> None:
    one = stream(Resumable(), **parallel)
    whole = seen(one)
    for stop in (1, 3, 8):
        begun = stream(Resumable(), **parallel)
        iterator = iter(begun)
        taken = seen(islice(iterator, stop))
        state = begun.state_dict()
        del iterator
        dataset = Resumable()
        other = stream(dataset, **parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(state)
        assert taken + seen(other) == whole
        if not parallel["num_workers"]:
            assert dataset.read == N - 4 * stop
        assert order(other) == [indices for indices, _ in whole]


@pytest.mark.parametrize("parallel", STREAMED.values(), ids=STREAMED)
def test_a_stream_without_a_state_is_read_again_and_that_is_said_once(parallel: dict[str, Any]) -> None:
    whole = seen(stream(Stream(), **parallel))
    one = stream(Stream(), **parallel)
    iterator = iter(one)
    begun = seen(islice(iterator, 3))
    other = stream(Stream(), **parallel)
    state = one.state_dict()
    with pytest.warns(UserWarning, match=r"Stream has no state_dict\(\).* after batch 3") as told:
        other.load_state_dict(state)
    assert begun + seen(other) == whole  # warnings are errors here
    assert len(told) == 1


def test_a_streams_state_is_not_the_datasets_own_dict() -> None:
    class Shares(Resumable):
        def __init__(self) -> None:
            super().__init__()
            self.mine: dict[str, Any] = {}

        def state_dict(self) -> dict[str, Any]:
            self.mine["next"] = self.next
            return self.mine

    one = stream(Shares())
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    list(iterator)
    assert state["streams"] == [{"next": 4}]


def test_a_stream_wants_as_many_workers_as_its_state() -> None:
    one = stream(Stream(), **PARALLEL["process"])
    iterator = iter(one)
    next(iterator)
    with pytest.raises(StateError, match="num_workers is 2 in the state and 0 here"):
        stream(Stream()).load_state_dict(one.state_dict())


# -- copies and options


@pytest.mark.parametrize(
    "how", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_copy_of_a_loader_goes_on_where_it_was_taken(how: Callable[[Any], Any]) -> None:
    one = loader()
    whole = seen(one)
    one.set_epoch(0)
    iterator = iter(one)
    next(iterator)
    other = how(one)
    assert other.state_dict() == one.state_dict()
    other.load_state_dict(other.state_dict())
    assert seen(other) == whole[1:]


def test_delivering_indices_changes_neither_batches_nor_states() -> None:
    one, other = loader(), loader(return_index=True)
    whole = seen(one)
    iterator = iter(other)
    first = [batch for batch, _ in islice(iterator, 3)]
    state = other.state_dict()
    assert seen(first) + seen(batch for batch, _ in iterator) == whole
    assert seen(resumed(state)) == whole[3:]


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_state_of_another_kind_of_order_is_refused(shuffled: bool) -> None:
    one = loader(shuffle=shuffled)
    next(iter(one))
    with pytest.raises(StateError, match=r"sampler is '(Random|Sequential)Sampler' in the state"):
        resumed(one.state_dict(), shuffle=not shuffled)
