"""An exception in any hook: the type torch raises, the sample named, and the same batches behind it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import ENGINES, assert_same, assert_same_seen, events_of, told, watch
from torch.utils.data import BatchSampler, ConcatDataset, IterableDataset, SequentialSampler, Subset

import loaders

WITH_WORKERS = [name for name in ENGINES if name != "inline"]
FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


class LosesAnArgumentError(Exception):
    """Its constructor takes two arguments, of which pickle knows one."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class KeepsBothError(Exception):
    """Its constructor takes two arguments, and pickle knows both."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


class HoldsALockError(ValueError):
    """Cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class LockAndArgumentsError(HoldsALockError):
    """Cannot be pickled, nor made from its message."""

    def __init__(self, message: str, more: int) -> None:
        super().__init__(message)


class OwnWordsError(Exception):
    def __str__(self) -> str:
        return "its own words"


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("bad"),
    "without a message": RuntimeError,
    "KeyError": lambda: KeyError("bad"),
    "IndexError": lambda: IndexError(3),
    "OSError": lambda: FileNotFoundError(2, "No such file", "a.jpg"),
    "of two arguments": lambda: KeepsBothError(3, "bad"),
    "of two arguments, one of which pickle knows": lambda: LosesAnArgumentError(3, "bad"),
    "unpicklable": lambda: HoldsALockError("bad"),
    "unpicklable, of two arguments": lambda: LockAndArgumentsError("bad", 2),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "with words of its own": OwnWordsError,
    "AssertionError": lambda: AssertionError("bad"),
    "a loaders error": lambda: loaders.DecodeError("bad file", index=5),
}


class Failing:
    """Ten samples, some of which raise."""

    def __init__(self, error: Callable[[], BaseException], at: tuple[int, ...] = (5,)) -> None:
        self.error = error
        self.at = at

    def __len__(self) -> int:
        return 10

    def describe(self, index: int) -> str:
        return f"photo-{index}.jpg"

    def __getitem__(self, index: int) -> Any:
        if index in self.at:
            raise self.error()
        return np.full(3, index), index


class FailingAtOnce(Failing):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def both(dataset: Any, engine: str, arguments: dict[str, Any], *, like: dict[str, Any] | None = None) -> Any:
    """What was seen of ours, after it was found to be what is seen of torch's (without workers, or `like` that)."""
    theirs = watch(lambda: torch.utils.data.DataLoader(dataset, **arguments, **(like or {})))
    ours = watch(lambda: loaders.DataLoader(dataset, **arguments, **ENGINES[engine]))
    assert any(isinstance(event, Exception) for event in theirs.epochs[0])
    assert_same_seen(ours, theirs)
    return ours


@pytest.mark.parametrize("engine", ["inline", "thread"])
@pytest.mark.parametrize("name", ERRORS)
def test_a_failing_sample_raises_its_own_exception_and_the_other_batches_come(name: str, engine: str) -> None:
    error = ERRORS[name]
    seen = both(Failing(error), engine, {"batch_size": 2})
    [raised] = [event for event in seen.epochs[0] if isinstance(event, Exception)]
    assert type(raised) is type(error())
    if name != "a loaders error":  # which names its sample itself
        assert 'sample 5 ("photo-5.jpg")' in told(raised)


@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_of_a_worker_process_is_at_least_what_torch_makes_of_it(name: str) -> None:
    error = ERRORS[name]
    theirs = watch(lambda: torch.utils.data.DataLoader(Failing(error), 2, **FORK))
    ours = watch(lambda: loaders.DataLoader(Failing(error), 2, **FORK))
    mine, other = ours.epochs[0].pop(2), theirs.epochs[0].pop(2)
    assert_same_seen(ours, theirs)
    # Where torch has to fall back on a RuntimeError, an exception that pickle can bring over keeps its type.
    assert isinstance(mine, (type(other), type(error())))
    assert "sample 5" in told(mine) or name == "a loaders error"
    assert "worker" in str(mine.__cause__)
    assert "Traceback" in str(mine.__cause__)
    assert "Failing" not in str(mine)


def test_an_exception_keeps_what_its_message_was_made_of() -> None:
    for engine in ENGINES.values():
        with pytest.raises(KeepsBothError) as caught:
            list(loaders.DataLoader(Failing(ERRORS["of two arguments"]), 2, **engine))
        assert caught.value.args == (3, "bad")
        with pytest.raises(IndexError) as caught_index:
            list(loaders.DataLoader(Failing(ERRORS["IndexError"]), 2, **engine))
        assert caught_index.value.args == (3,)
        with pytest.raises(FileNotFoundError) as caught_file:
            list(loaders.DataLoader(Failing(ERRORS["OSError"]), 2, **engine))
        assert caught_file.value.filename == "a.jpg"


