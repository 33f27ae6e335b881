"""Datasets that hold a random transform wherever Python code can hold one; importable in spawned workers."""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from support.numpy_datasets import Noise

GLOBAL = Noise()
N = 24


def by_a_global(index: int) -> Any:
    return GLOBAL()


class Holder:
    pipeline = GLOBAL


def by_a_class(index: int) -> Any:
    return Holder.pipeline()


def by_an_import_of_its_own(index: int) -> Any:
    from support import pipelines

    return pipelines.GLOBAL()


def closure(noise: Any) -> Callable[[int], Any]:
    def augment(index: int) -> Any:
        return noise()

    return augment


def decorated(noise: Any) -> Callable[[int], Any]:
    @functools.wraps(closure)
    def augment(index: int) -> Any:
        return within(index)

    within = closure(noise)
    return augment


def with_default(noise: Any) -> Callable[[int], Any]:
    def augment(index: int, noise: Any = noise) -> Any:
        return noise()

    return augment


def with_keyword(noise: Any) -> Callable[[int], Any]:
    def augment(index: int, *, noise: Any = noise) -> Any:
        return noise()

    return augment


def with_attribute(noise: Any) -> Callable[[int], Any]:
    def augment(index: int) -> Any:
        return augment.noise()  # type: ignore[attr-defined]

    augment.noise = noise  # type: ignore[attr-defined]
    return augment


def cached(noise: Any) -> Callable[[int], Any]:
    @functools.lru_cache(1)
    def pipeline() -> Any:
        return noise

    return lambda index: pipeline()()


def generator(noise: Any) -> Callable[[int], Any]:
    def endless() -> Iterator[Any]:
        while True:
            yield noise()

    stream = endless()
    return lambda index: next(stream)


def local(noise: Any) -> Callable[[int], Any]:
    here = threading.local()
    here.noise = noise
    return lambda index: here.noise()


def call(noise: Any, index: int) -> Any:
    return noise()


class Augmenter:
    def __init__(self, noise: Any) -> None:
        self.noise = noise

    def augment(self, index: int) -> Any:
        return self.noise()

    def __call__(self, index: int) -> Any:
        return self.noise()


class Slotted:
    __slots__ = ("__weakref__", "_noise", "empty")

    def __init__(self, noise: Any) -> None:
        self._noise = noise

    def __call__(self, index: int) -> Any:
        return self._noise()


class SlottedBelow(Slotted):
    """Slots of a base class, and a `__dict__`."""


def of_a_class(noise: Any) -> Callable[[int], Any]:
    class Base:
        pipeline = noise

    class Augment(Base):
        def __call__(self, index: int) -> Any:
            return self.pipeline()

    return Augment()


def of_a_method(noise: Any) -> Callable[[int], Any]:
    class Augment:
        @staticmethod
        def of_nobody() -> Any:
            return noise()

        @property
        def pipeline(self) -> Any:
            return noise

        def __call__(self, index: int) -> Any:
            return self.pipeline()

    return Augment()


def in_a_list_with_attributes(noise: Any) -> Callable[[int], Any]:
    class Steps(list[Any]):
        def __call__(self, index: int) -> Any:
            return self.noise()  # type: ignore[attr-defined]

    steps = Steps()
    steps.noise = noise  # type: ignore[attr-defined]
    return steps


def deeply(noise: Any) -> Callable[[int], Any]:
    augment: Any = closure(noise)
    for _ in range(5):
        augment = functools.partial(lambda inner, index: inner(index), augment)
    return augment  # type: ignore[no-any-return]


def weakly(noise: Any) -> Callable[[int], Any]:
    reference = weakref.ref(noise)
    return lambda index: reference()()  # type: ignore[misc]


# Name → makes an augmenting function that holds a Noise. Each thread gets its own copy of it; not with SHARED, GLOBALS.
PLACES: dict[str, Callable[[Any], Callable[[int], Any]]] = {
    "a lambda": lambda noise: lambda index: noise(),
    "a closure": closure,
    "a decorated function": decorated,
    "a default": with_default,
    "a keyword default": with_keyword,
    "the attribute of a function": with_attribute,
    "a partial's argument": lambda noise: functools.partial(call, noise),
    "a partial's keyword": lambda noise: functools.partial(lambda index, noise: noise(), noise=noise),
    "a partial's function": lambda noise: functools.partial(closure(noise)),
    "a bound method": lambda noise: Augmenter(noise).augment,
    "an object": Augmenter,
    "slots": Slotted,
    "the slots of a base": SlottedBelow,
    "a class attribute": of_a_class,
    "a list with attributes": in_a_list_with_attributes,
    "a deque": lambda noise: functools.partial(lambda steps, index: steps[0](), deque([noise])),
    "a set": lambda noise: functools.partial(lambda steps, index: next(iter(steps))(), {noise}),
    "many layers": deeply,
}
SHARED: dict[str, Callable[[Any], Callable[[int], Any]]] = {
    "a cached function": cached,
    "a generator": generator,
    "a weak reference": weakly,
    "the methods of a class": of_a_method,
}
GLOBALS: dict[str, Callable[[int], Any]] = {
    "a global": by_a_global,
    "an attribute of a class": by_a_class,
    "an import in the function": by_an_import_of_its_own,
}


class Augmented:
    """Sample i is what `augment(i)` draws."""

    def __init__(self, augment: Callable[[int], Any]) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return {"index": index, "draws": np.array(self.augment(index))}


class Bare:
    """A dataset without attributes: its method uses a global."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return {"index": index, "draws": np.array(GLOBAL())}


class Lazy(Augmented):
    """Makes its transform when the first sample is read."""

    def __init__(self) -> None:
        self.noise: Any = None

    def __getitem__(self, index: int) -> Any:
        if self.noise is None:
            self.noise = Noise()
            self.noise.set_random_state(np.random.default_rng(), None)
        generator = self.noise.generator
        return {"index": index, "draws": np.array([generator.random(), generator.random()])}


class Making(Augmented):
    """Makes a transform for every sample."""

    def __init__(self) -> None:
        super().__init__(lambda index: None)

    def __getitem__(self, index: int) -> Any:
        noise = Noise()
        noise.set_random_state(np.random.default_rng(), random.Random())
        return {"index": index, "draws": np.array(noise())}


class Drawing(Augmented):
    """Draws from a generator of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        self.generator = generator
        self.draw = draw

    def __getitem__(self, index: int) -> Any:
        return {"index": index, "draws": np.array(self.draw(self.generator))}
