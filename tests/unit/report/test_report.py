"""Loaders with a planted bottleneck. Delays are the subject here; every margin is several times what is measured."""

import io
import json
import time
from collections import deque

import cv2
import numpy as np
import pytest
from rich.console import Console
from support.simulated_device import SimulatedDevice, SimulatedStreams
from torch.utils.data import IterableDataset

import loaders
from loaders import ArrayDataset, DataLoader, DevicePrefetcher, ImageFolder
from loaders.report.report import Report

# torch warns of more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

THREADS = {"worker_method": "thread", "num_workers": 2}


class Slow:
    """Samples that take a while, in a stage of their own."""

    def __init__(self, length=48, seconds=0.004, stage=None, slow=()):
        self.length, self.seconds, self.stage, self.slow = length, seconds, stage, slow

    def __len__(self):
        return self.length

    def describe(self, index):
        return f"number {index}"

    def __getitem__(self, index):
        seconds = 0.1 if index in self.slow else self.seconds
        if self.stage is None:
            time.sleep(seconds)
        else:
            with loaders.stage(self.stage):
                time.sleep(seconds)
        return {"image": np.full((64, 64, 3), index, np.uint8), "label": index}


def run(loader, compute_s=0.0):
    for _ in loader:
        time.sleep(compute_s)
    return loader.report()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("stage", "named"),
    [("read", "reading"), ("decode", "decoding"), ("augment", "augmentation"), (None, "the dataset's own code")],
)
def test_a_slow_stage_is_named(stage, named, workers):
    report = run(DataLoader(Slow(stage=stage), 4, num_workers=workers, worker_method="thread"))
    assert f": {named} limits (" in report.verdict
    assert "would bring it to about" in report.verdict  # it sleeps: there are cores for more workers
    assert report.waiting_share > 0.3
    assert report.service_s >= 0.004  # which it sleeps; how much longer it takes depends on the machine
    assert sum(report.stages_s.values()) == pytest.approx(report.service_s)
    assert report.stages_s[stage or "sample"] > 0.6 * report.service_s


def test_a_slow_transform_counts_as_augmentation_and_a_slow_collate_fn_as_itself():
    def transform(sample):
        time.sleep(0.004)
        return sample

    dataset = ArrayDataset({"image": np.zeros((48, 8, 8), np.uint8)}, transform)
    assert ": augmentation limits (" in run(DataLoader(dataset, 4, **THREADS)).verdict

    def collate(samples):
        time.sleep(0.01)
        return len(samples)

    dataset = ArrayDataset({"image": np.zeros((64, 8, 8), np.uint8)})
    assert ": collate_fn limits (" in run(DataLoader(dataset, 4, collate_fn=collate, **THREADS)).verdict


class Batches(Slow):
    def __getitems__(self, keys):
        return [self[key] for key in keys]


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return (self.samples[number] for number in range(len(self.samples)))


@pytest.mark.parametrize(
    "dataset", [Batches(30, stage="decode"), Stream(Slow(30, stage="decode"))], ids=["all", "stream"]
)
def test_batches_and_streams_are_looked_at_as_a_whole(dataset):
    report = run(DataLoader(dataset, 4, num_workers=1, worker_method="thread"))
    assert ": decoding limits (" in report.verdict
    assert sum(each.samples for each in report.workers) == 30
    assert report.slowest == ()


def test_a_slow_model_is_no_fault_of_the_loader():
    report = run(DataLoader(Slow(64, 0.0), 4, worker_method="thread", num_workers=4), compute_s=0.01)
    assert "times as fast as the model; 1 worker would do" in report.verdict
    assert report.compute_s > 0.5 * report.window_s


def test_too_few_slots_are_told_from_too_few_workers():
    batch_nbytes = 4 * 64 * 64 * 3
    loader = DataLoader(Slow(80, 0.003), 4, max_buffer_bytes=3 * (batch_nbytes + 4096), **THREADS)
    held = deque(maxlen=2)
    for batch in loader:
        held.append(batch)
        time.sleep(0.008)
    report = loader.report()
    assert "memory for batches limits" in report.verdict
    assert report.short > report.batches // 2
    assert report.held_batches == 2
    assert report.held_nbytes >= 2 * batch_nbytes


def test_a_sample_that_stalls_the_others_is_named():
    report = run(DataLoader(Slow(96, 0.002, slow=(37, 70)), 4, prefetch_factor=1, **THREADS), compute_s=0.003)
    assert {each.index for each in report.slowest[:2]} == {37, 70}
    assert report.slowest[0].source in ("number 37", "number 70")
    assert report.slowest[0].seconds == pytest.approx(0.1, rel=0.9)