def test_an_exception_that_cannot_be_brought_over_is_told_in_full() -> None:
    with pytest.raises(
        loaders.errors.UserCodeError, match=r"LockAndArgumentsError: bad\n.*sample 5 .*worker \d"
    ) as caught:
        list(loaders.DataLoader(Failing(ERRORS["unpicklable, of two arguments"]), 2, **FORK))
    assert caught.value.index == 5
    assert isinstance(caught.value, RuntimeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.index) == (type(caught.value), str(caught.value), 5)


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_iteration_in_a_dataset_is_an_error_and_does_not_end_the_epoch_in_silence(engine: str) -> None:
    loader = loaders.DataLoader(Failing(StopIteration), 2, **ENGINES[engine])
    iterator = iter(loader)
    assert [batch[1].tolist() for batch in (next(iterator), next(iterator))] == [[0, 1], [2, 3]]
    with pytest.raises(loaders.errors.UserCodeError, match="sample 5"):
        next(iterator)
    assert [batch[1].tolist() for batch in iterator] == [[6, 7], [8, 9]]


FAILING_DATASETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "first sample of all": (lambda: Failing(ERRORS["ValueError"], (0,)), {"batch_size": 2}),
    "last sample of all": (lambda: Failing(ERRORS["ValueError"], (9,)), {"batch_size": 4}),
    "every sample": (lambda: Failing(ERRORS["ValueError"], tuple(range(10))), {"batch_size": 4}),
    "two of a batch": (lambda: Failing(ERRORS["ValueError"], (5, 6)), {"batch_size": 4}),
    "unbatched": (lambda: Failing(ERRORS["ValueError"]), {"batch_size": None}),
    "behind a collate_fn": (lambda: Failing(ERRORS["ValueError"]), {"batch_size": 4, "collate_fn": len}),
    "in __getitems__": (lambda: FailingAtOnce(ERRORS["ValueError"]), {"batch_size": 4}),
    "in a subset": (lambda: Subset(Failing(ERRORS["ValueError"]), [1, 5, 2]), {"batch_size": 2}),
    "index beyond a subset": (lambda: Subset(range(10), [1, 5, 2]), {"batch_size": 2, "sampler": [0, 3, 1, 2]}),
    "index beyond a concatenation": (
        lambda: ConcatDataset([Failing(ERRORS["ValueError"], ()), range(2)]),
        {"batch_size": None, "sampler": [0, 12, -13, 1]},
    ),
    "index beyond a list": (lambda: [1, 2], {"batch_size": 2, "sampler": [0, 5, 1, 0]}),
    "key of a wrong type": (lambda: [1, 2], {"batch_size": 2, "sampler": ["a", "b"]}),
    "batch that is no list": (lambda: range(10), {"batch_sampler": [[1], 2, [3]]}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAILING_DATASETS)
def test_a_batch_that_fails_costs_no_other_batch(name: str, engine: str) -> None:
    make, arguments = FAILING_DATASETS[name]
    both(make(), engine, arguments)


