"""Transforms with their own random state: found wherever a dataset holds them, and keyed before every sample."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from loaders.randomness.calls import Called
from loaders.randomness.holdings import parts, with_parts
from loaders.randomness.signatures import is_stateful, takes
from loaders.randomness.streams import Domain, KeyedGenerator

# Maximum number of objects in a search: whatever holds more holds data.
_MANY = 20_000
_LEVELS = 16
# A part's path that begins with one of these is appended to its holder's.
_JOINED = ("", ".", "[", "(", " ")


class Found(NamedTuple):
    """A transform, or a generator.

    Attributes:
        path: how it is reached: "dataset.transform", "my_module.AUGMENT" …
        value: the object.
        local: True if each thread already has its own.
    """

    path: str
    value: Any
    local: bool


def _is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        shared = (vars(random)["_inst"], np.random.mtrand._rand)
        return not any(value is each for each in shared) and not isinstance(value, random.SystemRandom)
    kind = getattr(torch, "Generator", None)
    return kind is not None and isinstance(value, kind) and value is not getattr(torch, "default_generator", None)


class Search:
    """A breadth-first search of what the code that makes a sample can reach; each object is visited once.

    Args:
        roots: name → dataset or collate_fn.

    Attributes:
        transforms: those that can be keyed, in an order that depends on the roots alone.
        generators: those that a sample may draw from, and that are not keyed.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self.transforms: list[Found] = []
        self.generators: list[Found] = []
        package = _package_of(roots["dataset"])
        seen: dict[int, Any] = {}  # holds the objects, so that no id is reused
        ahead = deque((path, root, False) for path, root in roots.items())
        while ahead and len(seen) < _MANY:
            path, value, local = ahead.popleft()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if is_stateful(type(value)):
                self.transforms.append(Found(path, value, local))
                continue
            if _is_generator(value):
                self.generators.append(Found(path, value, local))
                continue
            if isinstance(value, KeyedGenerator) or getattr(type(value), "keys_itself", False):
                continue
            for part in parts(value, package):
                below = path + part.path if part.path[:1] in _JOINED else part.path
                ahead.append((below, part.value, local or part.local))


@dataclass
class _Keyed:
    """A transform, its keyed generator, and whether it takes generators instead of a seed."""

    path: str
    transform: Any
    generator: KeyedGenerator
    takes_state: bool
    refuses: bool = False

    def rekey(self, domain: Domain, seed: int, epoch: int, position: int, stream: int) -> None:
        self.generator.rekey(domain, seed, epoch, position, stream)
        word = self.generator.numpy.bit_generator.random_raw()
        if self.takes_state:
            self.generator.python.seed(word)
            self.transform.set_random_state(self.generator.numpy, self.generator.python)
        else:
            self.transform.set_random_seed(word & 0xFFFFFFFF)


