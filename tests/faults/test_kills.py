"""A killed worker changes no batch, an innocent sample is never blamed, and no worker outlives the consumer."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import consumer, inside, saboteurs
from support.saboteurs import Blocks, Drawn, Numbers
from support.waiting import Killer, assert_no_workers, assert_nothing_is_held, is_gone, wait_until
from torch.utils.data import IterableDataset

from loaders.batch.spec import Field
from loaders.dataloader.loader import DataLoader
from loaders.errors import WorkerLostError
from loaders.randomness.streams import sample_rng
from loaders.workers import supervisor

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert_no_workers()


def same(one: Any, other: Any) -> bool:
    """Whether two batches have the same structure, dtypes and bytes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same(batches: list[Any], reference: list[Any]) -> None:
    assert len(batches) == len(reference)
    for number, (batch, want) in enumerate(zip(batches, reference, strict=True)):
        assert same(batch, want), f"batch {number} differs: {batch} instead of {want}"


SHAPES: dict[str, dict[str, Any]] = {
    "rows": {},
    "own collate_fn": {"collate_fn": saboteurs.collate_arrays, "fields": None},
    "single samples": {"batch_size": None, "fields": None},
}


def seeded(dataset: Any, **arguments: Any) -> DataLoader:
    arguments = {"batch_size": 16, "shuffle": True, "fields": {"boxes": Field(pad=-1.0)}, **arguments}
    return DataLoader(dataset, generator=torch.Generator().manual_seed(7), **arguments)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_random_kills_change_no_batch(method: str, shape: dict[str, Any]) -> None:
    # Short samples: a long one is likely to be hit three times by accident.
    dataset = Drawn(800 if shape.get("batch_size", 16) else 300, work_s=0.0002)
    reference = list(seeded(dataset, **shape))
    loader = seeded(dataset, num_workers=2, multiprocessing_context=method, **shape)
    iterator = iter(loader)
    mean_s = 0.015 if method == "fork" else 0.1
    with Killer(iterator, random.Random(1), mean_s) as killer:
        batches = list(iterator)
    assert killer.killed >= 2
    assert_same(batches, reference)
    del batches, iterator, killer
    assert_nothing_is_held(loader)


def test_kills_ten_milliseconds_apart_strike_out_no_sample() -> None:
    """A sample takes about as long as a worker lives."""
    dataset = Drawn(60, work_s=0.006)
    reference = list(seeded(dataset))
    loader = seeded(dataset, num_workers=2, on_error="skip")
    iterator = iter(loader)
    with Killer(iterator, random.Random(5), mean_s=0.01, at_most=60) as killer:
        batches = list(iterator)
    assert killer.killed >= 20
    assert loader.errors == []
    assert_same(batches, reference)


def test_persistent_workers_that_are_killed_between_epochs_change_nothing() -> None:
    dataset = Drawn(60)
    reference, loader = (seeded(dataset, num_workers=2, persistent_workers=True) for _ in range(2))
    for _ in range(3):
        assert_same(list(loader), list(reference))
        engine = inside.kept_of(loader).engine
        for worker in list(engine._supervisor.processes.values()):
            os.kill(worker.process.pid, signal.SIGKILL)
    assert_nothing_is_held(loader)


def test_strike_counts_against_the_row_that_was_being_read_and_no_other(tmp_path: Path) -> None:
    dataset = Blocks(24, {13}, tmp_path)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, on_error="skip")
    iterator = iter(loader)
    assert next(iterator)["i"].tolist() == list(range(8))
    dispatch = inside.dispatch_of(iterator)

    def strikes() -> dict[tuple[int, int], int]:
        dispatch.collect()
        return dict(dispatch.engine._strikes.counts)

    for count in (1, 2):
        os.kill(wait_until(lambda: dataset.victim(13), "a worker is in sample 13"), signal.SIGKILL)
        wait_until(lambda count=count: count in strikes().values(), "the worker is missed")
        [(_, row)] = strikes()
        assert row == 13 - 8
    # Its last chance is delayed, and sent only while the consumer collects results, which `strikes` does.
    os.kill(wait_until(lambda: strikes() and dataset.victim(13), "a worker is in sample 13"), signal.SIGKILL)
    rest = [batch["i"].tolist() for batch in iterator]
    assert rest == [[8, 9, 10, 11, 12, 14, 15], [16, 17, 18, 19, 20, 21, 22, 23]]
    [skipped] = loader.errors
    assert (skipped.index, skipped.source) == (13, "numbers/13.png")
    assert skipped.error.startswith("WorkerLostError: worker ")
    assert len(dispatch.engine._strikes.counts) == 1


