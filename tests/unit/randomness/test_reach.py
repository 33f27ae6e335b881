"""A transform is keyed wherever the code that reads a sample reaches it; what cannot be keyed is told, once."""

from __future__ import annotations

import random
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from support import pipelines
from support.numpy_datasets import Noise
from support.pipelines import GLOBALS, PLACES, SHARED, Augmented, Bare, Drawing, Lazy, Making
from torch.utils.data import IterableDataset

from loaders import DataLoader
from loaders.randomness.calls import Calls
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.randomness.transforms import KeyedTransforms, Search, with_own_transforms

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]
ENGINES: dict[str, dict[str, Any]] = {
    "inline": {},
    "3 processes": {"num_workers": 3, "multiprocessing_context": "fork"},
    "3 threads": {"num_workers": 3, "worker_method": "thread"},
}
PROCESSES = ["inline", "3 processes"]
ALL = {**PLACES, **SHARED}


def draws(dataset: Any, engine: str, **arguments: Any) -> list[Any]:
    loader = DataLoader(dataset, 4, seed=7, **{**ENGINES[engine], **arguments})
    return [row for batch in loader for row in batch["draws"].tolist()]


def told(dataset: Any, engine: str, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader: Any = DataLoader(dataset, 4, seed=7, **{**ENGINES[engine], **arguments})
        for _ in range(2):
            list(loader)
    return [text for each in caught if not (text := str(each.message)).startswith(("This DataLoader", "This process"))]


def expected() -> list[Any]:
    """What the same transform draws in a place where it was always found."""
    return draws(Augmented(Noise() and PLACES["an object"](Noise())), "inline")


@pytest.mark.parametrize("engine", PROCESSES)
@pytest.mark.parametrize("place", ALL)
def test_a_transform_is_keyed_wherever_the_code_reaches_it(place: str, engine: str) -> None:
    noise = Noise()
    assert draws(Augmented(ALL[place](noise)), engine) == expected()


@pytest.mark.parametrize("place", PLACES)
def test_a_thread_has_its_own_wherever_it_can_be_given_one(place: str) -> None:
    noise = Noise()
    dataset = Augmented(PLACES[place](noise))
    mine, _, shared = with_own_transforms(dataset)
    assert not shared
    [found], [original] = Search({"dataset": mine}).transforms, Search({"dataset": dataset}).transforms
    assert found.value is not noise
    assert original.value is noise
    assert draws(dataset, "3 threads") == expected()


@pytest.mark.parametrize("place", SHARED)
def test_threads_that_share_one_say_so_and_name_it(place: str) -> None:
    noise = Noise()
    [note] = told(Augmented(SHARED[place](noise)), "3 threads")
    assert "(Noise) is shared by all worker threads" in note


@pytest.mark.parametrize("place", GLOBALS)
@pytest.mark.parametrize("engine", PROCESSES)
def test_a_transform_that_a_module_or_a_class_holds_is_keyed(place: str, engine: str) -> None:
    assert draws(Augmented(GLOBALS[place]), engine) == expected()


@pytest.mark.parametrize("place", GLOBALS)
def test_threads_share_it_and_say_so(place: str) -> None:
    [note] = told(Augmented(GLOBALS[place]), "3 threads")
    assert note.startswith(("support.pipelines.GLOBAL (Noise) is shared", "Holder.pipeline (Noise) is shared"))


def test_a_dataset_without_any_attribute_is_keyed_by_what_its_method_names() -> None:
    [found] = Search({"dataset": Bare()}).transforms
    assert (found.path, found.value) == ("support.pipelines.GLOBAL", pipelines.GLOBAL)
    assert draws(Bare(), "3 processes") == expected()


def test_a_spawned_worker_keys_them_alike() -> None:
    for augment in (GLOBALS["a global"], PLACES["a bound method"](Noise()), PLACES["slots"](Noise())):
        assert draws(Augmented(augment), "3 processes", multiprocessing_context="spawn") == expected()


def test_a_thread_local_one_is_found_in_its_thread() -> None:
    [found] = Search({"dataset": Augmented(pipelines.local(Noise()))}).transforms
    assert found.local


@pytest.mark.parametrize("engine", PROCESSES)
def test_one_that_is_made_with_the_first_sample_is_keyed_from_that_sample_on(engine: str) -> None:
    assert draws(Lazy(), engine) == draws(Lazy(), "inline")
    assert told(Lazy(), engine) == []


def test_one_that_is_made_in_a_dataset_that_threads_share_is_told() -> None:
    [note] = told(Lazy(), "3 threads")
    assert note.startswith("dataset.noise (Noise) is shared by all worker threads")


# In the consumer's own thread nothing looks at calls: a signal handler may raise there.
@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"inline"}))
def test_one_that_is_made_for_every_sample_is_told_once(engine: str) -> None:
    [note] = told(Making(), engine)
    assert note.startswith("support.pipelines.__getitem__ (line ")
    assert "calls a Noise that is made for this sample alone" in note


