"""`measure`: what a pass counts, and what it leaves out."""

import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from loaders import ArrayDataset, DataLoader, DatasetError
from loaders.benchmark import Measurement, Pass, Spread, measure, measurement
from loaders.benchmark.alone import Alone
from loaders.benchmark.tables import terminal_table


@pytest.fixture
def dataset():
    return ArrayDataset(
        {"image": np.arange(240, dtype=np.uint8).reshape(20, 2, 2, 3), "label": np.arange(20)}, writable
    )


def writable(sample):
    return {**sample, "image": sample["image"].copy()}


class Clock:
    """Stands for time.perf_counter: goes on by itself by nothing, and by what batches take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def batches(self, *taken_s, rows=10):
        """An iterable whose batches take so long; of (rows, 100) bytes."""
        clock = self

        class Batches:
            def __iter__(self):
                for seconds in taken_s:
                    clock.now += seconds
                    yield np.zeros((rows, 100), np.uint8)

        return Batches()


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(measurement.time, "perf_counter", found)
    return found


# -- what a pass counts


def test_the_rate_is_that_of_the_batches_behind_the_lead_in(clock):
    # The first quarter, and the wait for the first batch, are not counted: 6 batches of 10 in 0.6 s.
    (one,) = measure(clock.batches(5, 0.3, *[0.1] * 6), rounds=1, seconds=60).passes
    assert one.samples_per_s == pytest.approx(5 * 10 / 0.5)
    assert one.gb_per_s == pytest.approx(one.samples_per_s * 100 / 1e9)
    assert (one.batches, one.samples, one.nbytes) == (8, 80, 8000)


def test_the_first_batch_is_that_of_the_first_pass(clock):
    taken = iter([3.0, 1.0, 2.0])

    class Slower:
        def __iter__(self):
            yield from clock.batches(next(taken), 0.1)

    found = measure(Slower(), rounds=2, seconds=60)
    assert found.first_batch.median == pytest.approx(3)
    assert [one.first_batch_s for one in found.passes] == pytest.approx([1, 2])


def test_the_turn_of_the_epoch_is_from_its_last_batch_to_the_next_first_one(clock):
    class EndsSlowly:
        def __iter__(self):
            yield from clock.batches(0.5, 0.1)
            clock.now += 2  # workers are stopped

    (one,) = measure(EndsSlowly(), rounds=1, seconds=60).passes
    assert one.turn_s == pytest.approx(2.5)


def test_a_pass_that_was_cut_off_has_no_turn(clock):
    endless = clock.batches(*[0.1] * 1000)
    found = measure(endless, rounds=2, seconds=1)
    assert found.turn_s is None
    assert found.passes[0].batches == 25  # more than a second's, so that what was ready at first is not all


def test_an_epoch_of_two_dozen_batches_ends_by_itself_however_slow(clock):
    assert measure(clock.batches(*[0.1] * 24), rounds=1, seconds=1).turn_s is not None


def test_slow_batches_end_a_pass_before_there_are_many(clock):
    found = measure(clock.batches(*[5.0] * 1000), rounds=1, seconds=1)
    assert found.passes[0].batches == 4


def test_what_is_done_with_each_batch_takes_its_time(clock):
    def step(batch):
        clock.now += 0.9

    found = measure(clock.batches(*[0.1] * 8), rounds=1, seconds=60, each=step)
    assert found.samples_per_s.median == pytest.approx(10)


def test_rounds_give_a_median_and_quartiles():
    assert Spread.of([4, 1, 2, 3, 100]) == (3, 2, 4)
    assert Spread.of([7]) == (7, 7, 7)


# -- what can be measured


@pytest.mark.parametrize("loader", [DataLoader, torch.utils.data.DataLoader])
def test_our_loader_and_torchs_are_measured_alike(loader, dataset):
    found = measure(loader(dataset, batch_size=8), rounds=2, seconds=0.2)
    assert found.name == "DataLoader"
    assert [one.samples for one in found.passes] == [20, 20]
    assert [one.nbytes for one in found.passes] == [20 * (12 + 8)] * 2
    assert found.turn_s is not None


def test_workers_count_for_cpu_and_memory(dataset):
    found = measure(DataLoader(dataset, batch_size=2, num_workers=1), rounds=1, seconds=0.2)
    assert found.memory_nbytes > 1_000_000  # of a process of its own
    assert found.cpu_cores.median > 0


def test_a_dataset_is_read_sample_by_sample_under_their_keys(dataset):
    from loaders import sample_rng

    drawn = []

    class Draws(ArrayDataset):
        def __getitem__(self, index):
            drawn.append(float(sample_rng().random()))
            return super().__getitem__(index)

    found = measure(Draws({"image": np.zeros((5, 3), np.uint8)}), rounds=1, seconds=0.2)
    assert found.passes[0].samples == 5
    assert len(set(drawn)) == 10
    again = [float(sample_rng().random()) for _ in Alone(Draws({"image": np.zeros((5, 3), np.uint8)}))]
    assert drawn[10:15] == drawn[:5]
    assert len(again) == 5


def test_single_samples_of_a_loader_without_batches_are_counted_as_such(dataset):
    found = measure(DataLoader(dataset, batch_size=None), rounds=1, seconds=0.2)
    assert found.passes[0].samples == 20


def test_what_gives_no_batch_is_refused():
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(DatasetError, match="Empty gave not one batch"):
        measure(Empty())


@pytest.mark.parametrize(
    ("loader", "message"), [(itertools.count(), "only once"), (object(), "neither __iter__ nor __getitem__")]
)
def test_what_cannot_be_iterated_again_is_refused(loader, message):
    with pytest.raises(TypeError, match=message):
        measure(loader)


def test_no_rounds_are_refused(dataset):
    with pytest.raises(ValueError, match="rounds=0"):
        measure(dataset, rounds=0)


def test_measuring_imports_no_torch():
    # Peers are measured in environments that have none.
    script = "import sys, loaders.benchmark; print('measure', {'torch', 'cv2', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "measure set()\n"


# -- what is kept


def measured(rate, name="a loader"):
    one = Pass(10, 100, 1000, rate, rate / 1e6, 0.01, None, 1.5)
    return Measurement(name, Spread.of([0.1]), 2_000_000, (one,))


def test_a_measurement_goes_through_json_and_back():
    found = measured(100.0)
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_rounds_of_several_processes_become_one_measurement():
    found = Measurement.merged([measured(100.0), measured(300.0), measured(200.0)])
    assert found.samples_per_s == (200, 150, 250)
    assert len(found.passes) == 3


def test_it_prints_as_a_table():
    header, line = str(measured(1234.6)).splitlines()
    assert header.split()[:2] == ["samples/s", "GB/s"]
    assert line.split()[:3] == ["a", "loader", "1,235"]


def test_the_table_fits_a_terminal_of_80_columns():
    found = Measurement.merged([measured(13_426.0, "loaders, 2 processes"), measured(12_000.0)])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table([found], {"loaders, 2 processes": Spread(1.71, 1.6, 1.8)}))
    assert console.export_text().splitlines()[-1].split() == [
        *("loaders,", "2", "processes", "12,713", "±3%", "0.01", "100.0", "ms", "1.5", "2", "MB", "1.71", "±6%")
    ]
