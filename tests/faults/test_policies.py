"""`on_error`: skipping makes a batch shorter, substituting is deterministic, and neither hides anything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside, saboteurs
from support.saboteurs import Numbers, Shaped, ShapedAtOnce, unlucky
from support.waiting import assert_no_workers, assert_nothing_is_held, batches_and_errors
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

from loaders.batch.spec import Field
from loaders.dataloader.loader import DataLoader
from loaders.errors import SampleError, UserCodeError, WorkerLostError

FIELDS = {"boxes": Field(pad=-1.0), "points": Field(ragged=True)}
ENGINES: dict[str, dict[str, Any]] = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "one process": {"num_workers": 1, "multiprocessing_context": "fork"},
    "two processes": {"num_workers": 2, "multiprocessing_context": "fork"},
    "shallow": {"num_workers": 2, "multiprocessing_context": "fork", "prefetch_factor": 1},
    "deep": {"num_workers": 2, "multiprocessing_context": "fork", "prefetch_factor": 8},
    "kept": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "rows": {"fields": FIELDS},
    "own collate_fn": {"collate_fn": saboteurs.collate_to_dict},
    "read at once": {"fields": FIELDS, "at_once": True},
    "read at once, own collate_fn": {"collate_fn": saboteurs.collate_to_dict, "at_once": True},
}
LENGTH = 23
FAULTS: dict[str, set[int]] = {
    "none": set(),
    "the very first": {0},
    "the first batch": {0, 1, 2, 3},
    "all but one": set(range(LENGTH)) - {17},
    "all": set(range(LENGTH)),
    "the end": {20, 21, 22},
    "the last": {22},
    "a batch in the middle": {8, 9, 10, 11},
    "every third": set(range(0, LENGTH, 3)),
    "here and there": {1, 2, 7, 8, 9, 15, 22},
}
SOME_GOOD = {name: at for name, at in FAULTS.items() if not name.startswith("all")}


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert_no_workers()


def plain(batch: Any) -> Any:
    """A batch in a comparable form: arrays and tensors as (dtype, shape, values)."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch).__name__, [plain(value) for value in batch]
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return str(batch.dtype), tuple(batch.shape), batch.tolist()
    return batch


def faulty(at: set[int], length: int = LENGTH, at_once: bool = False) -> Numbers:
    return (ShapedAtOnce if at_once else Shaped)(length, unlucky, at)


def skipping(at: set[int], at_once: bool = False, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(faulty(at, at_once=at_once), on_error="skip", max_errors=1000, **arguments)


def listed(loader: DataLoader[Any]) -> list[tuple[int, str, str]]:
    return [(entry.index, entry.source or "", entry.error) for entry in loader.errors]


def expected_list(indices: Sequence[int]) -> list[tuple[int, str, str]]:
    return [(i, f"numbers/{i}.png", f"support.saboteurs.Unlucky: bad luck with {i}") for i in indices]


def cut(indices: Sequence[int], size: int, *, drop_last: bool = False) -> list[list[int]]:
    """The batches of a sampler of these indices."""
    batches = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    return batches[:-1] if drop_last and batches and len(batches[-1]) < size else batches


def without(at: set[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """These batches without the samples that fail, and without those left empty."""
    return [kept for batch in batches if (kept := [i for i in batch if i not in at])]


# -- skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("at", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    ("engine", "drop_last"), [("inline", False), ("inline", True), ("thread", True), ("two processes", False)]
)
def test_a_batch_comes_without_its_failed_samples(
    engine: str, at: set[int], shape: dict[str, Any], drop_last: bool
) -> None:
    batches = cut(range(LENGTH), 4, drop_last=drop_last)
    loader = skipping(at, batch_size=4, drop_last=drop_last, **shape, **ENGINES[engine])
    found = [plain(batch) for batch in loader]
    plain_shape = {name: value for name, value in shape.items() if name != "at_once"}
    good = DataLoader(Shaped(LENGTH), batch_sampler=without(at, batches), **plain_shape)
    assert found == [plain(batch) for batch in good]
    assert listed(loader) == expected_list(sorted(at & set(itertools.chain(*batches))))
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("shape", ["rows", "own collate_fn"])
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_skipping_is_the_same_in_every_engine_and_epoch(engine: dict[str, Any], shape: str) -> None:
    at = FAULTS["here and there"]
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0)).tolist()
    good = without(at, cut(order, 3))
    want = [plain(batch) for batch in DataLoader(Shaped(LENGTH), batch_sampler=good, **SHAPES[shape])]
    loader = skipping(at, batch_size=3, sampler=order, **SHAPES[shape], **engine)
    for epoch in (1, 2):
        assert [plain(batch) for batch in loader] == want
        assert listed(loader) == epoch * expected_list([i for i in order if i in at])
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("shape", ["rows", "own collate_fn"])
@pytest.mark.parametrize("engine", ["inline", "two processes"])
def test_batches_of_a_custom_batch_sampler_stay_apart(engine: str, shape: str) -> None:
    batches = [[5, 3], [2], [0, 1, 4, 6, 7, 8], [9, 10], [11, 12], [13, 14, 15], [16], [17]]
    loader = skipping({3, 0, 1, 4, 16}, batch_sampler=batches, **SHAPES[shape], **ENGINES[engine])
    found = [batch["i"].tolist() for batch in loader]
    assert found == [[5], [2], [6, 7, 8], [9, 10], [11, 12], [13, 14, 15], [17]]
    assert_nothing_is_held(loader)


