"""A signal handler raises at any instruction of `next()`: no batch is lost, repeated or wrong."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from support import inside
from support.interrupts import ENDED, INTERRUPTED, Interrupted, delays, interruptible, next_interrupted
from support.numpy_datasets import Gate
from support.waiting import assert_no_workers
from torch.utils.data import IterableDataset, get_worker_info

from loaders import DataLoader, sample_rng
from loaders.dataloader.dispatch import Dispatch

# Python prints and drops what a handler raises inside a finalizer.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ENGINES: dict[str, dict[str, Any]] = {
    "inline": {},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "kept": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
    "kept threads": {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
}
LENGTH, SIZE = 40, 4
# About how long `next` takes: interrupts come up to so long after its start.
LONGEST_S = {"inline": 5e-4, "thread": 2e-3, "kept threads": 2e-3, "fork": 2e-3, "kept": 2e-3}


class Drawn:
    """Every value of a sample shows its index and what was drawn for it."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = int(sample_rng().integers(1 << 30))
        return {"data": np.full((32, 32), index * 1000003 + draw, np.int64), "index": index, "draw": draw}


def loader_for(engine: str, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Drawn(), SIZE, shuffle=True, seed=7, **{**ENGINES[engine], **arguments})


def seen(batch: Any) -> list[tuple[int, int]]:
    """(index, draw) of each sample; its data must agree."""
    index, draw, data = batch["index"].tolist(), batch["draw"].tolist(), batch["data"].numpy()
    for row, (i, d) in enumerate(zip(index, draw, strict=True)):
        assert (data[row] == i * 1000003 + d).all(), "the data of one sample with the label of another"
    return list(zip(index, draw, strict=True))


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert_no_workers()


def whole_epochs(count: int) -> list[list[list[tuple[int, int]]]]:
    loader = loader_for("inline")
    return [[seen(batch) for batch in loader] for _ in range(count)]


def storm(engine: str, interrupts: int, seed: int = 0) -> dict[str, int]:
    """Interrupt `next` again and again; each time go on, resume from a state, or resume with a new loader."""
    moments, came, ways = delays(seed, LONGEST_S[engine]), 0, 0
    expected = whole_epochs(2)
    counts = {"interrupts": 0, "epochs": 0}
    while came < interrupts:
        loader = loader_for(engine)
        held: list[tuple[Any, Any]] = []
        for epoch in range(2):
            iterator, found, patience = iter(loader), [], 1
            while True:
                batch = next_interrupted(iterator, next(moments) * patience)
                if batch is ENDED:
                    break
                if batch is not INTERRUPTED:
                    found.append(seen(batch))
                    held.append((batch, found[-1]))
                    patience = 1
                    continue
                came += 1
                patience *= 2  # what was interrupted is done again, which takes longer
                ways += 1
                if ways % 3 == 1 or len(found) == LENGTH // SIZE:
                    continue  # with the same iterator
                state = loader.state_dict()
                assert state["batches"] == len(found)
                if ways % 3 == 2:
                    loader.load_state_dict(state)  # with the same loader
                else:
                    loader = loader_for(engine)
                    loader.load_state_dict(state)
                iterator = iter(loader)
            assert found == expected[epoch], (engine, epoch, len(found))
            counts["epochs"] += 1
        for batch, before in held:
            assert seen(batch) == before
        del iterator, loader, held
    counts["interrupts"] = came
    return counts


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_inside_next_loses_repeats_and_changes_nothing(engine: str) -> None:
    with interruptible():
        assert storm(engine, 60 if "fork" in engine or engine == "kept" else 200)["interrupts"] >= 60


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ENGINES)
def test_five_thousand_interrupts(engine: str) -> None:
    with interruptible():
        counts = storm(engine, 5000, seed=1)
    print(engine, counts)
    assert counts["interrupts"] >= 5000


