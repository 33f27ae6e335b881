"""What is timed: warmed-up runs, by the clock of where they run."""

from __future__ import annotations

import itertools

import pytest
import torch

from loaders.device import event_timing
from loaders.device.event_timing import transfer_time
from loaders.errors import DeviceError


def test_on_the_cpu_each_run_is_timed_by_the_performance_counter_after_warming_up(monkeypatch):
    now = [0.0]
    lasts = itertools.chain([9.0, 9.0], [3.0, 1.0, 2.0, 10.0])  # two of warm-up

    def fn():
        now[0] += next(lasts)

    monkeypatch.setattr(event_timing.time, "perf_counter", lambda: now[0])
    measured = transfer_time(fn, device="cpu", warm_up=2, runs=4, nbytes=5_000_000_000)
    assert measured == (2.5, 1.0, 10.0, (3.0, 1.0, 2.0, 10.0), 5_000_000_000)
    assert measured.gb_per_s == 2.0


def test_without_an_accelerator_the_cpu_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    calls = []
    measured = transfer_time(lambda: calls.append(1))
    assert len(calls) == 23
    assert len(measured.times_s) == 20
    assert 0 < measured.fastest_s <= measured.median_s <= measured.slowest_s
    with pytest.raises(ValueError, match="nbytes is unknown"):
        _ = measured.gb_per_s


def test_on_an_accelerator_events_on_its_current_stream_enclose_each_run(monkeypatch):
    trace = []

    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self, stream):
            trace.append(f"record on {stream}")

        def synchronize(self):
            trace.append("wait")

        def elapsed_time(self, end):
            return 4.0  # ms

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"{device}'s stream")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: trace.append("idle"))
    measured = transfer_time(lambda: trace.append("fn"), warm_up=1, runs=2)
    assert trace == ["idle", "record on cuda's stream", "fn", "record on cuda's stream", "wait"] * 3
    assert measured.times_s == (0.004, 0.004)


def test_a_device_that_torch_cannot_use_is_named():
    with pytest.raises(DeviceError, match="device 'meta' cannot time what it runs"):
        transfer_time(print, device="meta")


@pytest.mark.parametrize(("runs", "warm_up"), [(0, 1), (1, -1)])
def test_numbers_of_runs_that_make_no_sense_are_refused(runs, warm_up):
    with pytest.raises(ValueError, match=f"runs={runs}, warm_up={warm_up}: expected at least 1 and 0"):
        transfer_time(print, device="cpu", runs=runs, warm_up=warm_up)


def test_an_error_of_the_function_comes_as_it_is():
    with pytest.raises(ZeroDivisionError):
        transfer_time(lambda: 1 / 0, device="cpu")
