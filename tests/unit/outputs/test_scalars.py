"""Means come when they have arrived, are those of the steps they are said to be of, and cost no wait."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, SimulatedEvent, SimulatedReadback

from loaders import ScalarLog
from loaders.outputs import scalars as scalars_module
from loaders.outputs.scalars import _Sums


class Simulation(SimulatedReadback):
    """Takes tensors of the host for those of a device, and notes what it is asked for."""

    def __init__(self, seed):
        super().__init__(SimulatedDevice(seed))
        self.calls = []

    def wait_for_compute(self):
        self.calls.append("wait")
        super().wait_for_compute()

    def copy(self, source, target):
        self.calls.append("copy")
        super().copy(source, target)

    def record_event(self):
        self.calls.append("event")
        return super().record_event()


@pytest.fixture
def simulate(monkeypatch):
    def simulate(seed):
        simulation = Simulation(seed)
        monkeypatch.setattr(scalars_module, "_is_on_host", lambda value: False)
        monkeypatch.setattr(scalars_module, "readback_of", lambda tensor: simulation)
        return simulation

    return simulate


# -- on the host


def test_means_come_every_so_many_steps_weighted_by_their_samples():
    log = ScalarLog(every=2)
    assert log.add({"loss": torch.tensor(1.0, requires_grad=True), "right": 1}, weight=32) is None
    assert log.add({"loss": torch.tensor([4.0]), "right": np.float32(0.25)}, weight=np.int64(16)) == {
        "loss": 2.0,
        "right": 0.75,
    }
    assert log.add({"loss": 5}) is None
    assert log.flush() == {"loss": 5.0}
    assert log.flush() is None


def test_names_may_differ_from_step_to_step():
    log = ScalarLog(every=3)
    log.add({"loss": 1.0})
    log.add({"loss": 3.0, "auxiliary": torch.tensor(7, dtype=torch.int16)})
    assert log.add({"other": True}) == {"loss": 2.0, "auxiliary": 7.0, "other": 1.0}
    assert log.add({}) is None
    assert log.flush() is None


def test_half_precision_is_summed_in_double():
    log = ScalarLog(every=5000)
    for _ in range(4999):
        log.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert log.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)}) == {"loss": 1.0}


def test_a_weight_of_nothing_makes_no_mean():
    means = ScalarLog(every=1).add({"loss": 3.0}, weight=0)
    assert math.isnan(means["loss"])


@pytest.mark.parametrize(
    ("scalars", "weight", "error", "says"),
    [
        ({"loss": torch.ones(2)}, 1, ValueError, r'"loss" is a float32 tensor of shape \(2,\): expected one'),
        ({"loss": torch.ones(0)}, 1, ValueError, r"of shape \(0,\)"),
        ({"loss": torch.tensor(1j)}, 1, ValueError, r"is a complex64 tensor of shape \(\)"),
        ({"loss": "low"}, 1, TypeError, '"loss" is of type str'),
        ({"loss": None}, 1, TypeError, '"loss" is of type NoneType'),
        ({"loss": 1.0}, torch.tensor(3), TypeError, "weight of type Tensor"),
        ({"loss": 1.0}, -1, ValueError, "weight=-1: expected 0 or more"),
        ({"loss": 1.0}, math.nan, ValueError, "weight=nan"),
    ],
)
def test_what_is_no_scalar_is_refused_and_leaves_the_log_as_it_was(scalars, weight, error, says):
    log = ScalarLog()
    log.add({"loss": 1.0})
    with pytest.raises(error, match=says):
        log.add({"fine": 2.0, **scalars}, weight)
    assert log.flush() == {"loss": 1.0}


@pytest.mark.parametrize("every", [0, -3, 1.5])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="expected how many steps make one mean"):
        ScalarLog(every)


# -- on a device


@pytest.mark.parametrize("seed", range(20))
def test_every_mean_is_returned_once_in_order_and_right(simulate, seed):
    simulate(seed)
    choose = random.Random(seed)
    every = choose.randint(1, 5)
    log = ScalarLog(every)
    told, steps = [], []
    for step in range(300):
        steps.append((float(step), choose.randint(1, 9)))
        with torch.inference_mode(choose.random() < 0.5):
            value = torch.tensor(float(step), requires_grad=choose.random() < 0.5)
            told.append(log.add({"step": value, "host": step}, steps[-1][1]))
    told = [means for means in told if means is not None]
    rest = log.flush()

    def mean(steps):
        return sum(value * weight for value, weight in steps) / sum(weight for _, weight in steps)

    for number, means in enumerate(told):
        expected = mean(steps[number * every : (number + 1) * every])
        assert means == {"step": pytest.approx(expected), "host": pytest.approx(expected)}
    returned = len(told) * every
    assert (rest is None) == (returned == 300)
    if rest is not None:
        assert rest["step"] == pytest.approx(mean(steps[returned:]))
    assert log.flush() is None


@pytest.mark.parametrize("seed", range(5))
def test_means_read_before_their_copy_has_arrived_are_wrong(simulate, monkeypatch, seed):
    simulate(seed)
    monkeypatch.setattr(_Sums, "is_there", lambda sums: True)
    arrive = _Sums._arrive

    def at_once(sums):
        sums._arriving = [(names, source, host, None) for names, source, host, _ in sums._arriving]
        arrive(sums)

    monkeypatch.setattr(_Sums, "_arrive", at_once)
    log = ScalarLog(every=1)
    told = [log.add({"step": torch.tensor(float(step))}) for step in range(50)]
    assert told != [{"step": float(step)} for step in range(50)]


def test_steps_wait_for_nothing(simulate, monkeypatch):
    waits = []
    synchronize = SimulatedEvent.synchronize
    monkeypatch.setattr(SimulatedEvent, "synchronize", lambda event: waits.append(event.reached) or synchronize(event))
    monkeypatch.setattr(SimulatedDevice, "let_work_run", lambda device: None)  # but for what is waited for
    simulate(0)
    log = ScalarLog(every=2)
    assert [log.add({"step": torch.tensor(float(step))}) for step in range(10)] == [None] * 10
    assert waits == []
    assert log.flush() == {"step": 4.5}


def test_there_is_one_copy_in_every_so_many_steps_behind_the_compute_stream(simulate):
    simulation = simulate(0)
    log = ScalarLog(every=10)
    for step in range(30):
        log.add({"a": torch.tensor(1.0 * step), "b": torch.tensor([2.0]), "c": 3.0})
        assert simulation.calls == ["wait", "copy", "event"] * ((step + 1) // 10)
    log.flush()
    assert simulation.calls == ["wait", "copy", "event"] * 3


def test_a_device_is_not_asked_for_a_value_in_between(simulate, monkeypatch):
    simulate(0)
    asked = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, name=name, original=original: asked.append(name) or original(*args)
        )
    log = ScalarLog(every=100)
    for _ in range(99):
        log.add({"loss": torch.tensor(1.0), "ones": torch.ones(1, 1)}, 2)
    assert asked == []
    assert log.flush() == {"loss": 1.0, "ones": 1.0}
    assert asked == ["tolist"]


def test_a_device_without_streams_is_read_once_in_every_so_many_steps(monkeypatch):
    monkeypatch.setattr(scalars_module, "_is_on_host", lambda value: False)
    log = ScalarLog(every=2)
    assert log.add({"loss": torch.tensor(1.0)}) is None
    assert log.add({"loss": torch.tensor(2.0)}) == {"loss": 1.5}