def test_a_function_that_makes_one_is_told_too() -> None:
    def augment(index: int) -> Any:
        return A.Compose([A.NoOp()])(image=np.zeros((2, 2, 3), np.uint8))["image"]

    [note] = told(Augmented(augment), "3 processes")
    assert note.startswith(f"{__name__}.augment (line ")
    assert "calls a Compose that is made for this sample alone" in note


def test_code_that_only_builds_the_dataset_is_not_told() -> None:
    class Built(Augmented):
        def __init__(self) -> None:
            super().__init__(Noise().__class__ and (lambda index: (0.0, 0.0)))
            self.setup()

        def setup(self) -> Any:
            return Noise()

    assert told(Built(), "3 processes") == []


def test_code_that_makes_none_because_it_has_one_is_not_told() -> None:
    class Either(Augmented):
        def __getitem__(self, index: int) -> Any:
            noise = self.augment or Noise()
            return {"draws": np.array(noise())}

    assert told(Either(Noise()), "3 processes") == []


GENERATORS: dict[str, tuple[Any, Any]] = {
    "numpy": (np.random.default_rng, lambda generator: generator.random()),
    "numpy, legacy": (np.random.RandomState, lambda generator: generator.rand()),
    "python": (random.Random, lambda generator: generator.random()),
    "torch": (
        lambda seed: torch.Generator().manual_seed(seed),
        lambda generator: torch.rand((), generator=generator).item(),
    ),
}


@pytest.mark.parametrize("engine", ["3 processes", "3 threads"])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_datasets_that_workers_draw_from_is_told(kind: str, engine: str) -> None:
    make, draw = GENERATORS[kind]
    [note] = told(Drawing(make(0), draw), engine)
    assert note.startswith("dataset.generator (")
    assert note.endswith("draw from loaders.sample_rng().")


@pytest.mark.parametrize("kind", GENERATORS)
def test_one_that_nobody_draws_from_or_one_reader_alone_is_not(kind: str) -> None:
    make, draw = GENERATORS[kind]
    assert told(Drawing(make(0), lambda generator: 0.0), "3 processes") == []
    assert told(Drawing(make(0), draw), "inline") == []


def test_the_process_s_own_generators_are_keyed_and_not_told() -> None:
    assert (
        told(Augmented(lambda index: random.random() + np.random.rand() + torch.rand(()).item()), "3 processes") == []
    )
    own = SimpleNamespace(draw=random.random, numpy=np.random.rand, torch=torch.default_generator)
    assert Search({"dataset": own}).generators == []


# -- other signatures


class Named:
    """Takes a name, a list, nothing …: no pipeline of albumentations."""

    def set_random_seed(self, name: str, strength: float) -> None:
        raise AssertionError("this is not for the loader to call")

    def __call__(self, index: int) -> Any:
        return 0.0, 0.0


class Silent(Named):
    def set_random_seed(self) -> None:  # type: ignore[override]
        raise AssertionError("nor is this")


class WithOthers(Named):
    def set_random_state(self, state: Any) -> None:
        raise AssertionError("nor is this")


class Keyword(Named):
    def set_random_seed(self, *, seed: int) -> None:  # type: ignore[override]
        raise AssertionError("nor is this")


@pytest.mark.parametrize("kind", [Named, Silent, WithOthers, Keyword])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_method_of_that_name_with_other_arguments_is_not_called(kind: Any, engine: str) -> None:
    assert not KeyedTransforms(Augmented(kind()))
    assert draws(Augmented(kind()), engine) == [[0.0, 0.0]] * pipelines.N
    assert told(Augmented(kind()), engine) == []


def test_what_such_an_object_holds_is_found() -> None:
    outer = Named()
    outer.inner = Noise()  # type: ignore[attr-defined]
    assert [found.path for found in Search({"dataset": Augmented(outer)}).transforms] == ["dataset.augment.inner"]


