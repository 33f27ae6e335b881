"""The verdict's arithmetic: numbers in, one sentence out."""

import pytest

from loaders.report.report import Report, SlowSample, TransferReport
from loaders.report.verdict import needed_workers, predicted_share, room_for_workers, waiting_share

# 100 batches of 10 samples in 10 s: a batch each 100 ms.
USUAL = {
    "batches": 100,
    "samples": 1000,
    "window_s": 10.0,
    "num_workers": 2,
    "worker_method": "process",
    "cores": 16.0,
    "cores_busy": 2.5,
    "cpu_share": 1.0,
    "depth": 3,
}
DECODES = {"read": 0.002, "decode": 0.014, "augment": 0.003, "write": 0.001}


def saturated(workers=2, compute_s=6.2, **changes):
    """The loop computes for 62 ms a batch and waits for the rest of 100 ms; the workers never rest."""
    service_s = workers * 10.0 / 1000
    scale = service_s / sum(DECODES.values())
    numbers = {
        "num_workers": workers,
        "wait_s": 10.0 - compute_s,
        "compute_s": compute_s,
        "occupancy": 0.99,
        "service_s": service_s,
        "stages_s": {name: share * scale for name, share in DECODES.items()},
    }
    return Report(**{**USUAL, **numbers, **changes})


def fed(**changes):
    """The loop never waits."""
    numbers = {"wait_s": 0.01, "compute_s": 9.9, "deliver_s": 0.09, "occupancy": 0.5, "service_s": 0.01}
    return Report(**{**USUAL, **numbers, "stages_s": DECODES, **changes})


def test_workers_that_never_rest_limit_and_the_cure_is_counted():
    report = saturated(workers=7)
    assert needed_workers(report) == pytest.approx(7 / 0.62)
    assert report.verdict == (
        "the model waits 38 % of the time: decoding limits (70 % of the workers' time); "
        "5 workers more would bring it to about 0 %."
    )


def test_the_prediction_is_bounded_by_the_cores():
    report = saturated(workers=7, cores=12, cores_busy=8)
    assert room_for_workers(report) == 4
    assert predicted_share(report, 11) == pytest.approx(1 - 11 * 0.62 / 7)
    assert "4 workers more, as many as there are cores for (12), would bring it to about 3 %" in report.verdict


def test_workers_that_wait_for_a_disk_take_less_than_a_core_each():
    assert room_for_workers(saturated(cores=4, cores_busy=3, cpu_share=0.1)) == 10


@pytest.mark.parametrize(
    ("stage", "named", "remedy"),
    [
        ("read", "reading limits", "faster disk"),
        ("decode", "decoding limits", "crop="),
        ("augment", "augmentation limits", "on the device|to the device"),
        ("collate", "collate_fn limits", "without a collate_fn"),
        ("write", "writing into the batch limits", "uint8"),
        ("sample", "the dataset's own code limits", "loaders.stage"),
    ],
)
def test_where_all_cores_are_busy_the_stage_is_what_can_change(stage, named, remedy):
    import re

    verdict = saturated(stages_s={"write": 0.004, stage: 0.016}, cores=2, cores_busy=2.0).verdict
    assert named in verdict
    assert "all 2 cores are busy" in verdict
    assert re.search(remedy, verdict)


def test_without_workers_their_number_is_told():
    report = saturated(workers=1, compute_s=4.0)
    alone = Report(**{**vars(report), "num_workers": 0, "occupancy": 0.6, "service_s": 0.006, "cores_busy": 1.0})
    assert "num_workers=2 would bring it to about 0 %" in alone.verdict


def test_a_loader_with_workers_to_spare_says_how_many_do():
    verdict = fed(num_workers=8, occupancy=1 / 3).verdict
    assert verdict == "the model never waits: the loader is 3.0 times as fast as the model; 4 workers would do."
    assert "the model limits" in fed(num_workers=2, occupancy=0.9).verdict


def test_too_little_memory_is_told_from_too_few_workers():
    verdict = saturated(occupancy=0.4, short=60, held_batches=9, held_nbytes=9e8, ceiling_nbytes=1e9).verdict
    assert "memory for batches limits" in verdict
    assert "9 batches are held (900.0 MB), and all may take 1.0 GB" in verdict


def test_too_few_open_batches_are_told_from_too_little_memory():
    assert "raise prefetch_factor, so that more than 3 are" in saturated(occupancy=0.6).verdict


def test_workers_that_have_work_and_do_not_get_to_it_have_no_cores():
    assert "other programs take the cores" in saturated(occupancy=0.6, worked_s=3.0).verdict


def test_one_slow_sample_is_named():
    slow = (SlowSample(4711, "train/cat/4711.jpg", 2.0),)
    verdict = saturated(occupancy=0.6, slowest=slow).verdict
    assert 'sample 4711 ("train/cat/4711.jpg") took 2.00 s' in verdict


def test_threads_that_share_one_core_hold_the_gil():
    report = saturated(workers=4, worker_method="thread", cpu_share=0.26)
    assert "hold the GIL" in report.verdict
    assert "hold the GIL" not in saturated(workers=4, cpu_share=0.26).verdict


def test_a_device_that_copies_longer_than_it_computes_is_limited_by_copies():
    copies = TransferReport(100, 10_000_000_000, copy_s=0.095, compute_s=0.030)
    verdict = fed(transfer=copies, wait_s=0.0, compute_s=1.0).verdict
    assert "copying to the device limits: 100.0 MB a batch take 95 ms of 100 ms, 1.1 GB/s" in verdict
    quick = TransferReport(100, 10_000_000_000, copy_s=0.010, compute_s=0.095)
    assert "copying" not in fed(transfer=quick).verdict


def test_a_host_that_waits_while_the_device_computes_is_no_waiting_model():
    # The loop hands the device 90 ms of work in 5 ms, then waits 85 ms for the next batch: the device hardly rests.
    work = TransferReport(100, 1_000_000, copy_s=0.001, compute_s=0.090)
    assert waiting_share(saturated(compute_s=0.5, transfer=work)) == pytest.approx(0.1)


def test_copies_that_block_the_host_limit():
    verdict = fed(transfer=TransferReport(100, 1_000_000_000, enqueue_s=6.0), compute_s=3.8).verdict
    assert "copying to the device limits: 10.0 MB a batch take 60 ms" in verdict


def test_a_few_batches_say_nothing():
    assert Report(batches=2, window_s=0.1).verdict == "too few batches to tell: 2 so far, not counting the first."
    assert Report().verdict.startswith("too few batches")


@pytest.mark.parametrize("cores", [1.0, 4.0])
@pytest.mark.parametrize("waits", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("occupancy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("workers", [0, 1, 9])
def test_there_is_always_a_verdict(cores, waits, occupancy, workers):
    report = Report(
        **{**USUAL, "cores": cores, "num_workers": workers, "wait_s": 10 * waits, "compute_s": 10 * (1 - waits)},
        occupancy=occupancy,
        service_s=occupancy * workers / 100,
    )
    assert report.verdict.startswith("the model ")
    assert report.verdict.endswith(".")
