import multiprocessing
import os
import threading

import numpy as np
import pytest
from engine_contract import EPOCH, SEED, Bench, EngineContract, WorkersContract, expected_draws, job_of
from support.numpy_datasets import PATIENCE_S, Draws, Noise

from loaders.batch.spec import BatchSpec
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.workers.inline import InlineEngine
from loaders.workers.processes import ProcessEngine
from loaders.workers.threads import ThreadEngine


def process_engine(method):
    return lambda job, pool: ProcessEngine(job, pool, multiprocessing.get_context(method))


class TestInline(EngineContract):
    engine_of = staticmethod(InlineEngine)


class TestThreads(WorkersContract):
    engine_of = staticmethod(ThreadEngine)

    def test_closing_ends_the_threads(self, bench):
        bench = bench(Draws())
        threads = bench.engine._threads
        bench.engine.close()
        assert not any(thread.is_alive() for thread in threads)


class TestForkedProcesses(WorkersContract):
    shared = True
    engine_of = staticmethod(process_engine("fork"))

    def test_closing_ends_the_processes(self, bench):
        bench = bench(Pids())
        task = bench.task(range(40), BatchSpec.from_sample(0))
        bench.engine.submit(task, [(row, row + 1) for row in range(40)])
        bench.collect(40)
        [(offset, _)] = task.blocks
        pids = set(task.spec.fields[0].values(bench.pool.arena.buffer, offset, 40).tolist())
        assert 1 <= len(pids - {os.getpid()}) <= 2
        bench.engine.close()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


class Pids:
    def __getitem__(self, index):
        return os.getpid()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_samples_draw_the_same_in_processes_that_start_anew(method):
    bench = Bench(process_engine(method), job_of(Draws(), num_workers=1), shared=True)
    try:
        task = bench.task([3, 4, 5], BatchSpec.from_sample({"index": 0, "draws": np.zeros(4)}), position=40)
        bench.engine.submit(task, [(0, 2), (2, 3)])
        bench.collect(2)
        assert bench.rows(task, "index") == [3, 4, 5]
        assert bench.rows(task, "draws") == [expected_draws(position) for position in (40, 41, 42)]
    finally:
        bench.engine.close()


# -- stateful transforms under threads


class Meeting(Noise):
    """Two threads are keyed before either draws: a race that is rare elsewhere happens here every time."""

    barrier = threading.Barrier(2)

    def __call__(self):
        self.barrier.wait(PATIENCE_S)
        return [self.generator.random()]


class Met:
    def __init__(self):
        self.transform = Meeting()

    def __getitem__(self, index):
        return self.transform()[0]


def draws_of_two_threads_that_meet():
    bench = Bench(ThreadEngine, job_of(Met()), shared=False)
    try:
        task = bench.task([0, 1], BatchSpec.from_sample(0.0))
        bench.engine.submit(task, [(0, 1), (1, 2)])
        assert not any(each.failures for each in bench.collect(2))
        return task.spec.fields[0].values(bench.pool.arena.buffer, task.blocks[0][0], 2).tolist()
    finally:
        bench.engine.close()


def keyed_draw(position):
    generator = KeyedGenerator()
    own = generator.rekey(Domain.TRANSFORM, SEED, EPOCH, position)
    own.bit_generator.random_raw()  # the seed of the Python generator
    return own.random()


def test_each_thread_keys_a_transform_of_its_own():
    assert draws_of_two_threads_that_meet() == [keyed_draw(0), keyed_draw(1)]


def test_one_transform_shared_by_threads_draws_wrong_numbers_so_each_has_its_own(monkeypatch):
    monkeypatch.setattr("loaders.workers.threads.with_own_transforms", lambda *roots: (*roots, []))
    assert draws_of_two_threads_that_meet() != [keyed_draw(0), keyed_draw(1)]