class KeyedTransforms:
    """The stateful transforms that a dataset and a collate_fn reach, keyed before every sample and every batch.

    A transform with `set_random_state(generator, random)`, as an albumentations Compose has it, is given generators;
    one with `set_random_seed(seed)` alone is given a seed.

    Args:
        dataset, collate: what to search.
        shared: transforms that other threads use too.

    Attributes:
        notes: messages for the user about what cannot be keyed.
    """

    def __init__(self, dataset: Any, collate: Any = None, shared: Sequence[Found] = ()) -> None:
        self.notes: list[str] = [_SHARED.format(found.path, _kind(found)) for found in shared]
        self._roots = _roots(dataset, collate)
        self._take(Search(self._roots))

    def _take(self, search: Search) -> None:
        self._found = [
            _Keyed(path, each, KeyedGenerator(), takes(type(each), "set_random_state", 2))
            for path, each, _ in search.transforms
        ]
        self._drawn_from = {id(found.value): _print_of(found.value) for found in search.generators}

    def __bool__(self) -> bool:
        return bool(self._found)

    def rekey(self, seed: int, epoch: int, position: int, domain: Domain = Domain.TRANSFORM) -> None:
        """Set every transform to the stream of this sample or, in the domain COLLATE, of this batch."""
        first = 0 if domain is Domain.TRANSFORM else 1  # the first stream of a batch is that of `sample_rng`
        for stream, keyed in enumerate(self._found, first):
            if keyed.refuses:
                continue
            try:
                keyed.rekey(domain, seed, epoch, position, stream)
            except Exception as error:  # noqa: BLE001  a method of that name for another purpose; reported in `notes`
                keyed.refuses = True
                self.notes.append(_REFUSED.format(keyed.path, type(keyed.transform).__name__, error))

    def look_again(self, called: Sequence[Called], *, threaded: bool, alone: bool, stream: bool) -> bool:
        """Search again after the first samples were read: some code creates its transforms only then.

        Args:
            called: the transforms that were called.
            threaded: True if other threads read the same dataset.
            alone: True for a single reader: a generator of the dataset is then drawn from in one place only.
            stream: True if what was read cannot be read again.

        Returns:
            Whether the transforms have changed. The new ones are keyed from here on.
        """
        search = Search(self._roots)
        before = {id(keyed.transform) for keyed in self._found}
        late = [found for found in search.transforms if id(found.value) not in before]
        if late and stream:
            self.notes += [_LATE.format(found.path, _kind(found)) for found in late]
        if threaded:
            self.notes += [_SHARED.format(found.path, _kind(found)) for found in late if not found.local]
        reached = {id(found.value) for found in search.transforms}
        unreached = {each.where: each for each in called if id(each.transform) not in reached}
        self.notes += [_UNREACHED.format(each.where, type(each.transform).__name__) for each in unreached.values()]
        if not (alone or stream):
            self.notes += [
                _DRAWN.format(found.path, _kind(found))
                for found in search.generators
                if self._drawn_from.get(id(found.value)) != _print_of(found.value)
            ]
        if [keyed.transform for keyed in self._found] == [found.value for found in search.transforms]:
            return False
        self._take(search)
        return True


_ADVICE = "What it draws depends on which worker reads which sample"
_SHARED = "{} ({}) is shared by all worker threads, which corrupt its random state. Hold it in the dataset itself."
_REFUSED = "{} ({}) refuses a seed: {}. " + _ADVICE + "; draw from loaders.sample_rng()."
_LATE = "{} ({}) was made while the first batch was read, so its draws for that batch are unkeyed. Make it in __init__."
_UNREACHED = (
    "{} calls a {} that is made for this sample alone, or held where the loader cannot find it. "
    + _ADVICE
    + ": hold it in an attribute of the dataset."
)
_DRAWN = "{} ({}) was drawn from while samples were read. " + _ADVICE + ": draw from loaders.sample_rng()."


def _kind(found: Found) -> str:
    return type(found.value).__name__


def _roots(dataset: Any, collate: Any) -> dict[str, Any]:
    return {"dataset": dataset} if collate is None else {"dataset": dataset, "collate_fn": collate}


def _print_of(generator: Any) -> Any:
    """The state of a generator, which changes when it is drawn from."""
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state())
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state().numpy().tobytes()


def with_own_transforms(dataset: Any, collate: Any = None) -> tuple[Any, Any, list[Found]]:
    """(dataset, collate_fn, shared) for one thread: stateful transforms are copied, everything else is shared.

    Two threads that share a Compose corrupt its random state and silently get wrong results. `shared` lists the
    transforms that could not be copied: globals of a module, for example.
    """
    package = _package_of(dataset)
    seen: set[int] = set()
    copies: dict[int, Any] = {}
    own = [_own(root, package, seen, copies) for root in (dataset, collate)]
    theirs = {id(found.value) for found in Search(_roots(dataset, collate)).transforms}
    mine = Search(_roots(*own)).transforms
    return own[0], own[1], [found for found in mine if id(found.value) in theirs and not found.local]


def _own(holder: Any, package: str, seen: set[int], copies: dict[int, Any], levels: int = _LEVELS) -> Any:
    """`holder`, or a copy of it with its own transforms if it holds any."""
    if is_stateful(type(holder)) or isinstance(holder, KeyedGenerator):
        return copy.deepcopy(holder, copies)  # the same copy wherever it is reached again
    if id(holder) in seen or not levels:
        return copies.get(id(holder), holder)
    seen.add(id(holder))
    own = {
        part.key: mine
        for part in parts(holder, package)
        if part.key is not None and (mine := _own(part.value, package, seen, copies, levels - 1)) is not part.value
    }
    if not own:
        return holder
    clone = copies[id(holder)] = with_parts(holder, own)
    return clone


def _package_of(dataset: Any) -> str:
    return type(dataset).__module__.partition(".")[0]
