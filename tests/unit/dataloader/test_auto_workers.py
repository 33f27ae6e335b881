"""`num_workers="auto"`: on numbers, on a simulated loop, and with real workers that come and go."""

import itertools

import numpy as np
import pytest
from support import inside
from support.numpy_datasets import Numbers
from torch.utils.data import IterableDataset

from loaders import DataLoader
from loaders.dataloader import auto_workers
from loaders.dataloader.auto_workers import SETTLED, Seen, Tuner
from loaders.report.statistics import EpochStatistics, WorkerSums

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
MS = 1_000_000


class Loop:
    """A training loop over `cores` cores: what a tuner is shown, and what becomes of it."""

    def __init__(self, monkeypatch, *, model_ms, sample_ms, cores=64, rows=32, workers=4):
        self.model_ms, self.sample_ms, self.cores, self.rows = model_ms, sample_ms, cores, rows
        self.num_workers = workers
        self.statistics = EpochStatistics(given_ns=1)
        self.now = 0
        monkeypatch.setattr(auto_workers.time, "perf_counter_ns", lambda: self.now)

    def resize(self, workers):
        self.num_workers = workers
        for number in range(workers):
            self.statistics.workers.setdefault(number, WorkerSums(samples=1))

    def batch(self):
        """One step: workers beyond the cores only make each other slower."""
        service = self.sample_ms * MS * max(1.0, self.num_workers / self.cores)
        made, own = service * self.rows / self.num_workers, self.model_ms * MS
        period = max(made, own)
        statistics = self.statistics
        statistics.batches += 1
        statistics.rows += self.rows
        statistics.samples += self.rows
        statistics.wait_ns += int(period - own)
        statistics.compute_ns += int(own)
        statistics.busy_ns += int(service * self.rows)
        self.now += int(period)

    def settle(self, tuner):
        numbers = []
        for _ in range(SETTLED):
            self.batch()
            numbers.append(tuner.look(self.statistics, self))
        assert tuner.is_settled
        return numbers


@pytest.mark.parametrize(
    ("model_ms", "sample_ms", "start", "needed"),
    [(20, 2.0, 1, 4), (20, 10.0, 4, 16), (20, 0.6, 8, 1), (20, 2.0, 4, 4), (1, 0.001, 8, 1)],
)
def test_the_number_settles_where_the_loop_hardly_waits_and_few_are_idle(
    monkeypatch, model_ms, sample_ms, start, needed
):
    loop = Loop(monkeypatch, model_ms=model_ms, sample_ms=sample_ms, workers=start)
    numbers = loop.settle(Tuner(64))
    assert needed <= numbers[-1] <= 1.4 * needed + 1
    assert len(set(numbers[60:])) == 1


def test_more_than_there_are_cores_for_are_let_go_again(monkeypatch):
    loop = Loop(monkeypatch, model_ms=1, sample_ms=10.0, cores=4, workers=4)
    numbers = loop.settle(Tuner(64))
    assert max(numbers) > 4
    assert numbers[-1] == 4


def test_there_are_never_more_than_the_most(monkeypatch):
    assert max(Loop(monkeypatch, model_ms=1, sample_ms=10.0).settle(Tuner(6))) == 6


def test_workers_that_do_not_limit_are_not_multiplied():
    waiting = Seen(10, 100, window_ns=100 * MS, wait_ns=50 * MS, own_ns=50 * MS, busy_ns=80 * MS, samples=100)
    assert Tuner(64).wanted(4, waiting) == 4


def test_a_settled_number_stays(monkeypatch):
    loop = Loop(monkeypatch, model_ms=20, sample_ms=2.0)
    tuner = Tuner(64)
    settled = loop.settle(tuner)[-1]
    loop.model_ms = 1
    for _ in range(50):
        loop.batch()
        assert tuner.look(loop.statistics, loop) == settled


# -- real workers


class Restless(Tuner):
    """Changes its mind at every batch."""

    def look(self, statistics, engine):
        self.numbers = getattr(self, "numbers", None) or itertools.cycle((3, 1, 4, 2, 1, 1, 4))
        engine.resize(next(self.numbers))
        return engine.num_workers


@pytest.mark.parametrize("method", ["process", "thread"])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_come_and_go_change_no_batch(monkeypatch, method, persistent):
    monkeypatch.setattr(auto_workers, "whole_cores", lambda: 4)

    def epochs(**arguments):
        loader = DataLoader(Numbers(160), 8, shuffle=True, seed=5, **arguments)
        if arguments:
            inside.tune_by(loader, Restless(4))
        return [{name: value.tolist() for name, value in batch.items()} for _ in range(2) for batch in loader]

    assert epochs(num_workers="auto", worker_method=method, persistent_workers=persistent) == epochs()


def test_workers_that_were_sent_home_are_gone_and_a_killed_one_is_replaced():
    loader = DataLoader(Numbers(400), 4, num_workers=4, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    engine = inside.kept_of(loader).engine
    engine.resize(2)
    rest = [next(batches)["label"].tolist() for _ in range(20)]
    while sum(worker.number is not None for worker in engine._supervisor.processes.values()) > 2:
        inside.kept_of(loader).engine.wait(0.01)
        inside.kept_of(loader).collect()
    assert rest == [list(range(at, at + 4)) for at in range(4, 84, 4)]
    victim = next(worker for worker in engine._supervisor.processes.values() if worker.number is not None)
    victim.process.kill()
    assert [batch["label"].tolist() for batch in batches] == [list(range(at, at + 4)) for at in range(84, 400, 4)]
    assert sum(worker.number is not None for worker in engine._supervisor.processes.values()) == 2


def test_auto_is_an_int_wherever_it_is_looked_at(monkeypatch):
    monkeypatch.setattr(auto_workers, "whole_cores", lambda: 16)
    loader = DataLoader(Numbers(8), num_workers="auto")
    assert (loader.num_workers, inside.most_workers_of(loader)) == (8, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert DataLoader(Numbers(8), num_workers="auto").num_workers == 2
    with pytest.raises(ValueError, match="num_workers should be an int or \"auto\", but got 'many'"):
        DataLoader(Numbers(8), num_workers="many")


def test_a_stream_has_one_worker_since_its_content_depends_on_how_many_share_it():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(np.arange(10))

    loader = DataLoader(Stream(), num_workers="auto", batch_size=5, worker_method="thread")
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert loader.num_workers == 1
