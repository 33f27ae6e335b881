"""A loader as an object: its arguments, attributes, copies and subclasses are those of torch's loader."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

import loaders

DATASET = np.arange(10)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(4))


def _sampler() -> Any:
    return SequentialSampler(DATASET)


def _batches() -> Any:
    return BatchSampler(_sampler(), 2, False)


# Every combination that torch's constructor looks at, right or wrong.
COMBINATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "negative num_workers": (DATASET, {"num_workers": -1}),
    "negative timeout": (DATASET, {"timeout": -1}),
    "prefetch_factor without workers": (DATASET, {"prefetch_factor": 2}),
    "negative prefetch_factor": (DATASET, {"num_workers": 1, "prefetch_factor": -1}),
    "persistent_workers without workers": (DATASET, {"persistent_workers": True}),
    "context without workers": (DATASET, {"multiprocessing_context": "fork"}),
    "unknown context": (DATASET, {"num_workers": 1, "multiprocessing_context": "threads"}),
    "context of a wrong type": (DATASET, {"num_workers": 1, "multiprocessing_context": 3}),
    "sampler and shuffle": (DATASET, {"sampler": [1], "shuffle": True}),
    "batch_sampler and batch_size": (DATASET, {"batch_sampler": [[1]], "batch_size": 2}),
    "batch_sampler and no batch_size": (DATASET, {"batch_sampler": [[1]], "batch_size": None}),
    "batch_sampler and shuffle": (DATASET, {"batch_sampler": [[1]], "shuffle": True}),
    "batch_sampler and sampler": (DATASET, {"batch_sampler": [[1]], "sampler": [1]}),
    "batch_sampler and drop_last": (DATASET, {"batch_sampler": [[1]], "drop_last": True}),
    "drop_last without batches": (DATASET, {"batch_size": None, "drop_last": True}),
    "batch_size 0": (DATASET, {"batch_size": 0}),
    "negative batch_size": (DATASET, {"batch_size": -2}),
    "batch_size of a wrong type": (DATASET, {"batch_size": 2.5}),
    "batch_size is True": (DATASET, {"batch_size": True}),
    "drop_last of a wrong type": (DATASET, {"drop_last": "yes"}),
    "stream and shuffle": (Stream(), {"shuffle": True}),
    "stream and sampler": (Stream(), {"sampler": [1]}),
    "stream and batch_sampler": (Stream(), {"batch_sampler": [[1]]}),
    "stream and drop_last without batches": (Stream(), {"batch_size": None, "drop_last": True}),
    "shuffle of a dataset without length": (Stream.__new__(object), {"shuffle": True}),
    "shuffle of nothing": ([], {"shuffle": True}),
    "unknown argument": (DATASET, {"workers": 2}),
    "too many workers for this machine": (DATASET, {"num_workers": 4096}),
    "timeout without workers": (DATASET, {"timeout": 3}),
    "nothing wrong": (DATASET, {"num_workers": 1, "prefetch_factor": 0, "timeout": 1, "in_order": False}),
}


def _outcome(kind: Any, dataset: Any, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kind(dataset, **arguments)
            raised = None
        except Exception as error:  # what it is, is compared
            raised = type(error), str(error).replace("loaders.dataloader.loader.", "")
    return raised, [(each.category, str(each.message)) for each in caught]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_constructor_accepts_and_refuses_what_that_of_torch_does(name: str) -> None:
    dataset, arguments = COMBINATIONS[name]
    assert _outcome(loaders.DataLoader, dataset, arguments) == _outcome(torch.utils.data.DataLoader, dataset, arguments)


def test_arguments_of_torch_keep_their_order_names_and_defaults() -> None:
    theirs = inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    ours = inspect.signature(loaders.DataLoader.__init__).parameters
    shared = list(theirs)
    assert list(ours)[: len(shared)] == shared
    for name in shared:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)
    for name in list(ours)[len(shared) :]:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert ours[name].default is not inspect.Parameter.empty


def test_arguments_of_our_own_are_validated_too() -> None:
    with pytest.raises(ValueError, match="worker_method"):
        loaders.DataLoader(DATASET, worker_method="fibre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error"):
        loaders.DataLoader(DATASET, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="map-style"):
        loaders.DataLoader(Stream(), on_error="skip")
    with pytest.raises(ValueError, match="return_index"):
        loaders.DataLoader(Stream(), return_index=True)


def test_every_argument_is_kept_as_an_attribute() -> None:
    arguments: dict[str, Any] = {
        "batch_size": 3,
        "shuffle": False,
        "sampler": _sampler(),
        "num_workers": 2,
        "collate_fn": list,
        "pin_memory": False,
        "drop_last": True,
        "timeout": 5,
        "worker_init_fn": print,
        "multiprocessing_context": torch.multiprocessing.get_context("fork"),
        "generator": torch.Generator(),
        "prefetch_factor": 3,
        "persistent_workers": True,
        "pin_memory_device": "",
        "in_order": False,
        "worker_method": "thread",
        "fields": {"a": loaders.Field(ragged=True)},
        "on_error": "skip",
        "max_errors": 3,
        "max_buffer_bytes": 1 << 20,
        "return_index": True,
    }
    loader = loaders.DataLoader(DATASET, **arguments)
    for name, value in arguments.items():
        assert getattr(loader, name) is value, name
    assert isinstance(loader.batch_sampler, BatchSampler)
    batches = _batches()
    assert loaders.DataLoader(DATASET, batch_sampler=batches).batch_sampler is batches
    accepted = set(inspect.signature(loaders.DataLoader.__init__).parameters) - {"self", "dataset", "batch_sampler"}
    assert accepted <= set(arguments) | {"seed"}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"batch_size": None}, {"shuffle": True, "batch_size": 4}, {"batch_sampler": [[1]]}, {"num_workers": 2}],
)
def test_public_attributes_have_the_values_that_torch_gives_them(arguments: dict[str, Any]) -> None:
    theirs = torch.utils.data.DataLoader(DATASET, **arguments)
    ours = loaders.DataLoader(DATASET, **arguments)
    assert isinstance(ours, torch.utils.data.DataLoader)
    for name, value in vars(theirs).items():
        if not name.startswith("_"):
            mine = getattr(ours, name)
            assert isinstance(mine, type(value)), name
            assert mine is value or name in ("sampler", "batch_sampler") or mine == value, name
    assert ours.multiprocessing_context is theirs.multiprocessing_context


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loader_is_made_anew_from_its_attributes_with_another_sampler(engine: str) -> None:
    # What training frameworks do to put a distributed sampler into a user's loader.
    loader = loaders.DataLoader(DATASET, 4, shuffle=True, drop_last=True, return_index=True, **ENGINES[engine])
    parameters = inspect.signature(type(loader).__init__).parameters
    kept = {name: getattr(loader, name) for name in parameters if name not in ("self", "shuffle", "batch_sampler")}
    again = type(loader)(**{**kept, "sampler": list(range(9, -1, -1))})
    assert [indices.tolist() for _, indices in again] == [[9, 8, 7, 6], [5, 4, 3, 2]]


@pytest.mark.parametrize(
    "name", ["batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers"]
)
def test_what_torch_fixes_at_construction_stays_fixed(name: str) -> None:
    errors = []
    for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
        with pytest.raises(ValueError, match="should not be set after") as caught:
            setattr(kind(DATASET, 2), name, None)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def _reset(loader: Any, **attributes: Any) -> list[list[Any]]:
    before = [list(batch) for batch in loader]
    for name, value in attributes.items():
        setattr(loader, name, value)
    return [before, [list(batch) for batch in loader]]


def test_what_may_be_set_later_counts_from_the_next_epoch_on() -> None:
    changes: list[dict[str, Any]] = [
        {"collate_fn": lambda samples: [-sample for sample in samples]},
        {"num_workers": 2, "prefetch_factor": 2, "multiprocessing_context": "fork"},
        {"timeout": 0, "generator": torch.Generator(), "pin_memory": False},
    ]
    for change in changes:
        theirs = _reset(torch.utils.data.DataLoader(DATASET, 4), **change)
        assert_same(_reset(loaders.DataLoader(DATASET, 4), **change), theirs)
    threaded = loaders.DataLoader(DATASET, 4, num_workers=1, worker_method="thread")
    assert_same(_reset(threaded, worker_method="process"), _reset(torch.utils.data.DataLoader(DATASET, 4)))
    fewer = loaders.DataLoader(DATASET, 4, num_workers=2, multiprocessing_context="fork")
    assert_same(_reset(fewer, num_workers=0), _reset(torch.utils.data.DataLoader(DATASET, 4)))


def test_the_class_can_be_subscripted_and_subclassed_as_that_of_torch() -> None:
    assert loaders.DataLoader[int](DATASET).batch_size == 1

    class Mine(loaders.DataLoader[Any]):
        def __init__(self, dataset: Any, **rest: Any) -> None:
            self.mine = 1
            super().__init__(dataset, **rest)

        def __iter__(self) -> Any:
            return ((self.mine, batch) for batch in super().__iter__())

    assert [(mine, batch.tolist()) for mine, batch in Mine(DATASET, batch_size=8)] == [
        (1, list(range(8))),
        (1, [8, 9]),
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_copy_of_a_loader_works_before_during_and_after_an_epoch(
    duplicate: Callable[[Any], Any], engine: str
) -> None:
    settings = {**ENGINES[engine]}
    settings.pop("multiprocessing_context", None)  # pickle has no use for a context, in torch's loader either
    persistent = {"persistent_workers": True} if settings["num_workers"] else {}
    loader = loaders.DataLoader(DATASET, 4, **settings, **persistent)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.tolist() for batch in duplicate(loader)] == expected
    iterator = iter(loader)
    first = next(iterator)
    twin = duplicate(loader)
    assert [batch.tolist() for batch in twin] == expected
    assert [first.tolist(), *(batch.tolist() for batch in iterator)] == expected
    del loader, iterator
    assert [batch.tolist() for batch in twin] == expected


def test_loaders_disable_falls_back_to_the_iterator_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loaders.DataLoader(DATASET, 4)
    assert not type(iter(loader)).__module__.startswith("torch")
    monkeypatch.setenv("LOADERS_DISABLE", "1")
    assert type(iter(loader)).__module__.startswith("torch.utils.data")
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    monkeypatch.setenv("LOADERS_DISABLE", "0")
    assert not type(iter(loader)).__module__.startswith("torch")


def test_datapipes_are_served_by_the_iterator_of_torch() -> None:
    from torch.utils.data.datapipes.iter import IterableWrapper
    from torch.utils.data.datapipes.map import SequenceWrapper

    for pipe in (IterableWrapper(range(6)).shuffle(), SequenceWrapper(range(6))):
        batches = []
        for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
            torch.manual_seed(0)
            loader = kind(pipe, 2, shuffle=True)
            iterator = iter(loader)
            assert type(iterator).__module__.startswith("torch.utils.data")
            batches.append([batch.tolist() for batch in iterator])
        assert batches[0] == batches[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exhausted_iterator_stays_exhausted_and_iterates_itself(engine: str) -> None:
    iterator = iter(loaders.DataLoader(DATASET, 4, **ENGINES[engine]))
    assert iter(iterator) is iterator
    assert len(iterator) == 3
    assert len(list(iterator)) == 3
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_an_iterator_cannot_be_pickled_just_as_that_of_torch() -> None:
    for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
        with pytest.raises(NotImplementedError):
            pickle.dumps(iter(kind(DATASET, 4)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"pin_memory": True},
        {"pin_memory": True, "pin_memory_device": "cuda"},
        {"num_workers": 4096, "batch_size": 2},
    ],
    ids=["pin_memory", "pin_memory_device", "too many workers"],
)
def test_what_torch_warns_about_is_warned_about_as_often(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments.get("pin_memory") and torch.accelerator.is_available():
        pytest.skip("there is an accelerator: nothing to warn about")
    if "num_workers" in arguments:
        monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)
        arguments = {**arguments, "num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}
    told = []
    for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = kind(DATASET, **arguments)
            for _ in range(2):
                assert len(list(loader)) == len(loader)
        told.append([each.category for each in caught if "fork()" not in str(each.message)])
    assert told[1] == told[0]
    assert told[0]


@pytest.mark.parametrize("fields", [{"boxes": "pad"}, {0: loaders.Field(ragged=True)}])
def test_fields_that_declare_nothing_are_refused_with_an_example(fields: Any) -> None:
    with pytest.raises(TypeError, match=r"a dict like .*Field\(ragged=True\)"):
        loaders.DataLoader(DATASET, fields=fields)


@pytest.mark.parametrize(("seed", "error"), [("a", TypeError), (-1, ValueError), (1 << 63, ValueError)])
def test_a_seed_that_is_none_is_refused_at_once(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        loaders.DataLoader(DATASET, seed=seed)
