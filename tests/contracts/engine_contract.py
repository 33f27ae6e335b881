"""What every engine promises. Its tests inherit the class and define how it is made."""

import dataclasses
import itertools
import multiprocessing
import time

import numpy as np
import pytest
from support.numpy_datasets import PATIENCE_S, Draws, Gate, Numbers

from loaders import worker_info
from loaders.batch.spec import BatchSpec
from loaders.memory.arena import Arena
from loaders.memory.blocks import BlockState
from loaders.memory.slots import SlotPool
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.workers.messages import Job, Task

SEED, EPOCH = 11, 3


class StubbornError(Exception):
    """Cannot be rebuilt from its pickle."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Raises:
    def __init__(self, *args):
        self.error = args

    def __getitem__(self, index):
        kind, *args = self.error
        raise kind(*args)


class Batches(Numbers):
    def __getitems__(self, keys):
        return [Numbers.__getitem__(self, key) for key in keys]


class Stream:
    def __init__(self, length, gate=None):
        self.length = length
        self.gate = gate

    def __iter__(self):
        info = worker_info()
        lane = 0 if info is None else info.id
        for number in range(self.length):
            if self.gate is not None:
                self.gate.pass_by(number)
            yield {"label": 100 * lane + number}


def job_of(dataset, **changes):
    """A job of two workers that read rows, with these changes."""
    usual = Job(
        dataset=dataset,
        fetch="each",
        collate=None,
        batched=True,
        fields={},
        keep_going=False,
        batch_rows=4,
        drop_last=False,
        num_workers=2,
        seed=7,
        init=None,
    )
    return dataclasses.replace(usual, **changes)


_tickets = itertools.count()


def task_of(keys, spec=None, blocks=(), position=0):
    return Task(next(_tickets), keys, position, EPOCH, SEED, spec, tuple(blocks))


class Bench:
    """One engine on its own arena: makes tasks with slots, reads the rows back."""

    def __init__(self, engine_of, job, *, shared):
        self.pool = SlotPool(Arena(64 << 20, shared=shared), ceiling_nbytes=32 << 20)
        self.engine = engine_of(job, self.pool)

    def task(self, keys, spec=None, position=0):
        slot = self.pool.acquire([size for size in spec.sizes(len(keys)) if size]) if spec else []
        at = iter(slot)
        blocks = (
            [((block := next(at)).offset, block.nbytes) if size else (0, 0) for size in spec.sizes(len(keys))]
            if spec
            else []
        )
        return task_of(keys, spec, blocks, position)

    def collect(self, count):
        """`count` results, in order of arrival."""
        results = []
        deadline = time.monotonic() + PATIENCE_S
        while len(results) < count and time.monotonic() < deadline:
            results += self.engine.collect(PATIENCE_S)
        return results

    def rows(self, task, path):
        [(number, field)] = [(n, field) for n, field in enumerate(task.spec.fields) if field.path == path]
        return field.values(self.pool.arena.buffer, task.blocks[number][0], len(task.keys)).tolist()


class EngineContract:
    """Subclasses define how an engine is made and whether its memory is shared."""

    shared = False
    has_workers = False

    @staticmethod
    def engine_of(job, pool):
        raise NotImplementedError

    @pytest.fixture
    def gate(self):
        gate = Gate()
        yield gate
        gate.close()

    @pytest.fixture
    def bench(self, monkeypatch):
        monkeypatch.setattr("loaders.workers.threads._GRACE_S", 0.2)
        monkeypatch.setattr("loaders.workers.supervisor._GRACE_S", 0.2)
        benches = []

        def make(dataset, **changes):
            benches.append(Bench(self.engine_of, job_of(dataset, **changes), shared=self.shared))
            return benches[-1]

        yield make
        for each in benches:
            each.engine.close()

    SPEC = BatchSpec.from_sample(Numbers()[0])

    # -- results

    def test_every_span_is_reported_exactly_once(self, bench):
        bench = bench(Numbers(1000))
        tasks = [bench.task(range(100 * n, 100 * n + 100), self.SPEC) for n in range(10)]
        spans = [(row, row + 5) for row in range(0, 100, 5)]
        for task in tasks:
            bench.engine.submit(task, spans)
        results = bench.collect(200)
        told = sorted((each.ticket, each.start, each.stop) for each in results)
        assert told == [(task.ticket, *span) for task in tasks for span in spans]
        assert all(each.is_plain and each.elapsed_s > 0 for each in results)
        assert bench.engine.collect(0) == []

    def test_rows_are_written_where_the_task_says(self, bench):
        bench = bench(Numbers(1000))
        tasks = [bench.task(keys, self.SPEC) for keys in ([3, 1, 2], [700, -5, 0, 9])]
        for task in tasks:
            bench.engine.submit(task, [(0, 2), (2, len(task.keys))])
        bench.collect(4)
        for task in tasks:
            assert bench.rows(task, "label") == list(task.keys)
            assert [row[1][2] for row in bench.rows(task, "x")] == [key % 256 for key in task.keys]

    def test_a_span_leaves_the_other_rows_alone(self, bench):
        bench = bench(Numbers())
        task = bench.task([1, 2, 3, 4], self.SPEC)
        number = [field.path for field in self.SPEC.fields].index("label")
        self.SPEC.fields[number].values(bench.pool.arena.buffer, task.blocks[number][0], 4)[:] = -1
        bench.engine.submit(task, [(1, 3)])
        bench.collect(1)
        assert bench.rows(task, "label") == [-1, 2, 3, -1]

    def test_one_worker_executes_spans_in_the_order_they_came(self, bench):
        bench = bench(Numbers(), num_workers=1)
        tasks = [bench.task(range(4), self.SPEC) for _ in range(5)]
        for task in tasks:
            bench.engine.submit(task, [(2, 4), (0, 2)])
        told = [(each.ticket, each.start) for each in bench.collect(10)]
        assert told == [(task.ticket, start) for task in tasks for start in (2, 0)]

    def test_spans_can_be_added_to_a_task_once_others_are_done(self, bench):
        bench = bench(Numbers())
        task = bench.task(range(4), self.SPEC)
        for span in ((0, 1), (1, 4)):
            bench.engine.submit(task, [span])
            [result] = bench.collect(1)
            assert (result.start, result.stop) == span
        assert bench.rows(task, "label") == [0, 1, 2, 3]

    def test_a_stream_goes_on_from_batch_to_batch_in_its_own_lane(self, bench):
        bench = bench(Stream(7), fetch="stream", batch_rows=3)
        spec = BatchSpec.from_sample({"label": 0})
        lanes = bench.engine.num_workers
        tasks = {}
        for serial in range(4):
            for lane in range(lanes):
                task = task_of([serial])
                tasks[task.ticket] = (lane, serial)
                bench.engine.submit(task, [(0, 1)], lane=lane)
        found = {}
        for result in bench.collect(4 * lanes):
            labels = [sample["label"] for _, sample in result.overflow.samples]
            assert len(labels) == result.rows
            assert result.spec == (spec if labels else None)
            found[tasks[result.ticket]] = labels
        for lane in range(lanes):
            first = 100 * lane
            assert [found[lane, serial] for serial in range(4)] == [
                [first, first + 1, first + 2], [first + 3, first + 4, first + 5], [first + 6], []
            ]  # fmt: skip

    # -- what comes instead of rows

    def test_the_first_sample_defines_the_spec_and_is_sent_itself(self, bench):
        bench = bench(Numbers())
        bench.engine.submit(bench.task([5, 6, 7]), [(0, 1)])
        [result] = bench.collect(1)
        assert result.spec == self.SPEC
        [(row, sample)] = result.overflow.samples
        assert (row, sample["label"], sample["x"].tolist()) == (0, 5, [[5] * 3] * 2)

    @pytest.mark.parametrize("fetch", ["each", "all"])
    def test_a_collate_fn_makes_the_batch_in_the_worker(self, bench, fetch):
        bench = bench(Batches(), fetch=fetch, collate=lambda samples: np.stack([each["x"] for each in samples]))
        bench.engine.submit(bench.task([4, 2]), [(0, 2)])
        [result] = bench.collect(1)
        made = result.parcel.open([]) if result.parcel is not None else result.value
        assert made[:, 0, 0].tolist() == [4, 2]

    def test_a_raw_task_brings_the_samples_and_not_what_collate_fn_makes(self, bench):
        bench = bench(Numbers(fail={2}), collate=len, keep_going=True)
        task = bench.task([4, 2, 3])
        task.raw = True
        bench.engine.submit(task, [(0, 3)])
        [result] = bench.collect(1)
        assert [(row, sample["label"]) for row, sample in result.overflow.samples] == [(0, 4), (2, 3)]
        assert [failure.row for failure in result.failures] == [1]

    # -- exceptions

    def test_an_exception_names_its_sample_and_ends_the_span(self, bench):
        bench = bench(Numbers(fail={6}))
        task = bench.task([5, 6, 7, 8], self.SPEC)
        bench.engine.submit(task, [(0, 4)])
        [result] = bench.collect(1)
        [failure] = result.failures
        assert (failure.row, failure.key, failure.source, failure.doing) == (1, 6, "number/6", "reading")
        assert (type(failure.error), str(failure.error)) == (LookupError, "no number 6")
        assert failure.summary == "LookupError: no number 6"
        assert failure.summary in failure.text
        assert "__getitem__" in failure.text

    def test_the_engine_goes_on_after_an_exception(self, bench):
        bench = bench(Numbers(fail={0}), num_workers=1)
        bench.engine.submit(bench.task([0], self.SPEC), [(0, 1)])
        good = bench.task([1, 2], self.SPEC)
        bench.engine.submit(good, [(0, 2)])
        assert [bool(each.failures) for each in bench.collect(2)] == [True, False]
        assert bench.rows(good, "label") == [1, 2]

    def test_under_a_policy_a_span_goes_on_after_a_failed_sample(self, bench):
        bench = bench(Numbers(fail={6, 8}), keep_going=True)
        task = bench.task([5, 6, 7, 8, 9], self.SPEC)
        bench.engine.submit(task, [(0, 5)])
        [result] = bench.collect(1)
        assert [(failure.row, failure.key) for failure in result.failures] == [(1, 6), (3, 8)]
        assert bench.rows(task, "label")[0::2] == [5, 7, 9]

    @pytest.mark.parametrize(
        "raised", [(StubbornError, 1, 2), (ValueError, lambda: 0)], ids=["cannot rebuild", "cannot pickle"]
    )
    def test_an_exception_that_cannot_be_sent_still_has_its_type_and_text(self, bench, raised):
        bench = bench(Raises(*raised))
        bench.engine.submit(bench.task([0]), [(0, 1)])
        [result] = bench.collect(1)
        [failure] = result.failures
        assert raised[0].__name__ in failure.summary
        assert failure.summary in failure.text

    def test_an_exception_in_the_collate_fn_is_reported_for_the_batch(self, bench):
        bench = bench(Numbers(), collate=lambda samples: samples["no"])
        bench.engine.submit(bench.task([4, 2]), [(0, 2)])
        [result] = bench.collect(1)
        [failure] = result.failures
        assert (failure.row, failure.doing, type(failure.error)) == (None, "collating", TypeError)

    def test_a_sample_that_cannot_be_a_row_is_reported_not_raised(self, bench):
        from loaders import Field

        bench = bench(Numbers(), fields={"boxes": Field(ragged=True)})
        bench.engine.submit(bench.task([4, 2]), [(0, 1)])
        [result] = bench.collect(1)
        [failure] = result.failures
        assert "'boxes'" in str(failure.error)

    # -- cancelling, closing, looking

    def test_a_cancelled_task_is_reported_and_not_read(self, bench, gate):
        gate.hold(0)
        bench = bench(Numbers(gate=gate), num_workers=1)
        first, unwanted, last = (bench.task([key, key + 1], self.SPEC) for key in (0, 10, 20))
        for task in (first, unwanted, last):
            bench.engine.submit(task, [(0, 2)])
        if self.has_workers:
            assert gate.entered(1) == [0]
        bench.engine.cancel(unwanted)
        gate.open()
        results = bench.collect(3)
        assert [(each.ticket, each.cancelled) for each in results] == [
            (first.ticket, False), (unwanted.ticket, True), (last.ticket, False)
        ]  # fmt: skip
        assert set(gate.entered(3 if self.has_workers else 4)) <= {0, 1, 20, 21}
        assert gate.is_quiet()

    def test_a_cancelled_batch_of_a_stream_is_not_read(self, bench, gate):
        gate.hold(0)
        bench = bench(Stream(9, gate), fetch="stream", batch_rows=3, num_workers=1)
        tasks = [task_of([serial]) for serial in range(3)]
        for task in tasks:
            bench.engine.submit(task, [(0, 1)])
        if self.has_workers:
            assert gate.entered(1) == [0]
        for task in tasks[1:]:
            bench.engine.cancel(task)
        gate.open()
        assert [each.cancelled for each in bench.collect(3)] == [False, True, True]
        assert gate.entered(2 if self.has_workers else 3)[-2:] == [1, 2]
        assert gate.is_quiet()

    def test_collect_with_a_timeout_of_zero_never_waits(self, bench, gate):
        gate.hold(0)
        bench = bench(Numbers(gate=gate))
        assert bench.engine.collect(0) == []
        task = bench.task([0, 1], self.SPEC)
        bench.engine.submit(task, [(0, 2)])
        if self.has_workers:
            assert gate.entered(1) == [0]
        assert bench.engine.collect(0) == []
        gate.open()
        assert len(bench.collect(1)) == 1

    def test_collect_returns_when_its_timeout_is_over(self, bench):
        began = time.monotonic()
        assert bench(Numbers()).engine.collect(0.05) == []
        assert time.monotonic() - began >= 0.04 or not self.has_workers

    def test_reading_names_the_row_that_is_being_read(self, bench, gate):
        gate.hold(8)
        bench = bench(Numbers(gate=gate))
        assert bench.engine.reading() == []
        task = bench.task([7, 8, 9], self.SPEC)
        bench.engine.submit(task, [(0, 3)])
        if self.has_workers:
            assert gate.entered(2) == [7, 8]
            [reading] = bench.engine.reading()
            assert (reading.ticket, reading.row) == (task.ticket, 1)
            assert reading.worker in (0, 1)
            assert 0 <= reading.since_s < PATIENCE_S
        gate.open()
        bench.collect(1)
        assert bench.engine.reading() == []

    def test_closing_twice_does_no_harm(self, bench):
        bench = bench(Numbers())
        bench.engine.submit(bench.task(range(4), self.SPEC), [(0, 4)])
        bench.collect(1)
        bench.engine.close()
        bench.engine.close()

    def test_closing_reads_no_more_of_what_is_queued(self, bench, gate):
        gate.hold(*range(64))
        bench = bench(Numbers(gate=gate))
        for _ in range(20):
            bench.engine.submit(bench.task(range(64), self.SPEC), [(row, row + 4) for row in range(0, 64, 4)])
        begun = gate.entered(2) if self.has_workers else []
        bench.engine.close()
        gate.open(len(begun))
        for thread in getattr(bench.engine, "_threads", ()):
            thread.join(PATIENCE_S)
        assert gate.is_quiet()

    def test_closing_frees_all_memory_except_the_slots(self, bench):
        bench = bench(Numbers())
        task = bench.task(range(4), self.SPEC)
        bench.engine.submit(task, [(0, 4)])
        bench.engine.submit(bench.task(range(4), self.SPEC), [(0, 4)])
        bench.engine.close()
        bench.pool.trim()
        assert bench.pool.arena.reserved_nbytes == 2 * sum(nbytes for _, nbytes in task.blocks)

    # -- randomness and identity

    def test_what_samples_draw_depends_on_their_position_alone(self, bench):
        bench = bench(Draws())
        task = bench.task(list(range(20)), BatchSpec.from_sample({"index": 0, "draws": np.zeros(4)}), position=100)
        bench.engine.submit(task, [(row, row + 3) for row in range(0, 18, 3)] + [(18, 20)])
        bench.collect(7)
        assert bench.rows(task, "draws") == [expected_draws(100 + row) for row in range(20)]

    def test_workers_start_with_their_number_and_may_change_their_dataset(self, bench):
        bench = bench(Labelled(), init=relabel)
        task = bench.task(range(4), BatchSpec.from_sample(0))
        bench.engine.submit(task, [(row, row + 1) for row in range(4)])
        bench.collect(4)
        [(offset, _)] = task.blocks
        labels = task.spec.fields[0].values(bench.pool.arena.buffer, offset, 4)
        assert set(labels.tolist()) <= ({1000, 1001} if self.has_workers else {-1})

    def test_slots_keep_their_state(self, bench):
        bench = bench(Numbers())
        slot = bench.pool.acquire(self.SPEC.sizes(4))
        task = task_of(range(4), self.SPEC, [(block.offset, block.nbytes) for block in slot])
        bench.engine.submit(task, [(0, 4)])
        bench.collect(1)
        bench.engine.close()
        assert {block.state for block in slot} == {BlockState.FILLING}


class WorkersContract(EngineContract):
    """What engines with workers promise in addition."""

    has_workers = True

    def test_a_span_under_way_ends_at_its_next_row_when_it_is_cancelled(self, bench, gate):
        gate.hold(0)
        bench = bench(Numbers(gate=gate), num_workers=1)
        task = bench.task([0, 1, 2], self.SPEC)
        bench.engine.submit(task, [(0, 3)])
        assert gate.entered(1) == [0]
        bench.engine.cancel(task)
        gate.open()
        [result] = bench.collect(1)
        assert result.cancelled
        assert gate.is_quiet()

    def test_workers_that_wait_for_each_other_in_their_first_sample_each_have_one(self, bench):
        """The spec is not known yet: each worker returns its own sample and the spec derived from that."""
        bench = bench(Met())
        task = bench.task([5, 6, 7])
        bench.engine.submit(task, [(0, 1), (1, 2)])
        results = sorted(bench.collect(2), key=lambda result: result.start)
        assert [result.overflow.samples for result in results] == [[(0, 5)], [(1, 6)]]
        assert [result.spec for result in results] == [BatchSpec.from_sample(0)] * 2

    def test_closing_by_force_waits_for_no_sample(self, bench, gate, monkeypatch):
        gate.hold(0)
        bench = bench(Numbers(gate=gate))
        for module in ("threads", "supervisor"):
            monkeypatch.setattr(f"loaders.workers.{module}._GRACE_S", 1000.0)
        bench.engine.submit(bench.task([0, 1], self.SPEC), [(0, 2)])
        assert gate.entered(1) == [0]
        bench.engine.close(force=True)
        gate.open()

    def test_a_transform_installed_by_the_init_function_is_keyed_too(self, bench):
        bench = bench(Labelled(), init=install_noise)
        task = bench.task(range(3), BatchSpec.from_sample(0.0), position=5)
        bench.engine.submit(task, [(0, 3)])
        bench.collect(1)
        labels = task.spec.fields[0].values(bench.pool.arena.buffer, task.blocks[0][0], 3)
        assert labels.tolist() == [expected_draws(position)[2] for position in (5, 6, 7)]

    def test_an_init_function_that_fails_is_reported_with_every_span(self, bench):
        bench = bench(Numbers(), init=refuse)
        task = bench.task(range(4), self.SPEC)
        bench.engine.submit(task, [(0, 2), (2, 4)])
        for result in bench.collect(2):
            [failure] = result.failures
            assert (failure.row, failure.doing, str(failure.error)) == (None, "starting", "not today")


class Met:
    """Samples that are their keys; reading one waits until another is being read."""

    def __init__(self):
        self.barrier = multiprocessing.get_context("fork").Barrier(2)

    def __getitem__(self, index):
        self.barrier.wait(PATIENCE_S)
        return index


class Labelled:
    label = 0
    transform = None

    def __getitem__(self, index):
        info = worker_info()
        return -1 if info is None else self.transform()[0] if self.transform else self.label


def relabel(number):
    info = worker_info()
    assert (info.id, info.num_workers, info.seed) == (number, 2, 7 + number)
    info.dataset.label = 1000 + number


def install_noise(number):
    from support.numpy_datasets import Noise

    worker_info().dataset.transform = Noise()


def refuse(number):
    raise RuntimeError("not today")


def expected_draws(position):
    """What `Draws` gives at a position of the epoch, from the definition of the keys."""
    sample, transform = KeyedGenerator(), KeyedGenerator()
    rng = sample.rekey(Domain.SAMPLE, SEED, EPOCH, position)
    own = transform.rekey(Domain.TRANSFORM, SEED, EPOCH, position)
    transform.python.seed(own.bit_generator.random_raw())
    return [rng.random(), rng.random(), own.random(), transform.python.random()]
