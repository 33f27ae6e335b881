"""`default_collate` with functions of the user's: what torch calls them for, so do we."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same, events_of
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data._utils.collate import default_collate_fn_map

from loaders import DataLoader, numpy_collate
from loaders.batch.collate import registered_collation


class Named(NamedTuple):
    image: Any
    label: int


@dataclass
class Point:
    x: Any
    y: int


class Base:
    pass


@dataclass
class Derived(Base):
    x: int


class Card:
    """No row holds one."""

    def __init__(self, number: int) -> None:
        self.number = number


class Samples:
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def told(batch: Any, *, collate_fn_map: Any) -> str:
    """Stands for any function that is not torch's."""
    return f"{len(batch)} of {type(batch[0]).__name__}"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = dict(default_collate_fn_map)
    yield
    default_collate_fn_map.clear()
    default_collate_fn_map.update(before)


KINDS: dict[str, tuple[Any, Any]] = {
    "tensors": (torch.Tensor, lambda i: {"a": torch.full((2,), i), "b": i}),
    "ints": (int, lambda i: {"a": i, "b": float(i)}),
    "ints that are bools": (int, lambda i: {"a": i > 2}),
    "floats": (float, lambda i: (i, float(i))),
    "dicts": (dict, lambda i: [{"a": i}, i]),
    "lists": (list, lambda i: {"a": [i, i], "b": (i, i)}),
    "tuples": (tuple, lambda i: {"a": [i, i], "b": (i, i)}),
    "arrays": (np.ndarray, lambda i: {"a": np.full(3, i), "b": i}),
    "scalars of NumPy": (np.float32, lambda i: {"a": np.float32(i), "b": np.int64(i)}),
    "a namedtuple": (Named, lambda i: Named(np.full(3, i), i)),
    "a dataclass": (Point, lambda i: {"a": Point(np.full(3, i), i)}),
    "a base of a dataclass": (Base, lambda i: {"a": Derived(i)}),
    "a class of the user's": (Card, lambda i: {"a": Card(i), "b": np.full(3, i)}),
    "several at once": ((list, dict), lambda i: {"a": i, "b": np.full(3, i)}),
    "everything": (object, lambda i: {"a": i}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_was_registered_for_a_kind_makes_its_batch(kind: str, engine: str) -> None:
    registered, make = KINDS[kind]
    default_collate_fn_map[registered] = told
    theirs = events_of(TorchLoader(Samples(make), 4))  # type: ignore[var-annotated, arg-type]
    assert "of" in str(theirs)
    assert_same(events_of(DataLoader(Samples(make), 4, **ENGINES[engine])), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_collate_calls_it_too(kind: str) -> None:
    registered, make = KINDS[kind]
    default_collate_fn_map[registered] = told
    theirs = events_of(TorchLoader(Samples(make), 4))  # type: ignore[var-annotated, arg-type]
    assert_same(events_of(TorchLoader(Samples(make), 4, collate_fn=numpy_collate)), theirs)  # type: ignore[arg-type]
    assert_same(events_of(DataLoader(Samples(make), 4, collate_fn=numpy_collate)), theirs)


def test_a_loader_that_was_used_before_the_registration_follows_it() -> None:
    loader = DataLoader(Samples(lambda i: {"a": i}), 6)
    assert [batch["a"].tolist() for batch in loader] == [[0, 1, 2, 3, 4, 5]]
    default_collate_fn_map[int] = told
    assert list(loader) == [{"a": "6 of int"}]


def test_a_kind_that_no_row_holds_leaves_the_others_in_their_rows() -> None:
    assert registered_collation() == ()
    default_collate_fn_map[Card] = told
    assert registered_collation() == ()
    default_collate_fn_map[int] = told
    assert registered_collation() == ((int, told),)
