"""Custom collate functions, and loaders without batches: what arrives is what torch's DataLoader delivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same_seen, ours_and_theirs, told
from support.samples import SAMPLES, Listed, Point, Record, image

# name → a sample that default_convert leaves as it is or makes a tensor of, besides all of SAMPLES
UNBATCHED: dict[str, Callable[[int], Any]] = {
    **SAMPLES,
    "None": lambda i: None,
    "object": lambda i: Marked(i),
    "str array": lambda i: np.array([str(i)]),
    "object array": lambda i: np.array([None, i]),
    "complex": lambda i: complex(i),
    "set": lambda i: {i},
    "shapes differ": lambda i: np.zeros(i),
    "int beyond int64": lambda i: 2**70 + i,
    "memory shared by two": lambda i: (lambda a: {"a": a, "b": a})(image(i)),
    "sparse tensor": lambda i: {"a": torch.eye(2).to_sparse()},
    "uint64 scalar": lambda i: np.uint64(i),
}


class Marked:
    def __init__(self, mark: int) -> None:
        self.mark = mark

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Marked) and other.mark == self.mark

    __hash__ = None  # type: ignore[assignment]  # equality is all that is needed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", UNBATCHED)
def test_without_batching_a_sample_is_converted_as_torch_does(name: str, engine: str) -> None:
    dataset = Listed([UNBATCHED[name](i) for i in range(3)])
    ours, theirs = ours_and_theirs(dataset, engine, batch_size=None)
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "sample", [lambda i: np.full(2, i, ">f4"), lambda i: {"a": np.full(2, i, "M8[s]")}, lambda i: np.timedelta64(i)]
)
def test_a_sample_that_torch_cannot_convert_is_named(sample: Callable[[int], Any], engine: str) -> None:
    dataset = Listed([sample(i) if i == 1 else i for i in range(3)])
    ours, theirs = ours_and_theirs(dataset, engine, batch_size=None)
    assert_same_seen(ours, theirs)
    errors = [event for event in ours.epochs[0] if isinstance(event, Exception)]
    assert ["sample 1" in told(error) for error in errors] == [True] * len(errors)


def _view_of_another(samples: Any) -> Any:
    whole = torch.tensor(samples)
    return {"whole": whole, "first": whole[:1]}


def _first_nothing_then_something(samples: Any) -> Any:
    return [np.zeros(samples[0]), np.ones(3), torch.zeros(0)]


# name → what a custom collate_fn makes of a list of ints
COLLATES: dict[str, Callable[[Any], Any]] = {
    "tensor": torch.tensor,
    "array": np.array,
    "list itself": lambda samples: samples,
    "nested": lambda samples: {"a": (torch.tensor(samples), [np.array(samples)]), "b": Point("x", None)},
    "str": lambda samples: "".join(map(str, samples)),
    "None": lambda samples: None,
    "int": sum,
    "object": lambda samples: Marked(sum(samples)),
    "a view of another tensor": _view_of_another,
    "the same tensor twice": lambda samples: [t := torch.tensor(samples), t],
    "empty arrays": _first_nothing_then_something,
    "larger each time": lambda samples: torch.zeros(10 ** samples[0]),
    "one more array each time": lambda samples: [np.full(2, i) for i in range(samples[0])],
    "Fortran order": lambda samples: np.asfortranarray(np.ones((2, 3))),
    "channels last": lambda samples: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "non-contiguous": lambda samples: torch.arange(6).reshape(2, 3).t(),
    "bfloat16": lambda samples: torch.tensor(samples, dtype=torch.bfloat16),
    "sparse": lambda samples: torch.eye(2).to_sparse(),
    "requires grad": lambda samples: torch.ones(2, requires_grad=True),
    "Parameter": lambda samples: torch.nn.Parameter(torch.ones(2)),
    "str array": lambda samples: np.array(["a", "bc"]),
    "object array": lambda samples: np.array([None, 1]),
    "datetime": lambda samples: np.array([1, 2], "M8[s]"),
    "big-endian": lambda samples: np.ones(2, ">f4"),
    "structured": lambda samples: np.zeros(2, "i4,f4"),
    "read-only": lambda samples: np.broadcast_to(np.ones(1), (3,)),
    "dataclass": lambda samples: Record(torch.tensor(samples), "a"),
    "packed sequence": lambda samples: torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]),
    "exception as a value": lambda samples: {"error": str(ValueError("x"))},
    "default_collate, called by hand": lambda samples: torch.utils.data.default_collate(samples),
    "default_convert": torch.utils.data.default_convert,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", COLLATES)
def test_what_a_collate_fn_returns_arrives_unchanged(name: str, engine: str) -> None:
    ours, theirs = ours_and_theirs(Listed(list(range(7))), engine, batch_size=2, collate_fn=COLLATES[name])
    assert not any(isinstance(event, Exception) for event in theirs.epochs[0])
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collate_fn_of_single_samples_gets_each_sample(engine: str) -> None:
    ours, theirs = ours_and_theirs(
        Listed([(i, str(i)) for i in range(4)]), engine, batch_size=None, collate_fn=lambda sample: {"got": sample}
    )
    assert_same_seen(ours, theirs)