class Refusing(Named):
    def set_random_seed(self, name: str) -> None:  # type: ignore[override]
        raise TypeError(f"{name} is no name")


@pytest.mark.parametrize("engine", ENGINES)
def test_one_that_refuses_a_seed_is_told_once_and_reading_goes_on(engine: str) -> None:
    [note] = {note.partition(":")[0] for note in told(Augmented(Refusing()), engine)}
    assert note == "dataset.augment (Refusing) refuses a seed"
    noise = Noise()
    dataset = Augmented(noise)
    dataset.other = Refusing()  # type: ignore[attr-defined]
    transforms = KeyedTransforms(dataset)
    for position in (1, 2, 1):
        transforms.rekey(0, 0, position)
    assert len(transforms.notes) == 1


class Variants(Named):
    """As albumentations has it, with a default."""

    seeds: list[int]

    def set_random_seed(self, seed: int | None = None, **more: Any) -> None:  # type: ignore[override]
        self.seeds = [*getattr(self, "seeds", []), seed or 0]


def test_a_method_with_more_that_may_be_left_out_is_called() -> None:
    variants = Variants()
    KeyedTransforms(Augmented(variants)).rekey(1, 2, 3)
    assert len(variants.seeds) == 1


# -- batches


def test_a_transform_of_the_collate_fn_is_keyed_by_the_batch() -> None:
    noise = Noise()

    def mix(samples: list[Any]) -> Any:
        return {"draws": torch.tensor([noise()] * len(samples))}

    numbers = Augmented(lambda index: (0.0, 0.0))
    inline = draws(numbers, "inline", collate_fn=mix)
    assert len({tuple(row) for row in inline}) == pipelines.N // 4
    assert all(draws(numbers, engine, collate_fn=mix) == inline for engine in ENGINES)
    for row in range(0, pipelines.N, 4):
        generator = KeyedGenerator().rekey(Domain.COLLATE, 7, 0, row, 1)
        generator.bit_generator.random_raw()  # the seed of the Python generator
        assert inline[row][0] == pytest.approx(generator.random())  # float32 in the batch


def test_a_sample_and_its_batch_draw_apart() -> None:
    noise = Noise()
    transforms = KeyedTransforms(Augmented(noise), lambda samples: noise())
    transforms.rekey(1, 2, 3)
    sample = noise()
    transforms.rekey(1, 2, 3, Domain.COLLATE)
    assert noise() != sample


# -- streams


class LateStream(IterableDataset[Any]):
    """Makes its transform when it is iterated over."""

    def __iter__(self) -> Any:
        self.noise = Noise()
        self.noise.set_random_state(np.random.default_rng(0), random.Random(0))
        return ({"draws": np.array(self.noise())} for _ in range(8))


def test_a_stream_that_makes_its_transform_late_is_told_of_its_first_batch() -> None:
    [note] = told(LateStream(), "inline")
    assert note.startswith("dataset.noise (Noise) was made while the first batch was read")


# -- the search itself


def test_classes_and_code_of_libraries_are_not_looked_through() -> None:
    dataset = Augmented(np.mean)  # type: ignore[arg-type]
    dataset.modules = (np, torch, torch.nn.Linear, A.Compose)  # type: ignore[attr-defined]
    search = Search({"dataset": dataset})
    assert search.transforms == []


def test_no_property_or_method_of_the_users_is_called() -> None:
    class Touchy:
        @property
        def pipeline(self) -> Any:
            raise AssertionError

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

        def __len__(self) -> int:
            raise AssertionError

        def __eq__(self, other: object) -> bool:
            raise AssertionError

        __hash__ = None  # type: ignore[assignment]

    touchy: Any = Touchy()
    assert Search({"dataset": Augmented(lambda index: touchy)}).transforms == []


def test_an_interrupt_on_the_way_into_the_block_leaves_no_profiler_behind() -> None:
    def interrupted() -> None:
        Calls().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.getprofile() is None


def test_what_a_keyed_pipeline_calls_is_answered_for_by_it() -> None:
    inner = Noise()

    class Outer(Noise):
        def __call__(self) -> Any:
            return inner()

    outer = Outer()

    class OfItself:
        keys_itself = True

        def __call__(self) -> Any:
            return outer()

    inner.set_random_state(np.random.default_rng(0), random.Random(0))
    with Calls() as calls:
        OfItself()()
    assert calls.transforms == []
    with Calls() as calls:
        outer()
    assert [each.transform for each in calls.transforms] == [outer]