def test_sample_that_kills_three_workers_is_named() -> None:
    loader = DataLoader(Numbers(40, saboteurs.sigkill, at={29}), batch_size=20, num_workers=2)
    iterator = iter(loader)
    assert next(iterator)["i"].tolist() == list(range(20))
    with pytest.raises(WorkerLostError, match=r'lost 3 times on sample 29 \("numbers/29.png"\)') as caught:
        next(iterator)
    assert (caught.value.index, caught.value.source) == (29, "numbers/29.png")
    del caught, iterator
    assert_nothing_is_held(loader)


def test_neighbours_of_a_killer_in_the_same_span_are_read() -> None:
    """All rows of the batch are one span here, which is divided where a worker dies."""
    dataset = Numbers(40, saboteurs.segfault, at={0, 13, 14, 39})
    loader = DataLoader(dataset, batch_size=40, num_workers=1, on_error="substitute")
    [batch] = loader
    good = [i for i in range(40) if i not in dataset.at]
    assert batch["i"][good].tolist() == good
    assert torch.equal(batch["x"][:, 0], batch["i"].float())
    assert not dataset.at & set(batch["i"].tolist())
    assert sorted({entry.index for entry in loader.errors}) == [0, 13, 14, 39]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_worker_that_is_killed_while_starting_strikes_no_sample(method: str, tmp_path: Path) -> None:
    loader = DataLoader(
        Numbers(12),
        4,
        num_workers=2,
        multiprocessing_context=method,
        worker_init_fn=saboteurs.WaitsInInit(tmp_path, patient=5),
    )
    iterator = iter(loader)
    engine = inside.engine_of(iterator)
    killed: list[int] = []

    def kill() -> None:
        for number in range(5):
            mark = tmp_path / f"in init {number}"
            wait_until(lambda mark=mark: mark.exists() and mark.read_text(), "a worker is starting")
            killed.append(int(mark.read_text()))
            os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    batches = [batch["i"].tolist() for batch in iterator]
    thread.join()
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(set(killed)) == 5
    assert engine._strikes.counts == {}


def test_kills_every_tenth_of_a_second_do_not_stop_progress_under_spawn() -> None:
    """Spares and starting workers are killed, too: a process lives for three tenths of a second on average."""
    dataset = Drawn(500, work_s=0.001)
    reference = list(seeded(dataset))
    iterator = iter(seeded(dataset, num_workers=2, multiprocessing_context="spawn"))
    first = next(iterator)
    with Killer(iterator, random.Random(3), mean_s=0.1, at_most=40):
        batches = [first, *iterator]
    assert_same(batches, reference)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_worker_that_is_killed_while_it_is_sent_a_large_dataset_causes_no_hang(method: str) -> None:
    dataset = Numbers(12)
    dataset.ballast = bytes(8_000_000)  # type: ignore[attr-defined]
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method)
    iterators = [iter(loader)]  # the server, if there is one, is running from here on
    killed = set(consumer.descendants(os.getpid()))

    def kill() -> None:
        for _ in range(3):
            [pid, *_] = wait_until(
                lambda: [pid for pid in consumer.descendants(os.getpid()) if pid not in killed], "a process is starting"
            )
            killed.add(pid)
            os.kill(pid, signal.SIGSTOP)  # so that it reads nothing before it is killed
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    iterators.append(iter(loader))
    for iterator in iterators:
        assert [batch["i"].tolist() for batch in iterator] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    thread.join()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("draws", [False, True], ids=["plain", "shuffled as it comes"])
