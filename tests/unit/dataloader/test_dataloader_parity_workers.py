"""Streams and workers: each is told and seeded as torch tells and seeds its own, and streams interleave alike."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.late_torch import AsksWhoItIs
from support.parity import ENGINES, assert_same_seen, ours_and_theirs, watch
from support.waiting import wait_until
from torch.utils.data import IterableDataset, get_worker_info

import loaders

WITH_WORKERS = [name for name in ENGINES if name != "inline"]


class Numbers:
    """Ten samples."""

    def __init__(self, n: int = 10, read: Callable[[int], Any] = lambda i: i) -> None:
        self.n = n
        self.read = read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


class Stream(IterableDataset[Any]):
    """Counts to `n`; with `length` it says another one; with `split` each worker takes its part."""

    def __init__(self, n: int, *, length: int | None = None, split: bool = False) -> None:
        self.n = n
        self.split = split
        if length is not None:
            self.length = length

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info() or loaders.worker_info()
        step, start = (info.num_workers, info.id) if self.split and info is not None else (1, 0)
        return iter([(np.full(2, i), i, str(i)) for i in range(start, self.n, step)])


class Measured(Stream):
    def __len__(self) -> int:
        return self.length


# Unequal streams: worker 0 has `n` samples, worker 1 has twice as many.
class Unequal(IterableDataset[Any]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info() or loaders.worker_info()
        assert info is not None
        return ({"worker": info.id, "i": i} for i in range(self.n * (info.id + 1)))


STREAM_ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "batches": {"batch_size": 4},
    "drop_last": {"batch_size": 4, "drop_last": True},
    "unbatched": {"batch_size": None},
    "collate_fn": {"batch_size": 4, "collate_fn": lambda samples: [sample[1] for sample in samples]},
    "unbatched collate_fn": {"batch_size": None, "collate_fn": lambda sample: sample[2]},
    "shuffle is False": {"batch_size": 3, "shuffle": False},
}
STREAMS: dict[str, Callable[[], Any]] = {
    "of ten": lambda: Stream(10),
    "empty": lambda: Stream(0),
    "with its length": lambda: Measured(10, length=10),
    "longer than it says": lambda: Measured(10, length=1),
    "shorter than it says": lambda: Measured(10, length=12),
}


@pytest.mark.parametrize("arguments", STREAM_ARGUMENTS)
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_without_workers_is_that_of_torch(name: str, arguments: str) -> None:
    ours, theirs = ours_and_theirs(STREAMS[name](), "inline", **STREAM_ARGUMENTS[arguments], epochs=2)
    assert_same_seen(ours, theirs)


@pytest.mark.parametrize("engine", WITH_WORKERS)
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: Stream(10), {"batch_size": 4}),
        (lambda: Stream(10, split=True), {"batch_size": 2}),
        (lambda: Stream(11, split=True), {"batch_size": 4, "drop_last": True}),
        (lambda: Stream(1, split=True), {"batch_size": 4}),
        (lambda: Stream(5, split=True), {"batch_size": None}),
        (lambda: Unequal(3), {"batch_size": 2}),
        (lambda: Unequal(3), {"batch_size": 2, "drop_last": True}),
        (lambda: Unequal(0), {"batch_size": 2}),
        (lambda: Unequal(3), {"batch_size": 2, "persistent_workers": True}),
        (lambda: Measured(6, length=6), {"batch_size": None}),
    ],
    ids=[
        "a copy each", "split", "split, drop_last", "fewer samples than workers", "unbatched", "unequal",
        "unequal, drop_last", "empty", "persistent", "longer than its length",
    ],
)  # fmt: skip
def test_streams_of_two_workers_interleave_as_those_of_torch(make: Any, arguments: Any, engine: str) -> None:
    fork = {"num_workers": 2, "multiprocessing_context": "fork"}
    theirs = watch(lambda: torch.utils.data.DataLoader(make(), **arguments, **fork), epochs=2)
    ours = watch(lambda: loaders.DataLoader(make(), **arguments, **ENGINES[engine]), epochs=2)
    assert_same_seen(ours, theirs)


class HeldBack(IterableDataset[Any]):
    """Eight samples of each worker; worker 1 gives none before the file is there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[int]:
        info = loaders.worker_info()
        assert info is not None
        wait_until(lambda: info.id == 0 or self.file.exists(), "worker 1 may go on")
        yield from range(10 * info.id, 10 * info.id + 8)


