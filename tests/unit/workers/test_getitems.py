"""Datasets that read a batch at once, `__getitems__`: what torch passes through, both ways, is passed through."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import assert_same, events_of
from torch.utils.data import DataLoader as TorchLoader

from loaders import DataLoader, Field
from loaders.errors import SampleError

ENGINES: dict[str, dict[str, Any]] = {
    "inline": {},
    "processes": {"num_workers": 2, "multiprocessing_context": "fork"},
    "threads": {"num_workers": 2, "worker_method": "thread"},
}
every_engine = pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES.keys())
Pair = namedtuple("Pair", "image label")


def sample(key: Any) -> dict[str, Any]:
    return {"image": np.full((2, 3), int(key), np.float32), "label": int(key), "name": str(int(key))}


class Together:
    """Gives what `make` makes of the keys, and keeps nothing."""

    def __init__(self, make: Any, length: int = 24) -> None:
        self.make = make
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> Any:
        return sample(key)

    def __getitems__(self, keys: Any) -> Any:
        return self.make(keys)


def fewer(keys: Any) -> Any:
    return [sample(key) for key in keys if key % 3]


def same(batch: Any) -> Any:
    return batch


GIVEN = {
    "fewer": fewer,
    "fewer, not in the first batch": lambda keys: [sample(key) for key in keys if key < 8 or key % 3],
    "more": lambda keys: [sample(key) for key in keys for _ in range(key % 3 + 1)],
    "more, not in the first batch": lambda keys: [sample(key) for key in keys for _ in range(1 if key < 8 else 3)],
    "many more": lambda keys: [sample(key) for key in keys for _ in range(50)],
    "a tuple": lambda keys: tuple(sample(key) for key in keys),
    "a tuple of texts": lambda keys: tuple(f"{key}" for key in keys),
    "texts": lambda keys: [f"{key}" for key in keys],
    "an array": lambda keys: np.arange(6 * len(keys)).reshape(len(keys), 2, 3) + min(keys),
    "an array of numbers": lambda keys: np.array(keys),
    "arrays of other lengths": lambda keys: [np.zeros(3) for key in keys[:-1]],
    "tuples": lambda keys: [(key, np.full(2, key)) for key in keys if key % 5],
}
WHOLE = {
    "a dict": lambda keys: {"x": torch.tensor(keys), "name": "all"},
    "a tensor": lambda keys: torch.tensor(keys) * 2.0,
    "an array": lambda keys: np.array(keys) * 2.0,
    "a namedtuple": lambda keys: Pair(torch.tensor(keys), [str(key) for key in keys]),
    "a text": lambda keys: "all",
    "nothing": lambda keys: None,
    "a tuple": lambda keys: (torch.tensor(keys), 3),
    "a list": lambda keys: [1, 2],
}


def batches(make: Any, dataset: Any, **arguments: Any) -> Any:
    return events_of(make(dataset, **arguments))


@every_engine
@pytest.mark.parametrize("what", GIVEN)
def test_batches_have_the_samples_that_came_whatever_was_asked_for(what: str, how: dict[str, Any]) -> None:
    make = GIVEN[what]
    theirs = batches(TorchLoader, Together(make), batch_size=4)
    assert_same(batches(DataLoader, Together(make), batch_size=4, **how), theirs)


@every_engine
@pytest.mark.parametrize("what", WHOLE)
def test_a_collate_function_is_passed_what_came_and_not_a_list_of_it(what: str, how: dict[str, Any]) -> None:
    make, arguments = WHOLE[what], {"batch_size": 4, "collate_fn": same}
    theirs = batches(TorchLoader, Together(make), **arguments)
    assert_same(batches(DataLoader, Together(make), **arguments, **how), theirs)


@every_engine
@pytest.mark.parametrize("what", ["a dict", "a tensor", "nothing"])
def test_what_torch_cannot_collate_by_default_fails_with_its_error(what: str, how: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  whatever torch raises
        list(TorchLoader(Together(WHOLE[what]), 4))
    with pytest.raises(theirs.type) as ours:
        list(DataLoader(Together(WHOLE[what]), 4, **how))
    assert str(theirs.value) in str(ours.value)


@every_engine
def test_no_batch_that_is_held_changes_when_more_samples_come_than_fit(how: dict[str, Any]) -> None:
    def make(keys: list[int]) -> list[Any]:
        return [sample(keys[0]) for _ in range(len(keys) * (40 if keys[0] % 8 else 1))]

    held, copies = [], []
    for batch in DataLoader(Together(make, 80), 4, **how):
        held.append(batch)
        copies.append({name: value.clone() for name, value in batch.items() if name != "name"})
    for batch, copied in zip(held, copies, strict=True):
        assert all(torch.equal(batch[name], copied[name]) for name in copied)
        assert (batch["image"] == batch["label"][0]).all()


@every_engine
def test_padded_and_ragged_fields_keep_their_places_when_fewer_samples_come(how: dict[str, Any]) -> None:
    def make(keys: list[int]) -> list[Any]:
        return [
            {"a": np.full(key % 3 + 1, key), "b": np.full((key % 2 + 1, 2), key)} for key in keys if key % 3 or key < 4
        ]

    fields = {"a": Field(pad=-1), "b": Field(ragged=True)}
    for number, batch in enumerate(DataLoader(Together(make), 4, fields=fields, **how)):
        keys = [key for key in range(4 * number, 4 * number + 4) if key % 3 or key < 4]
        assert batch["a"].counts.tolist() == [key % 3 + 1 for key in keys]
        assert batch["a"].values[:, 0].tolist() == keys
        assert [b.tolist() for b in batch["b"]] == [[[key] * 2] * (key % 2 + 1) for key in keys]


def test_a_run_that_is_done_again_because_it_drew_may_give_another_number_of_samples() -> None:
    calls: list[int] = []

    def make(keys: list[int]) -> list[Any]:
        calls.append(keys[0])
        if keys[0] == 10:  # the first that draws: it is done again with keys
            np.random.rand()
        return [{"a": np.full(3, key)} for key in keys[: 10 - calls.count(keys[0])]]

    fields = {"a": Field(ragged=True)}
    batches = [[a.tolist() for a in batch["a"]] for batch in DataLoader(Together(make, 40), 10, fields=fields)]
    assert calls == [0, 10, 10, 20, 30]
    assert batches == [
        [[key] * 3 for key in range(first, first + count)] for first, count in [(0, 9), (10, 8), (20, 9), (30, 9)]
    ]


@every_engine
def test_a_state_counts_keys_not_samples(how: dict[str, Any]) -> None:
    straight = batches(DataLoader, Together(fewer), batch_size=4)
    loader = DataLoader(Together(fewer), 4, **how)
    iterator = iter(loader)
    next(iterator), next(iterator)
    other = DataLoader(Together(fewer), 4, **how)
    other.load_state_dict(loader.state_dict())
    assert_same(list(other), straight[2:])


@every_engine
@pytest.mark.parametrize("what", ["fewer", "more"])
def test_where_each_sample_must_have_its_key_another_number_of_them_is_an_error(what: str, how: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match=r"Together.__getitems__ returned \d samples for 4 keys"):
        list(DataLoader(Together(GIVEN[what]), 4, return_index=True, **how))


@every_engine
def test_a_batch_that_comes_in_one_piece_has_its_indices_but_cannot_be_taken_apart(how: dict[str, Any]) -> None:
    pieces = Together(WHOLE["a dict"], 4)
    [(batch, indices)] = DataLoader(pieces, 4, return_index=True, collate_fn=same, **how)
    assert batch["x"].tolist() == indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(SampleError, match=r"Together.__getitems__ returned a dict for 1 keys"):
        list(DataLoader(pieces, 4, on_error="skip", max_errors=2, collate_fn=same, **how))


@every_engine
def test_samples_that_did_not_come_are_skipped_by_name(how: dict[str, Any]) -> None:
    loader = DataLoader(Together(fewer, 9), 4, on_error="skip", **how)
    assert [label for batch in loader for label in batch["label"].tolist()] == [1, 2, 4, 5, 7, 8]
    assert [(entry.index, "0 samples for 1 keys" in entry.error) for entry in loader.errors] == [
        (0, True),
        (3, True),
        (6, True),
    ]


# -- the keys


class Given:
    """A batch sampler of whatever batches it is given."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __iter__(self) -> Any:
        return iter(self.given)