def test_killed_stream_is_read_again_from_its_start(workers: int, draws: bool, tmp_path: Path) -> None:
    def stream(fault: Any) -> DataLoader:
        dataset = Counted(22, fault, at=range(0, 22, 3), once=tmp_path, draws=draws)
        return DataLoader(
            dataset, batch_size=2, num_workers=workers, prefetch_factor=4, generator=torch.Generator().manual_seed(1)
        )

    reference = [batch["i"] for batch in stream(None)]
    assert not list(tmp_path.glob("[0-9]*"))
    loader = stream(saboteurs.sigkill)
    assert_same([batch["i"] for batch in loader], reference)
    kills = len(list(tmp_path.glob("[0-9]*")))
    assert kills == 8
    # Not more often: the tasks that were submitted already stay in order for the next worker.
    assert len((tmp_path / "begun").read_bytes()) == 2 * workers + kills
    assert_nothing_is_held(loader)


def test_killed_stream_raises_its_errors_once(tmp_path: Path) -> None:
    loader = DataLoader(Erratic(tmp_path), batch_size=2, num_workers=1, prefetch_factor=4)
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1]
    with pytest.raises(saboteurs.Unlucky, match="bad luck with 3"):
        next(iterator)
    assert [batch.tolist() for batch in iterator] == [[4, 5], [6, 7], [8, 9]]
    assert (tmp_path / "8").exists()