@pytest.mark.parametrize("prefetch_factor", [None, 1, 3])
@pytest.mark.parametrize("engine", WITH_WORKERS)
def test_out_of_order_a_slow_stream_holds_up_no_batch_of_another(
    engine: str, prefetch_factor: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "go on"
    arguments = {"batch_size": None, "in_order": False, "timeout": 10, "prefetch_factor": prefetch_factor}
    iterator = iter(loaders.DataLoader(HeldBack(file), **ENGINES[engine], **arguments))
    assert [next(iterator) for _ in range(8)] == list(range(8))
    file.touch()
    assert list(iterator) == list(range(10, 18))


def test_the_length_that_counts_is_the_one_asked_for_before_the_epoch() -> None:
    for kind in (torch.utils.data.DataLoader, loaders.DataLoader):
        loader = kind(Measured(4, length=1), batch_size=1)
        iterator = iter(loader)
        next(iterator)
        assert len(loader) == 1
        next(iterator)  # a warning would be an error here
        with pytest.warns(UserWarning, match="Length of IterableDataset"):
            assert len(list(loader)) == 4


# -- workers


def _who(_: int) -> dict[str, Any]:
    info = get_worker_info()
    assert info is not None
    return {"num_workers": info.num_workers, "from seed": info.seed - info.id, "torch": torch.initial_seed() - info.id}


def test_a_worker_process_is_told_to_torch_with_the_seed_torch_would_give_it() -> None:
    arguments = {"num_workers": 2, "multiprocessing_context": "fork", "batch_size": 2}
    theirs = watch(lambda: torch.utils.data.DataLoader(Numbers(read=_who), **arguments), epochs=2)
    ours = watch(lambda: loaders.DataLoader(Numbers(read=_who), **arguments), epochs=2)
    assert_same_seen(ours, theirs)
    assert get_worker_info() is None
    assert loaders.worker_info() is None


def test_the_seed_stays_with_persistent_workers() -> None:
    arguments = {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True}
    theirs = watch(lambda: torch.utils.data.DataLoader(Numbers(2, read=_who), **arguments), epochs=2)
    ours = watch(lambda: loaders.DataLoader(Numbers(2, read=_who), **arguments), epochs=2)
    assert_same_seen(ours, theirs)


_drawn: dict[str, Any] = {}


def _draw_at_start(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert info.id == worker
    _drawn.update(
        python=random.random(),
        numpy=np.random.rand(),
        torch=torch.rand(()).item(),
        seed=torch.initial_seed() == info.seed,
        threads=torch.get_num_threads(),
    )


def test_worker_init_fn_finds_the_random_states_that_torch_sets() -> None:
    arguments = {
        "num_workers": 1,
        "multiprocessing_context": "fork",
        "worker_init_fn": _draw_at_start,
        "batch_size": None,
    }
    dataset = Numbers(1, read=lambda i: dict(_drawn))
    theirs = watch(lambda: torch.utils.data.DataLoader(dataset, **arguments))
    ours = watch(lambda: loaders.DataLoader(dataset, **arguments))
    assert theirs.epochs[0][0]["seed"] is True
    assert_same_seen(ours, theirs)
    assert _drawn == {}


def test_worker_init_fn_runs_in_every_worker_and_may_change_its_dataset() -> None:
    def init(worker: int) -> None:
        info = get_worker_info()
        info.dataset.read = lambda i: (i, os.getpid(), info.id)

    loader = loaders.DataLoader(Numbers(64), 4, num_workers=2, worker_init_fn=init, multiprocessing_context="fork")
    rows = [row for batch in loader for row in zip(*(column.tolist() for column in batch), strict=True)]
    assert [row[0] for row in rows] == list(range(64))
    assert os.getpid() not in {row[1] for row in rows}
    assert {row[2] for row in rows} <= {0, 1}


def test_without_workers_worker_init_fn_is_not_called() -> None:
    def init(worker: int) -> None:
        raise AssertionError("no worker to initialise")

    assert len(list(loaders.DataLoader(Numbers(), 4, worker_init_fn=init))) == 3


def test_a_thread_is_told_by_worker_info_alone() -> None:
    def read(i: int) -> Any:
        info = loaders.worker_info()
        assert info is not None
        return (
            info.id,
            info.num_workers,
            get_worker_info() is None,
            threading.current_thread() is threading.main_thread(),
        )

    loader = loaders.DataLoader(Numbers(read=read), 10, num_workers=2, worker_method="thread")
    ids, workers, none, main = next(iter(loader))
    assert set(ids.tolist()) <= {0, 1}
    assert workers.tolist() == [2] * 10
    assert bool(none.all())
    assert not bool(main.any())


def test_a_dataset_that_imports_torch_late_under_spawn_is_told_all_the_same() -> None:
    loader = loaders.DataLoader(
        AsksWhoItIs(), 4, num_workers=1, multiprocessing_context="spawn", generator=torch.Generator().manual_seed(3)
    )
    batch = next(iter(loader))
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(3)))
    assert batch["torch was there"].tolist() == [False, True, True, True]
    assert batch["id"].tolist() == [0] * 4
    assert batch["num_workers"].tolist() == [1] * 4
    assert batch["seed"].tolist() == [seed] * 4
    assert batch["own dataset"].tolist() == [True] * 4
    assert os.getpid() not in batch["pid"].tolist()
