"""Looking into the user's dataset: which transforms hold random state, and which sample an index means."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from loaders.rng import Domain, KeyedGenerator

_SUBSETS = {("torch.utils.data.dataset", "Subset")}
_CONCATS = {("torch.utils.data.dataset", "ConcatDataset")}


def _kind(dataset: Any) -> tuple[str, str]:
    return type(dataset).__module__, type(dataset).__qualname__


def resolve(dataset: Any, key: Any) -> tuple[Any, Any]:
    """The dataset and index that `dataset[key]` ends at: torch's Subset and ConcatDataset are looked through."""
    while True:
        kind = _kind(dataset)
        if kind in _SUBSETS:
            dataset, key = dataset.dataset, dataset.indices[key]
        elif kind in _CONCATS:
            if key < 0:
                key += len(dataset)
            number = next(i for i, end in enumerate(dataset.cumulative_sizes) if key < end)
            key -= dataset.cumulative_sizes[number - 1] if number else 0
            dataset = dataset.datasets[number]
        else:
            return dataset, key


def reads_batches(dataset: Any) -> bool:
    """True for datasets with a `__getitems__` of their own: a Subset only passes it on."""
    while _kind(dataset) in _SUBSETS:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def describe(dataset: Any, key: Any) -> str | None:
    """What the dataset says the sample is, usually its path; None if it says nothing."""
    try:
        base, index = resolve(dataset, key)
        return str(base.describe(index)) if hasattr(base, "describe") else None
    except Exception:  # the sample is at fault already: its description must not hide the error that is being told
        return None


def _is_stateful(value: Any) -> bool:
    return not isinstance(value, type) and (hasattr(value, "set_random_state") or hasattr(value, "set_random_seed"))


def _below(dataset: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(dataset, "__dict__", {}).items()


def _find(dataset: Any, seen: set[int]) -> Iterator[Any]:
    """Stateful transforms among the attributes of a dataset and of the datasets it wraps."""
    if id(dataset) in seen:
        return
    seen.add(id(dataset))
    for name, value in _below(dataset):
        if _is_stateful(value):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif name in ("dataset", "datasets"):
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                yield from _find(inner, seen)


class KeyedTransforms:
    """The stateful transforms of a dataset, keyed before every sample.

    A transform with `set_random_state(generator, random)`, as an albumentations Compose has it, is given generators; one
    with `set_random_seed(seed)` alone is given a seed.
    """

    def __init__(self, dataset: Any) -> None:
        self._found = [(transform, KeyedGenerator()) for transform in _find(dataset, set())]

    def rekey(self, seed: int, epoch: int, position: int) -> None:
        """Send every transform to the stream of this sample."""
        for stream, (transform, generator) in enumerate(self._found):
            generator.rekey(Domain.TRANSFORM, seed, epoch, position, stream)
            if hasattr(transform, "set_random_state"):
                generator.python.seed(generator.numpy.bit_generator.random_raw())
                transform.set_random_state(generator.numpy, generator.python)
            else:
                transform.set_random_seed(generator.numpy.bit_generator.random_raw() & 0xFFFFFFFF)


def with_own_transforms(dataset: Any) -> Any:
    """A copy of the dataset for one thread: stateful transforms are its own, everything else is shared.

    One Compose that two threads share mixes up their random states and gives wrong results silently.
    """
    clone = dataset
    for name, value in _below(dataset):
        if _is_stateful(value) or hasattr(value, "__own_state__"):
            own = copy.deepcopy(value)
        elif name == "dataset":
            own = with_own_transforms(value)
        elif name == "datasets" and isinstance(value, (list, tuple)):
            own = type(value)(with_own_transforms(inner) for inner in value)
        else:
            continue
        if own is not value:
            if clone is dataset:
                clone = copy.copy(dataset)
            object.__setattr__(clone, name, own)
    return clone