class Counted(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(start, LENGTH, step):
            yield {"index": index, "draw": int(sample_rng().integers(1 << 30))}


@pytest.mark.parametrize("engine", ["inline", "fork"])
def test_a_stream_continues_where_it_was_interrupted(engine: str) -> None:
    def batches(loader: Any) -> list[Any]:
        return [(batch["index"].tolist(), batch["draw"].tolist()) for batch in loader]

    expected = batches(DataLoader(Counted(), SIZE, seed=3, **ENGINES[engine]))
    moments, came = delays(5, LONGEST_S[engine]), 0
    with interruptible():
        while came < 20:
            iterator, found = iter(DataLoader(Counted(), SIZE, seed=3, **ENGINES[engine])), []
            patience = 1
            while (batch := next_interrupted(iterator, next(moments) * patience)) is not ENDED:
                patience = 2 * patience if batch is INTERRUPTED else 1
                if batch is INTERRUPTED:
                    came += 1
                else:
                    found.append((batch["index"].tolist(), batch["draw"].tolist()))
            assert found == expected
            del iterator


@pytest.mark.parametrize("engine", ENGINES)
def test_the_interrupted_epoch_of_persistent_workers_leaves_nothing_to_the_next_one(engine: str) -> None:
    moments, expected = delays(2, LONGEST_S[engine]), whole_epochs(1)[0]
    loader = loader_for(engine)
    with interruptible():
        for _ in range(12):
            iterator = iter(loader)
            while next_interrupted(iterator, next(moments)) not in (ENDED, INTERRUPTED):
                pass
            del iterator  # dropped in the middle, then iterated anew
            loader.set_epoch(0)
            assert [seen(batch) for batch in loader] == expected


# -- interrupts at a chosen instruction


def test_workers_whose_submit_was_interrupted_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if a handler had raised after the engine took a task and before the dispatch noted that.
    loader, expected = loader_for("kept"), whole_epochs(1)[0]
    submit, cuts = Dispatch.submit, iter([3, 9])
    count, cut = 0, next(cuts)

    def cut_off(self: Dispatch, batch: Any, spans: Any) -> None:
        nonlocal count, cut
        self.engine.submit(batch.task, spans, batch.lane)
        count += 1
        if count == cut:
            cut = next(cuts, 0)
            raise Interrupted
        batch.unreported = batch.unreported or 0
        self._open[batch.task.ticket] = batch
        batch.unreported += sum(max(1, stop - start) for start, stop in spans)

    iterator, found = iter(loader), []
    monkeypatch.setattr(Dispatch, "submit", cut_off)
    before = inside.dispatch_of(iterator)
    while True:
        try:
            found.append(seen(next(iterator)))
        except Interrupted:
            continue
        except StopIteration:
            break
    monkeypatch.setattr(Dispatch, "submit", submit)
    assert found == expected
    assert before is not inside.kept_of(loader), "interrupted workers were used again"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_was_made_and_not_handed_out_is_not_counted_and_comes_next(engine: str) -> None:
    loader, expected = loader_for(engine), whole_epochs(1)[0]
    iterator = iter(loader)
    assert seen(next(iterator)) == expected[0]
    inside.raise_before_hand_out(iterator, Interrupted())
    with pytest.raises(Interrupted):
        next(iterator)
    assert loader.state_dict()["batches"] == 1
    assert [seen(batch) for batch in iterator] == expected[1:]


def test_a_time_limit_that_passes_while_waiting_costs_no_worker() -> None:
    gate = Gate()
    gate.hold(0)
    loader = DataLoader(Waits(gate), 2, num_workers=1, multiprocessing_context="fork")
    with interruptible():
        iterator = iter(loader)
        workers = [worker.process.pid for worker in inside.processes_of(iterator)]
        assert gate.entered(1) == [0]
        assert next_interrupted(iterator, 0.05) is INTERRUPTED
        gate.open()
        assert [batch.tolist() for batch in islice(iterator, 1)] == [[0, 1]]
        assert [worker.process.pid for worker in inside.processes_of(iterator)] == workers
        assert [batch.tolist() for batch in iterator] == [[2, 3]]
    gate.close()


class Waits:
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.gate.pass_by(index)
        return index


# -- handlers that do not raise but use the loader


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("does", ["holders", "iterates", "forks", "states"])
def test_a_handler_may_use_the_loader_in_the_middle_of_its_work(engine: str, does: str) -> None:
    loader, calls = loader_for(engine), 0

    def handle(number: int, frame: Any) -> None:
        nonlocal calls
        calls += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        if does == "holders":
            loader.holders()
            loader.report()
        elif does == "iterates":
            seen(next(iter(loader)))
        elif does == "states":
            loader.state_dict()
        elif (child := os.fork()) == 0:
            os._exit(0)
        else:
            os.waitpid(child, 0)

    before = signal.signal(signal.SIGALRM, handle)
    moments = delays(4, LONGEST_S[engine])
    try:
        for _ in range(3):
            loader.set_epoch(0)
            iterator, found = iter(loader), []
            while True:
                signal.setitimer(signal.ITIMER_REAL, next(moments))
                batch = next(iterator, None)
                if batch is None:
                    break
                found.append(seen(batch))
            assert found == whole_epochs(1)[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls


def test_a_handler_cannot_advance_an_iterator_that_is_making_a_batch() -> None:
    class Alarms(Drawn):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == first:
                signal.raise_signal(signal.SIGALRM)
            return super().__getitem__(index)

    first = whole_epochs(1)[0][1][2][0]
    loader = DataLoader(Alarms(), SIZE, shuffle=True, seed=7)
    iterator = iter(loader)

    def handle(number: int, frame: Any) -> None:
        with pytest.raises(RuntimeError, match="in the middle of making a batch"):
            next(iterator)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        assert [seen(batch) for batch in iterator] == whole_epochs(1)[0]
    finally:
        signal.signal(signal.SIGALRM, before)


# -- the user's threads


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_share_an_iterator_get_each_batch_once(engine: str) -> None:
    loader = loader_for(engine)
    for epoch in whole_epochs(2):
        iterator, found, errors = iter(loader), [], []

        def consume(iterator: Any = iterator, found: Any = found, errors: Any = errors) -> None:
            try:
                for batch in iterator:
                    found.append(seen(batch))
            except BaseException as error:  # asserted below
                errors.append(error)

        threads = [threading.Thread(target=consume) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert sorted(found) == sorted(epoch)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_iterate_one_loader_each_see_a_whole_epoch(engine: str) -> None:
    loader, results, errors = loader_for(engine), [], []
    whole = {tuple(sorted(chain(*epoch))) for epoch in whole_epochs(8)}

    def consume() -> None:
        try:
            results.extend(tuple(sorted(chain(*map(seen, loader)))) for _ in range(2))
        except BaseException as error:  # asserted below
            errors.append(error)

    threads = [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(results) == 6
    assert set(results) <= whole
