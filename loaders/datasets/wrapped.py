"""Datasets that wrap others: the dataset and index that a sample comes from, and its description."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

_SUBSETS = {("torch.utils.data.dataset", "Subset")}
_CONCATS = {("torch.utils.data.dataset", "ConcatDataset")}


def _kind(dataset: Any) -> tuple[str, str]:
    return type(dataset).__module__, type(dataset).__qualname__


def resolve(dataset: Any, key: Any) -> tuple[Any, Any]:
    """The dataset and index that `dataset[key]` reads in the end; torch's Subset and ConcatDataset are unwrapped."""
    while True:
        kind = _kind(dataset)
        if kind in _SUBSETS:
            dataset, key = dataset.dataset, dataset.indices[key]
        elif kind in _CONCATS:
            if key < 0:
                if -key > len(dataset):
                    raise ValueError("absolute value of index should not exceed dataset length")
                key += len(dataset)
            number = bisect.bisect_right(dataset.cumulative_sizes, key)
            key -= dataset.cumulative_sizes[number - 1] if number else 0
            dataset = dataset.datasets[number]
        else:
            return dataset, key


def bases(dataset: Any) -> Iterator[Any]:
    """The datasets that samples of `dataset` may come from, as `resolve` finds them."""
    kind = _kind(dataset)
    if kind in _SUBSETS:
        yield from bases(dataset.dataset)
    elif kind in _CONCATS:
        for inner in dataset.datasets:
            yield from bases(inner)
    else:
        yield dataset


def reads_batches(dataset: Any) -> bool:
    """Whether the dataset has a `__getitems__`; a Subset's only counts if the dataset inside has one."""
    while _kind(dataset) in _SUBSETS:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def describe(dataset: Any, key: Any, *, passed_on: bool = False) -> str | None:
    """The dataset's description of the sample, usually its path; None if there is none.

    A `describe` that a wrapper's `__getattr__` forwards to the dataset inside is used only with `passed_on`: there the
    index may mean another sample.
    """
    try:
        base, index = resolve(dataset, key)
        return str(base.describe(index)) if hasattr(base if passed_on else type(base), "describe") else None
    except Exception:  # usually called to report an error, which a failing description must not hide
        return None
