"""A batch of ours is what torch's DataLoader makes of the same samples, or is refused where torch refuses it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same, assert_same_seen, ours_and_theirs, told
from support.samples import REFUSED, SAMPLES, Listed, Record


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_batch_of_any_kind_of_sample_is_what_torch_makes(name: str, engine: str) -> None:
    dataset = Listed([SAMPLES[name](i) for i in range(5)])
    ours, theirs = ours_and_theirs(dataset, engine, batch_size=2)
    assert not any(isinstance(event, Exception) for event in theirs.epochs[0])
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_by_name_and_the_next_batch_comes(name: str, engine: str) -> None:
    dataset = Listed([REFUSED[name](i) for i in range(5)])
    ours, theirs = ours_and_theirs(dataset, engine, batch_size=2)
    errors = [event for event in ours.epochs[0] if isinstance(event, Exception)]
    assert errors
    assert_same_seen(ours, theirs)
    for error in errors:
        assert re.search(r"sample \d", told(error)), told(error)
    if len(errors) == 1:
        assert "sample 3" in told(errors[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("sample", "batch"),
    [
        (lambda i: (np.arange(4) + i)[::-1], torch.tensor([[3, 2, 1, 0], [4, 3, 2, 1]])),
        (lambda i: np.uint64(2**63 + i), torch.tensor([2**63, 2**63 + 1], dtype=torch.uint64)),
        (lambda i: Record(np.full(2, i), "a"), Record(torch.tensor([[0, 0], [1, 1]]), ["a", "a"])),
    ],
    ids=["negative strides", "uint64 scalar", "dataclass"],
)
def test_some_samples_that_torch_refuses_make_a_batch_here(sample: Any, batch: Any, engine: str) -> None:
    dataset = Listed([sample(i) for i in range(2)])
    ours, theirs = ours_and_theirs(dataset, engine, batch_size=2)
    assert isinstance(theirs.epochs[0][0], Exception)
    assert_same(ours.epochs[0], [batch])