class OfAnotherShape(Shaped):
    """Some samples have a shape, a dtype or fields that match no other sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if index in self.at:
            odd = index % 3
            if odd == 0:
                sample["x"] = np.zeros((7, 7, 7), np.float32)
            elif odd == 1:
                sample["x"] = np.array([object()])
            else:
                del sample["x"]
        return sample


@pytest.mark.parametrize("engine", ["inline", "thread", "two processes"])
@pytest.mark.parametrize("at", [{0}, {3}, {4, 5, 6}, {8}, {11}, {1, 2, 20, 21}], ids=str)
def test_a_sample_that_does_not_fit_its_batch_is_skipped_and_listed(engine: str, at: set[int]) -> None:
    dataset = OfAnotherShape(LENGTH, None, at - {0})  # the very first sample defines what a batch looks like
    order = [0, *reversed(range(1, LENGTH))] if 0 in at else range(LENGTH)
    loader = DataLoader(dataset, 4, sampler=order, on_error="skip", max_errors=100, fields=FIELDS, **ENGINES[engine])
    assert [batch["i"].tolist() for batch in loader] == without(at - {0}, cut(order, 4))
    assert sorted(entry.index for entry in loader.errors) == sorted(at - {0})
    assert all(entry.error.startswith("Field") for entry in loader.errors)
    assert_nothing_is_held(loader)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), max_size=8), shape=st.sampled_from(["rows", "own collate_fn"]), data=st.data())
def test_batches_of_a_custom_batch_sampler_agree_with_the_model(sizes: list[int], shape: str, data: Any) -> None:
    length = sum(sizes)
    at = data.draw(st.sets(st.integers(0, max(0, length - 1))))
    every = iter(range(length))
    batches = [list(itertools.islice(every, size)) for size in sizes]
    loader = DataLoader(faulty(at, length), batch_sampler=batches, on_error="skip", max_errors=1000, **SHAPES[shape])
    assert [batch["i"].tolist() for batch in loader] == without(at, batches)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.data())
def test_batches_of_a_custom_batch_sampler_are_the_same_after_resuming(sizes: list[int], data: Any) -> None:
    length = sum(sizes)
    at = data.draw(st.sets(st.integers(0, length - 1), max_size=length - 1))
    ends = np.cumsum(sizes).tolist()
    batches = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]

    def fresh() -> DataLoader[Any]:
        return DataLoader(
            faulty(at, length), batch_sampler=batches, on_error="skip", max_errors=1000, seed=0, fields=FIELDS
        )

    loader, whole, states = fresh(), [], []
    for batch in loader:
        whole.append(plain(batch))
        states.append(loader.state_dict())
    for done, state in enumerate(states, start=1):
        resumed = fresh()
        resumed.load_state_dict(state)
        # Where nothing is left of the epoch, the next one begins.
        assert [plain(batch) for batch in resumed] == (whole[done:] or whole)


@pytest.mark.parametrize("drop_last", [False, True])
def test_torchs_batch_sampler_gives_the_same_batches_as_batch_size(drop_last: bool) -> None:
    at = {1, 9}
    sampler = BatchSampler(SequentialSampler(range(LENGTH)), 4, drop_last)
    given_it = [plain(batch) for batch in skipping(at, batch_sampler=sampler, fields=FIELDS)]
    assert given_it == [plain(batch) for batch in skipping(at, batch_size=4, drop_last=drop_last, fields=FIELDS)]
    assert len(given_it) == (5 if drop_last else 6)


@pytest.mark.parametrize("engine", ["inline", "thread", "two processes"])
def test_single_samples_are_skipped_without_batching(engine: str) -> None:
    loader = skipping({0, 4, 5, 22}, batch_size=None, **ENGINES[engine])
    want = [plain(sample) for sample in DataLoader(Shaped(LENGTH), batch_size=None, sampler=[1, 2, 3, *range(6, 22)])]
    assert [plain(sample) for sample in loader] == want


@pytest.mark.parametrize("shape", ["rows", "own collate_fn"])
def test_return_index_lists_what_is_in_the_shorter_batch(shape: str) -> None:
    loader = skipping({1, 5}, batch_size=4, return_index=True, num_workers=2, **SHAPES[shape])
    for batch, index in loader:
        assert batch["i"].tolist() == index.tolist()
    assert index.tolist() == [20, 21, 22]


def test_skipping_out_of_order_loses_no_sample() -> None:
    at = FAULTS["every third"]
    loader = skipping(at, batch_size=4, fields=FIELDS, num_workers=2, in_order=False)
    batches = [batch["i"].tolist() for batch in loader]
    assert sorted(batches) == without(at, cut(range(LENGTH), 4))


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(0, 40),
    size=st.integers(1, 7),
    drop_last=st.booleans(),
    shape=st.sampled_from(["rows", "own collate_fn"]),
    data=st.data(),
)
def test_skipping_agrees_with_the_model_whatever_fails(
    length: int, size: int, drop_last: bool, shape: str, data: Any
) -> None:
    at = data.draw(st.sets(st.integers(0, max(0, length - 1))))
    depth = data.draw(st.sampled_from([None, 1, 3]))
    engine = {"num_workers": 1, "worker_method": "thread", "prefetch_factor": depth} if depth else {}
    loader = DataLoader(
        faulty(at, length), size, drop_last=drop_last, on_error="skip", max_errors=1000, **SHAPES[shape], **engine
    )
    batches = cut(range(length), size, drop_last=drop_last)
    assert [batch["i"].tolist() for batch in loader] == without(at, batches)
    assert [entry.index for entry in loader.errors] == sorted(at & set(itertools.chain(*batches)))
    assert_nothing_is_held(loader)


def test_batches_without_a_failure_are_still_delivered_from_their_slot() -> None:
    loader = skipping({1}, batch_size=4, fields=FIELDS, num_workers=2)
    iterator = iter(loader)
    pool = inside.pool_of(loader)
    batches = list(iterator)
    start = np.frombuffer(pool.arena.buffer, np.uint8).ctypes.data
    in_slots = [start <= batch["x"].data_ptr() < start + pool.arena.capacity for batch in batches]
    assert in_slots == [False, *[True] * (len(batches) - 1)]


def test_the_content_of_a_failed_samples_row_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADERS_DEBUG", "slots")  # fills free memory with garbage
    at = FAULTS["here and there"]
    loader = skipping(at, batch_size=4, fields=FIELDS)
    good = without(at, cut(range(LENGTH), 4))
    want = [plain(batch) for batch in DataLoader(Shaped(LENGTH), batch_sampler=good, fields=FIELDS)]
    for _ in range(2):
        assert [plain(batch) for batch in loader] == want


def test_last_short_batch_is_not_read_twice() -> None:
    dataset = CountsReads(10)
    loader = DataLoader(dataset, batch_size=4, on_error="skip", collate_fn=saboteurs.collate_to_dict)
    assert [len(batch["i"]) for batch in loader] == [4, 4, 2]
    assert dataset.reads == list(range(10))


class CountsReads(Numbers):
    reads: list[int]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not hasattr(self, "reads"):
            self.reads = []
        self.reads.append(index)
        return super().__getitem__(index)


# -- failures that are more than an exception in a sample


@pytest.mark.parametrize("shape", ["rows", "own collate_fn"])
def test_sample_that_kills_its_workers_is_skipped_like_any_other(shape: str) -> None:
    loader = DataLoader(
        Shaped(16, saboteurs.sigkill, at={0, 6, 15}), batch_size=4, num_workers=2, on_error="skip", **SHAPES[shape]
    )
    good = without({0, 6, 15}, cut(range(16), 4))
    want = [plain(batch) for batch in DataLoader(Shaped(16), batch_sampler=good, **SHAPES[shape])]
    assert [plain(batch) for batch in loader] == want
    assert [entry.index for entry in loader.errors] == [0, 6, 15]
    for entry in loader.errors:
        assert re.match(r"WorkerLostError: worker \d was lost \d+ times on sample", entry.error)
    assert_nothing_is_held(loader)


def test_batch_read_at_once_that_kills_its_workers_raises_even_so() -> None:
    dataset = ShapedAtOnce(12, saboteurs.sigkill, at={5})
    first, error, last = batches_and_errors(
        DataLoader(dataset, batch_size=4, num_workers=2, on_error="skip", fields=FIELDS)
    )
    assert (first["i"].tolist(), last["i"].tolist()) == ([0, 1, 2, 3], [8, 9, 10, 11])
    assert isinstance(error, WorkerLostError)
    assert "lost 3 times on samples 4, 5, 6, 7" in str(error)


@pytest.mark.parametrize("policy", ["skip", "substitute"])
def test_sample_that_cannot_be_sent_counts_as_failed(policy: Any) -> None:
    dataset = saboteurs.Carries(12, saboteurs.a_lambda, at={0, 7})
    loader = DataLoader(dataset, batch_size=4, num_workers=2, on_error=policy)
    found = [i for batch in loader for i in batch["i"].tolist()]
    assert len(found) == (10 if policy == "skip" else 12)
    assert not {0, 7} & set(found)
    assert {entry.index for entry in loader.errors} == {0, 7}


@pytest.mark.parametrize("policy", ["skip", "substitute"])
@pytest.mark.parametrize("engine", ["inline", "thread", "two processes"])
def test_errors_of_a_collate_fn_are_raised_under_every_policy(engine: str, policy: Any) -> None:
    loader = DataLoader(faulty({1}, 12), batch_size=4, collate_fn=RaisesFor(8), on_error=policy, **ENGINES[engine])
    found = batches_and_errors(loader)
    errors = [each for each in found if isinstance(each, Exception)]
    # A substitute may happen to be sample 8.
    assert {type(error) for error in errors} == {KeyError}
    assert len(errors) == 1 or policy == "substitute"
    assert len(found) == 3
    assert len(loader.errors) >= 1


class RaisesFor:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, samples: list[Any]) -> Any:
        if any(sample["i"] == self.index for sample in samples):
            raise KeyError("no such sample")
        return [sample["i"] for sample in samples]


def test_error_of_a_worker_init_fn_is_raised_under_every_policy() -> None:
    for policy in ("skip", "substitute"):
        loader = DataLoader(Numbers(8), 4, num_workers=1, worker_init_fn=saboteurs.init_raises, on_error=policy)  # type: ignore[arg-type]
        with pytest.raises(saboteurs.Unlucky, match="in worker_init_fn"):
            next(iter(loader))
        assert loader.errors == []


def test_error_of_the_sampler_comes_after_what_is_left_of_the_batches_before_it() -> None:
    def indices() -> Iterator[int]:
        yield from range(10)
        raise RuntimeError("the sampler is out of order")

    loader = skipping({1, 5}, batch_size=3, sampler=Once(indices()), fields=FIELDS)
    found = batches_and_errors(loader)
    assert [batch["i"].tolist() for batch in found[:3]] == [[0, 2], [3, 4], [6, 7, 8]]
    [error] = [each for each in found if isinstance(each, Exception)]
    assert str(error) == "the sampler is out of order"


class Once:
    def __init__(self, indices: Iterator[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return self.indices


@pytest.mark.parametrize("policy", ["skip", "substitute"])
def test_streams_are_refused(policy: Any) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(ValueError, match=f"on_error='{policy}' needs a map-style dataset"):
        DataLoader(Stream(), on_error=policy)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match='on_error should be "raise", "skip" or "substitute", but got \'ignore\''):
        DataLoader(Numbers(3), on_error="ignore")  # type: ignore[arg-type]


# -- max_errors


TOO_MANY = (
    r'bad luck with {0}\n  while reading sample {0} \("numbers/{0}.png"\)'
    r".*\n  more than max_errors=2 samples failed in a row; loader.errors lists them"
)


@pytest.mark.parametrize("engine", ["inline", "thread", "two processes"])
def test_more_failures_in_a_row_than_max_errors_raise_and_no_good_sample_is_lost(engine: str) -> None:
    loader = DataLoader(
        faulty({2, 3, 4, 9, 10}, 16), batch_size=4, on_error="skip", max_errors=2, fields=FIELDS, **ENGINES[engine]
    )
    first, error, *batches = batches_and_errors(loader)
    assert re.match(TOO_MANY.format(4), str(error))
    assert [batch["i"].tolist() for batch in (first, *batches)] == [[0, 1], [5, 6, 7], [8, 11], [12, 13, 14, 15]]
    assert [entry.index for entry in loader.errors] == [2, 3, 4, 9, 10]
    del first, batches
    assert_nothing_is_held(loader)


@pytest.mark.parametrize("engine", ["inline", "thread", "two processes"])
def test_more_failures_in_a_row_than_max_errors_cost_the_batch_that_waits_for_substitutes(engine: str) -> None:
    loader = DataLoader(
        faulty({4, 5, 6}, 16), batch_size=4, on_error="substitute", max_errors=2, fields=FIELDS, **ENGINES[engine]
    )
    first, error, *rest = batches_and_errors(loader)
    assert re.match(TOO_MANY.format(6), str(error))
    assert [batch["i"].tolist() for batch in (first, *rest)] == [[0, 1, 2, 3], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert listed(loader) == expected_list([4, 5, 6])
    del first, rest
    assert_nothing_is_held(loader)


def test_failures_are_in_a_row_only_if_no_good_sample_is_between() -> None:
    at = {0, 1, 3, 4, 6, 7, 9, 10}
    for policy in ("skip", "substitute"):
        loader = DataLoader(faulty(at, 60), 4, on_error=policy, max_errors=4, fields=FIELDS)  # type: ignore[arg-type]
        assert not any(isinstance(each, Exception) for each in batches_and_errors(loader)), policy


def test_failures_in_many_batches_are_not_in_a_row_where_substitutes_succeed() -> None:
    at = set(range(0, 200, 10))
    loader = DataLoader(faulty(at, 200), batch_size=10, on_error="substitute", max_errors=3, fields=FIELDS)
    assert sum(len(batch["i"]) for batch in loader) == 200
    assert len(loader.errors) >= 20


def test_max_errors_of_zero_raises_the_first_error_and_lists_it() -> None:
    loader = DataLoader(faulty({2}, 4), batch_size=2, on_error="skip", max_errors=0, fields=FIELDS)
    assert [type(each) for each in batches_and_errors(loader)] == [dict, saboteurs.Unlucky, dict]
    assert listed(loader) == expected_list([2])


def test_without_a_policy_errors_are_raised_and_not_listed() -> None:
    loader = DataLoader(faulty({2}, 4), batch_size=2, fields=FIELDS)
    assert len(batches_and_errors(loader)) == 2
    assert loader.errors == []


def test_exceptions_that_are_not_plain_text_mention_max_errors_too() -> None:
    loader = DataLoader(Numbers(2, missing_file, at={0}), on_error="skip", max_errors=0)
    error, batch = batches_and_errors(loader)
    assert (type(error), error.errno, error.filename) == (FileNotFoundError, 2, "numbers/0.png")
    assert any("more than max_errors=0" in note for note in getattr(error, "__notes__", ["more than max_errors=0"]))
    assert batch["i"].tolist() == [1]


def missing_file(index: int) -> None:
    raise FileNotFoundError(2, "No such file or directory", f"numbers/{index}.png")


# -- substitute


def substituted(engine: dict[str, Any], at: set[int], **arguments: Any) -> tuple[list[Any], list[Any]]:
    at_once = arguments.pop("at_once", False)
    arguments = {"batch_size": 4, "shuffle": True, **arguments}
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(
        faulty(at, at_once=at_once), on_error="substitute", max_errors=1000, generator=generator, **arguments, **engine
    )
    batches = [plain(batch) for _ in range(2) for batch in loader]
    assert_nothing_is_held(loader)
    return batches, listed(loader)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("at", SOME_GOOD.values(), ids=SOME_GOOD)
def test_substitutes_are_the_same_in_every_engine_and_every_time(at: set[int], shape: dict[str, Any]) -> None:
    first = substituted({}, at, **shape)
    for engine in ("inline", "thread", "two processes"):
        assert substituted(ENGINES[engine], at, **shape) == first, engine


@pytest.mark.parametrize("engine", ["one process", "shallow", "deep"])
def test_substitutes_do_not_depend_on_workers_or_depth(engine: str) -> None:
    at = FAULTS["here and there"]
    assert substituted(ENGINES[engine], at, fields=FIELDS) == substituted({}, at, fields=FIELDS)


def test_substitutes_do_not_depend_on_whether_a_batch_was_seen_before() -> None:
    """The shapes of a batch are unknown in the first epoch of a loader, and here nearly every sample fails."""

    def loader() -> DataLoader[Any]:
        return DataLoader(
            faulty(set(range(20))), batch_size=4, on_error="substitute", max_errors=1000, fields=FIELDS, seed=3
        )

    first, again = loader(), loader()
    assert len(list(first)) == 6
    again.load_state_dict(first.state_dict())
    first.load_state_dict(first.state_dict())
    assert [plain(batch) for batch in again] == [plain(batch) for batch in first]
    assert listed(again) == listed(first)


def test_substitutes_do_not_depend_on_the_batch_size() -> None:
    at = FAULTS["every third"]
    flat = [
        [i for batch in substituted({}, at, fields=FIELDS, batch_size=size)[0] for i in batch["i"][2]]
        for size in (1, 4, 23)
    ]
    assert flat[0] == flat[1] == flat[2]


@pytest.mark.parametrize("at", SOME_GOOD.values(), ids=SOME_GOOD)
def test_substitutes_take_the_places_of_the_failed_samples(at: set[int]) -> None:
    loader = DataLoader(faulty(at), batch_size=4, on_error="substitute", max_errors=1000, fields=FIELDS, num_workers=2)
    found = [i for batch in loader for i in batch["i"].tolist()]
    assert len(found) == LENGTH
    for position, i in enumerate(found):
        assert i not in at
        assert i == position or position in at
    assert {entry.index for entry in loader.errors} == at
    if len(at) == 4:
        assert len({found[position] for position in at}) > 1  # not the same one for all


def test_without_a_length_substitutes_come_from_the_batch() -> None:
    dataset = Endless({1})
    loader = DataLoader(dataset, sampler=[0, 1, 2, 3], batch_size=4, on_error="substitute")
    [batch] = loader
    assert batch[1] in (0, 2, 3)
    assert batch[[0, 2, 3]].tolist() == [0, 2, 3]


class Endless:
    def __init__(self, at: set[int]) -> None:
        self.at = at

    def __getitem__(self, index: int) -> int:
        if index in self.at:
            unlucky(index)
        return index


def test_where_keys_are_not_ints_substitutes_come_from_the_batch() -> None:
    samples = {key: key.upper() for key in "abcdefgh" if key != "c"}
    loader = DataLoader(samples, sampler=list("abcdefgh"), batch_size=4, on_error="substitute", num_workers=2)  # type: ignore[arg-type]
    first, second = loader
    assert first[:2] + first[3:] == ["A", "B", "D"]
    assert first[2] in ("A", "B", "D")
    assert second == ["E", "F", "G", "H"]
    assert {entry.index for entry in loader.errors} == {"c"}


def test_dataset_in_which_every_sample_fails_raises_its_own_error() -> None:
    for engine in ("inline", "thread", "two processes"):
        loader = DataLoader(faulty(set(range(8)), 8), 4, on_error="substitute", max_errors=20, **ENGINES[engine])
        found = batches_and_errors(loader)
        assert [type(each) for each in found] == [saboteurs.Unlucky] * 2
        assert len(loader.errors) >= 21
        assert_nothing_is_held(loader)


def test_errors_that_cannot_be_rebuilt_are_listed_by_the_name_of_their_type() -> None:
    loader = DataLoader(Numbers(4, saboteurs.takes_two, at={1}), batch_size=4, num_workers=1, on_error="skip")
    assert [len(batch["i"]) for batch in loader] == [3]
    assert [entry.error for entry in loader.errors] == ["support.saboteurs.TakesTwo: bad luck (7)"]
    loader.max_errors = 0
    [error, batch] = batches_and_errors(loader)
    assert isinstance(error, UserCodeError)
    assert isinstance(error, SampleError)
    assert batch["i"].tolist() == [0, 2, 3]