def told(keys: Any) -> list[Any]:
    """Samples that say what the keys were."""
    as_list = keys if isinstance(keys, (int, str, slice)) else [int(key) for key in keys]
    return [(f"{type(keys).__name__} {as_list}", row) for row in range(2)]


BATCHES = {
    "tuples": ((1, 2), (3, 4)),
    "arrays": (np.array([1, 2]), np.array([3, 4])),
    "tensors": (torch.tensor([1, 2]), torch.tensor([3, 4])),
    "ranges": (range(2), range(2, 4)),
    "slices": (slice(0, 2), slice(2, 6, 2), slice(None, -20)),
    "names": ("first.parquet", "second.parquet"),
    "numbers": (5, 6),
    "lists": ([1, 2], [3, 4]),
    "a mixture": ([1, 2], (3,), slice(3, 4)),
}


@every_engine
@pytest.mark.parametrize("what", BATCHES)
def test_the_dataset_is_asked_for_what_the_batch_sampler_gave(what: str, how: dict[str, Any]) -> None:
    given = BATCHES[what]
    theirs = batches(TorchLoader, Together(told), batch_sampler=Given(*given))
    assert_same(batches(DataLoader, Together(told), batch_sampler=Given(*given), **how), theirs)


@every_engine
def test_a_state_goes_on_behind_a_slice(how: dict[str, Any]) -> None:
    def loader() -> Any:
        return DataLoader(Together(lambda keys: [sample(key) for key in range(24)[keys]]), batch_sampler=cuts, **how)

    cuts = Given(slice(0, 5), slice(5, 9), slice(9, 10))
    first = loader()
    iterator = iter(first)
    assert next(iterator)["label"].tolist() == [0, 1, 2, 3, 4]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch["label"].tolist() for batch in second] == [[5, 6, 7, 8], [9]]


def test_return_index_tells_the_indices_that_a_slice_means() -> None:
    dataset = Together(lambda keys: [sample(key) for key in range(24)[keys]])
    [(batch, indices)] = DataLoader(dataset, batch_sampler=Given(slice(20, None, 2)), return_index=True)
    assert batch["label"].tolist() == indices.tolist() == [20, 22]


def test_a_dataset_that_reads_one_by_one_gets_the_items_as_in_torch() -> None:
    class Each:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, key: Any) -> str:
            return f"{type(key).__name__} {key}"

    for given in ((1, 2), np.array([1, 2]), torch.tensor([1, 2]), "ab"):
        assert list(DataLoader(Each(), batch_sampler=Given(given))) == list(
            TorchLoader(Each(), batch_sampler=Given(given))
        )
    with pytest.raises(TypeError, match="not iterable"):
        list(DataLoader(Each(), batch_sampler=Given(slice(2))))