class Recovering:
    """A sampler whose iterator raises once and then goes on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return self._Counter(self.size)

    class _Counter:
        def __init__(self, size: int) -> None:
            self.at, self.size = -1, size

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            self.at += 1
            if self.at == 3:
                raise LookupError("sampler")
            if self.at >= self.size:
                raise StopIteration
            return self.at


class RaisesInIter:
    def __iter__(self) -> Iterator[int]:
        raise LookupError("sampler")

    def __len__(self) -> int:
        return 3


def _stops_short(n: int) -> Iterator[int]:
    yield from range(n)
    raise LookupError("sampler")


# `like`: without workers torch draws when it needs; with workers ours, too, raises behind the batches drawn before.
FAILING_SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "generator": lambda: {"batch_size": 2, "sampler": _stops_short(5)},
    "generator, unbatched": lambda: {"batch_size": None, "sampler": _stops_short(2)},
    "at once": lambda: {"batch_size": 2, "sampler": _stops_short(0)},
    "in __iter__": lambda: {"batch_size": None, "sampler": RaisesInIter()},
    "one that recovers": lambda: {"batch_size": None, "sampler": Recovering(6)},
    "batch sampler": lambda: {"batch_sampler": ([i] for i in _stops_short(3))},
    "batch sampler of torch over one that fails": lambda: {"batch_sampler": BatchSampler(_stops_short(5), 2, False)},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAILING_SAMPLERS)
def test_a_failing_sampler_raises_behind_the_batches_it_gave_before(name: str, engine: str) -> None:
    make = FAILING_SAMPLERS[name]
    theirs = watch(lambda: torch.utils.data.DataLoader(range(10), **make()), length=False)
    ours = watch(lambda: loaders.DataLoader(range(10), **make(), **ENGINES[engine]), length=False)
    assert any(isinstance(event, LookupError) for event in theirs.epochs[0])
    assert_same_seen(ours, theirs)


def _refuses_fours(samples: list[Any]) -> Any:
    if 4 in samples:
        raise ZeroDivisionError("four")
    return samples


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [2, None])
def test_a_failing_collate_fn_costs_only_its_batch(size: int | None, engine: str) -> None:
    collate = _refuses_fours if size else lambda sample: _refuses_fours([sample])
    seen = both(range(7), engine, {"batch_size": size, "collate_fn": collate})
    [raised] = [event for event in seen.epochs[0] if isinstance(event, Exception)]
    assert "collating" in told(raised)


def _refuses(worker: int) -> None:
    raise PermissionError(f"worker {worker}")


@pytest.mark.parametrize("engine", WITH_WORKERS)
def test_a_failing_worker_init_fn_is_raised_by_every_batch(engine: str) -> None:
    [first, *_] = events_of(torch.utils.data.DataLoader(range(7), 2, worker_init_fn=_refuses, **FORK))
    assert isinstance(first, PermissionError)
    events = events_of(loaders.DataLoader(range(7), 2, worker_init_fn=_refuses, **ENGINES[engine]))
    assert [type(event) for event in events] == [PermissionError] * 4
    assert "starting" in told(events[0])


class BrokenStream(IterableDataset[Any]):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def __iter__(self) -> Iterator[int]:
        if self.at is None:
            raise ZeroDivisionError("stream")
        return self._items(self.at)

    @staticmethod
    def _items(at: int) -> Iterator[int]:
        yield from range(at)
        raise ZeroDivisionError("stream")


class RecoveringStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(Recovering(8))


@pytest.mark.parametrize(("size", "drop_last"), [(2, False), (2, True), (None, False)])
@pytest.mark.parametrize("make", [lambda: BrokenStream(5), lambda: BrokenStream(0), RecoveringStream])
def test_a_stream_that_fails_is_followed_as_far_as_torch_follows_it(make: Any, size: Any, drop_last: bool) -> None:
    both(make(), "inline", {"batch_size": size, "drop_last": drop_last})


@pytest.mark.parametrize("engine", WITH_WORKERS)
@pytest.mark.parametrize("make", [lambda: BrokenStream(5), lambda: BrokenStream(0), RecoveringStream])
def test_a_stream_that_fails_in_workers_is_followed_as_far_as_torch_follows_it(make: Any, engine: str) -> None:
    both(make(), engine, {"batch_size": 2}, like=FORK)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_that_cannot_begin_raises_what_its_iter_raised(engine: str) -> None:
    with pytest.raises(ZeroDivisionError):
        list(torch.utils.data.DataLoader(BrokenStream(None), 2))
    with pytest.raises(ZeroDivisionError):
        list(loaders.DataLoader(BrokenStream(None), 2, **ENGINES[engine]))


class Interrupted:
    """Interrupted once, as by Ctrl-C."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.times = 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3 and self.times == 0:
            self.times += 1
            raise self.error
        return index


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("collate", [None, list])
def test_a_batch_that_was_interrupted_is_made_when_it_is_asked_for_again(error: Any, collate: Any) -> None:
    iterator = iter(loaders.DataLoader(Interrupted(error), 2, collate_fn=collate))
    assert list(next(iterator)) == [0, 1]
    with pytest.raises(error):
        next(iterator)
    assert [list(batch) for batch in iterator] == [[2, 3], [4, 5]]


@pytest.mark.parametrize("engine", ["inline", "thread"])
def test_keys_need_not_be_picklable_where_nothing_is_sent(engine: str) -> None:
    keys = [lambda: 1, lambda: 2]
    [batch] = loaders.DataLoader(_Calls(), 2, sampler=keys, **ENGINES[engine])
    assert_same(batch, torch.tensor([1, 2]))


class _Calls:
    def __getitem__(self, key: Callable[[], int]) -> int:
        return key()


def test_keys_that_cannot_be_pickled_are_an_error_for_processes_and_no_hang() -> None:
    keys = [[1], [lambda: 2], [3]]
    first, error, last = events_of(loaders.DataLoader({1: 1, 3: 3}, batch_sampler=keys, **FORK))
    assert_same([first, last], [torch.tensor([1]), torch.tensor([3])])
    assert isinstance(error, (pickle.PicklingError, AttributeError))


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("not to be sent")


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_batch_alone() -> None:
    loader = loaders.DataLoader(range(6), 2, collate_fn=lambda s: Unsendable() if 2 in s else s, **FORK)
    iterator = iter(loader)
    assert next(iterator) == [0, 1]
    with pytest.raises(TypeError, match="not to be sent"):
        next(iterator)
    assert next(iterator) == [4, 5]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loader_serves_the_next_epoch_after_any_error(engine: str) -> None:
    dataset = Failing(ERRORS["ValueError"], (1, 7))
    loader = loaders.DataLoader(dataset, 2, sampler=SequentialSampler(dataset), **ENGINES[engine])
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 1"):
            list(loader)
    dataset.at = ()
    assert len(list(loader)) == 5