def test_stream_that_kills_its_worker_is_reported_by_batch() -> None:
    loader = DataLoader(Counted(10, saboteurs.segfault, at={5}), batch_size=2, num_workers=1)
    iterator = iter(loader)
    assert [next(iterator)["i"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(
        WorkerLostError, match="worker 0 was lost 3 times on batch 2 of its stream, the last time by SIGSEGV"
    ):
        next(iterator)


class Counted(IterableDataset):  # type: ignore[type-arg]
    """0, 1, 2, … as `Numbers` gives them, or in an order that depends on all numbers drawn before."""

    def __init__(self, length: int, fault: Any, at: Any, once: Path | None = None, draws: bool = False) -> None:
        self.numbers = Numbers(length, fault, at, once)
        self.draws = draws

    def __iter__(self) -> Iterator[Any]:
        if self.numbers.once is not None:
            with open(self.numbers.once / "begun", "ab") as begun:
                begun.write(b".")
        left = list(range(len(self.numbers)))
        while left:
            yield self.numbers[left.pop(int(sample_rng().integers(len(left))) if self.draws else 0)]


class Erratic(IterableDataset):  # type: ignore[type-arg]
    """0 to 9; raises in place of 3 and goes on after it, and kills its worker once at 8."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Any:
        self.at = -1
        return self

    def __next__(self) -> int:
        self.at += 1
        if self.at == 3:
            saboteurs.unlucky(3)
        if self.at == 8 and saboteurs.is_first(self.folder / "8"):
            saboteurs.sigkill(8)
        if self.at == 10:
            raise StopIteration
        return self.at


def test_loader_closes_at_once_although_workers_of_another_have_inherited_its_pipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A worker that does not notice that it should end would be killed after this time, but the test fails earlier.
    monkeypatch.setattr(supervisor, "_GRACE_S", 1000.0)
    first, second = (
        DataLoader(dataset, batch_size=1, num_workers=2)
        for dataset in (saboteurs.Carries(9, saboteurs.eight_megabytes, at=range(9)), Numbers(9))
    )
    iterator = iter(first)
    next(iterator)  # the others are in the middle of sending
    other = iter(second)
    next(other)
    for worker in list(inside.processes_of(iterator))[:1]:
        os.kill(worker.process.pid, signal.SIGKILL)
    next(iterator)  # there is a spare now, which has inherited everything
    del iterator, worker
    assert [batch["i"].tolist() for batch in other] == [[i] for i in range(1, 9)]


def test_worker_that_is_killed_before_it_reads_a_sample_strikes_none(tmp_path: Path) -> None:
    """It is killed while it unpickles the keys, more often than is allowed over one sample."""
    loader = DataLoader(Numbers(4), sampler=[0, saboteurs.KillsReaders(tmp_path, 5, 1), 2], batch_size=3, num_workers=2)
    assert [batch["i"].tolist() for batch in loader] == [[0, 1, 2]]
    assert len(list(tmp_path.iterdir())) == 5


SIGCHLD_IGNORED = """
import pathlib, signal, sys
from support.saboteurs import Numbers, sigkill
from loaders.dataloader.loader import DataLoader
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
loader = DataLoader(Numbers(12, sigkill, at={5}, once=pathlib.Path(sys.argv[1])), batch_size=4, num_workers=2)
print([i for batch in loader for i in batch["i"].tolist()])
"""


def test_exit_code_that_something_else_took_causes_no_hang(tmp_path: Path) -> None:
    with run(["-c", SIGCHLD_IGNORED, str(tmp_path)]) as process:
        output, noise = process.communicate()
    assert (output, noise) == (f"{list(range(12))}\n", "")


def run(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        start_new_session=True,
    )


def run_consumer(*methods: str) -> subprocess.Popen[str]:
    return run([str(consumer.__file__), *methods])


METHODS = ["fork", "forkserver", "spawn"]


def started_by(process: subprocess.Popen[str]) -> tuple[list[int], list[int]]:
    """The ids of the workers once all are running, and of the other processes: the bystander, then their servers."""
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    workers, others = ([int(pid) for pid in process.stdout.readline().split()] for _ in range(2))
    assert len(workers) == 4
    return workers, others


@pytest.mark.parametrize("method", METHODS)
def test_workers_are_gone_soon_after_their_consumer_was_killed(method: str) -> None:
    with run_consumer(method) as process:
        workers, (bystander, *servers) = started_by(process)
        process.kill()
        wait_until(lambda: all(map(is_gone, workers)), "every worker is gone", timeout_s=10.0)
        assert not is_gone(bystander)
        os.kill(bystander, signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, servers)), "their servers are gone", timeout_s=10.0)
        assert process.communicate() == ("", "")


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_reaches_the_consumer_alone_and_leaves_nothing(method: str) -> None:
    with run_consumer(method) as process:
        workers, (bystander, *servers) = started_by(process)
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: all(map(is_gone, workers)), "every worker is gone", timeout_s=10.0)
        os.kill(bystander, signal.SIGKILL)
        assert process.communicate() == ("interrupted\nended\n", "")
        wait_until(lambda: all(map(is_gone, servers)), "their servers are gone", timeout_s=10.0)
    assert process.returncode == 0


def is_starting(pid: int, method: str) -> bool:
    """Whether a process is a worker, and not the server that spawn needs."""
    try:
        return method == "fork" or "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ctrl_c_in_the_consumer_while_workers_are_starting_ends_cleanly(method: str) -> None:
    with run_consumer(method) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        wait_until(
            lambda: any(is_starting(pid, method) for pid in consumer.descendants(process.pid)), "a worker is starting"
        )
        os.killpg(process.pid, signal.SIGINT)
        output, noise = process.communicate()
    assert (process.returncode, output, noise) == (0, "interrupted\nended\n", "")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ctrl_c_neither_stops_a_worker_that_is_starting_nor_makes_it_print(method: str) -> None:
    with run_consumer(method) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        while not select.select([process.stdout], [], [], 0.005)[0]:
            for pid in consumer.descendants(process.pid):
                if is_starting(pid, method) and pid != process.pid:
                    os.kill(pid, signal.SIGINT)
        workers = [int(pid) for pid in process.stdout.readline().split()]
        [bystander, *_] = [int(pid) for pid in process.stdout.readline().split()]
        assert not any(map(is_gone, workers))
        os.kill(bystander, signal.SIGKILL)
        process.kill()
        assert process.communicate() == ("", "")