class SlowCopies(SimulatedStreams):
    """A copy of a batch takes 32 ms; what the loop gives the device takes 1 ms."""

    def record_event(self):
        event = super().record_event()

        class Late:
            def query(self):
                return event.reached

            def synchronize(self):
                time.sleep(0.032)
                event.synchronize()

            reached = property(lambda self: event.reached)

        late = Late()
        self.events = {**getattr(self, "events", {}), id(late): event}
        self.kept = [*getattr(self, "kept", []), late]
        return late

    def compute_waits_for(self, event):
        super().compute_waits_for(self.events[id(event)])

    def stamp(self, *, side):
        return "side" if side else "compute"

    def between_s(self, before, after):
        return 0.032 if after == "side" else 0.001


def test_a_slow_transfer_is_told_from_a_slow_model():
    loader = DataLoader(Slow(60, 0.0), 4, **THREADS)
    prefetcher = DevicePrefetcher(loader, "cpu")
    device = SimulatedDevice(seed=0)
    device.let_work_run = device._settle_freed  # nothing is done before somebody waits for it
    prefetcher._streams = SlowCopies(device)
    nbytes = sum(batch["image"].nbytes + batch["label"].nbytes for batch in prefetcher)
    report = prefetcher.report()
    assert report.verdict.startswith("copying to the device limits: 49.2 kB a batch take 32 ms")
    assert report.transfer.nbytes == nbytes
    assert report.transfer.wait_s > 0.6 * report.window_s
    assert report.compute_s < 0.3 * report.window_s


# -- the numbers


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "a").mkdir()
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), (200, 200))
    for number in range(40):
        cv2.imwrite(str(root / "a" / f"{number}.jpg"), picture)
    return root


def test_worker_processes_send_what_they_measure(photos):
    loader = DataLoader(ImageFolder(photos), 4, num_workers=2)
    batches = list(loader)
    report = loader.report()
    files = sum(path.stat().st_size for path in photos.rglob("*.*"))
    assert report.read_nbytes == pytest.approx(files, rel=0.5)
    assert report.written_nbytes == sum(each["image"].nbytes + each["label"].nbytes for each in batches)
    assert sum(each.samples for each in report.workers) == 40
    assert {"read", "decode", "write"} <= set(report.stages_s)
    assert report.slowest[0].source.startswith(str(photos))
    assert report.held_batches == len(batches)
    assert report.finished
    assert report.samples == 36  # those of the first batch do not count


def test_a_report_counts_what_overflowed_and_what_was_skipped():
    class Odd(Slow):
        def __getitem__(self, index):
            if index == 5:
                raise OSError("gone")
            return {"x": np.zeros(8 if index != 3 else 20, np.uint8)}

    loader = DataLoader(Odd(16), 4, on_error="skip", fields={"x": loaders.Field(pad=0)})
    list(loader)
    report = loader.report()
    assert report.overflow_nbytes == 20
    assert [(each.index, each.source) for each in report.skipped] == [(5, "number 5")]


def test_a_report_may_be_asked_for_at_any_time():
    loader = DataLoader(Slow(40, 0.0), 4)
    assert isinstance(loader.report(), Report)
    assert loader.report().verdict.startswith("too few batches")
    for number, _ in enumerate(loader):
        report = loader.report()
        assert (report.batches, report.finished) == (number, False)
        parts = report.wait_s + report.slot_s + report.deliver_s + report.compute_s
        assert parts == pytest.approx(report.window_s, rel=0.05, abs=1e-4)
    assert loader.report().epoch == 0
    next(iter(loader))
    assert (loader.report().epoch, loader.report().batches) == (1, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_error_and_the_end_leave_a_report():
    class Fails(Slow):
        def __getitem__(self, index):
            if index == 21:
                raise KeyError(index)
            return super().__getitem__(index)

    loader = DataLoader(Fails(40, 0.001), 4, **THREADS)
    with pytest.raises(KeyError):
        list(loader)
    assert loader.report().batches == 4


def test_a_report_is_text_a_page_a_table_and_plain_numbers(photos):
    loader = DataLoader(ImageFolder(photos), 4, num_workers=2, worker_method="thread")
    report = run(loader)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    page = console.export_text()
    for text in (str(report), page, report._repr_html_()):
        assert "waits for data" in text
        assert "decode" in text
        assert "written into batches" in text
    assert report.verdict in str(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["verdict"] == report.verdict
    assert plain["slowest"][0]["source"] == report.slowest[0].source
    assert plain["workers"][1]["number"] == 1


def test_what_happens_after_a_loop_was_left_does_not_count():
    loader = DataLoader([np.zeros(4, np.uint8)] * 100, 4)
    for step, _ in enumerate(loader):
        if step == 10:
            break
    before = loader.report()
    deadline = time.perf_counter() + 0.05
    while time.perf_counter() < deadline:
        pass
    assert loader.report().window_s == before.window_s
    assert not before.finished
    list(loader)
    assert loader.report().finished
