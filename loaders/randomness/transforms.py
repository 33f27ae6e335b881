"""Transforms with random state of their own, found inside a dataset and keyed before every sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from loaders.nested import rebuild
from loaders.randomness.streams import Domain, KeyedGenerator

# Longer lists and dicts are data; transforms come in short ones, near the dataset.
_MANY = 1000
_LEVELS = 8
_ATOMS = (str, bytes, int, float, bool, type(None), np.ndarray)


def _is_stateful(value: Any) -> bool:
    # Asked of the type: objects that answer to any name, such as proxies, are no transforms.
    return hasattr(type(value), "set_random_state") or hasattr(type(value), "set_random_seed")


def _parts(holder: Any) -> list[tuple[Any, Any]]:
    """(name, part) of what may hold a transform: the attributes of an object, the items of a short container."""
    if isinstance(holder, (list, tuple, dict)):
        named = () if len(holder) > _MANY else holder.items() if isinstance(holder, dict) else enumerate(holder)
    else:
        named = () if isinstance(holder, (type, ModuleType, FunctionType)) else getattr(holder, "__dict__", {}).items()
    return [(name, part) for name, part in named if type(part) not in _ATOMS]


def _find(holder: Any, seen: set[int], levels: int = _LEVELS) -> Iterator[Any]:
    """Stateful transforms in a dataset, in the datasets it wraps and in the objects it holds; each once."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if _is_stateful(holder):
        yield holder
    elif levels and not getattr(type(holder), "keys_itself", False):
        for _, part in _parts(holder):
            yield from _find(part, seen, levels - 1)


class KeyedTransforms:
    """The stateful transforms of a dataset, keyed before every sample.

    A transform with `set_random_state(generator, random)`, as an albumentations Compose has it, is given generators;
    one with `set_random_seed(seed)` alone is given a seed.
    """

    def __init__(self, dataset: Any) -> None:
        self._found = [(transform, KeyedGenerator()) for transform in _find(dataset, set())]

    def __bool__(self) -> bool:
        return bool(self._found)

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
    return _own(dataset, set(), {})


def _own(holder: Any, seen: set[int], copies: dict[int, Any], levels: int = _LEVELS) -> Any:
    """`holder`, or a copy of it if there are transforms below it."""
    if _is_stateful(holder) or isinstance(holder, KeyedGenerator):
        return copy.deepcopy(holder, copies)  # the same copy wherever it is met again
    if id(holder) in seen or not levels:
        return copies.get(id(holder), holder)
    seen.add(id(holder))
    own = {name: mine for name, part in _parts(holder) if (mine := _own(part, seen, copies, levels - 1)) is not part}
    if not own:
        return holder
    if isinstance(holder, tuple):
        clone = rebuild(holder, [own.get(number, part) for number, part in enumerate(holder)])
    else:
        clone = copy.copy(holder)
        for name, mine in own.items():
            if isinstance(holder, (list, dict)):
                clone[name] = mine
            else:
                object.__setattr__(clone, name, mine)
    copies[id(holder)] = clone
    return clone
