"""Ceilings and the sentence: what limits a loader, by what was measured."""

import dataclasses
import json

import numpy as np
import pytest

from loaders import ArrayDataset, DataLoader
from loaders.benchmark import Measurement, Pass, Spread, comparison
from loaders.benchmark.alone import copying_per_s, reading_per_s
from loaders.benchmark.comparison import Ceiling, Comparison, compare
from loaders.benchmark.setups import Setup, setups, spread_indices


def measured(name, *rates):
    passes = tuple(Pass(10, 100, 1000, rate, rate / 1e6, 0.01, 0.02, 1.5) for rate in rates)
    return Measurement(name, Spread.of([0.1]), 2_000_000, passes)


def compared(rates, *, decoding=1000.0, delivery=50_000.0, cores=4):
    """A comparison whose loaders had these rates, by setup."""
    ceilings = [
        Ceiling("decoding", Spread.of([decoding]), f"{decoding:,.0f} samples/s read by 4 cores at once"),
        Ceiling("the delivery of ready samples", Spread.of([delivery]), "one sample"),
    ]
    return Comparison(
        "photos",
        cores,
        64,
        1000,
        tuple(rates),
        tuple(measured(setup.name, *each) for setup, each in rates.items()),
        tuple(sorted(ceilings, key=lambda ceiling: ceiling.samples_per_s.median)),
    )


OURS, TORCHS = Setup("ours", 4), Setup("torch", 4)


def test_a_loader_at_its_ceiling_is_told_what_would_raise_it():
    told = compared({OURS: [940.0]}).sentence()
    assert "you are at 94% of what decoding allows here (1,000 samples/s" in told
    assert "DecodedCache" in told


def test_a_loader_above_its_ceiling_by_chance_is_at_it():
    assert "you are at what decoding allows here" in compared({OURS: [1100.0]}).sentence()


def test_the_lowest_ceiling_is_the_one_that_counts():
    told = compared({OURS: [940.0]}, decoding=5000.0, delivery=1000.0).sentence()
    assert "94% of what the delivery of ready samples allows" in told
    assert "DecodedCache" not in told


def test_a_loader_with_fewer_workers_than_cores_is_told_of_them():
    assert "try --workers 4" in compared({Setup("ours", 1): [240.0]}).sentence()
    assert "--workers" not in compared({OURS: [600.0]}).sentence()


def test_the_best_of_ours_is_meant_also_where_torchs_is_faster():
    assert compared({OURS: [500.0], Setup("ours", 1): [400.0], TORCHS: [900.0]}).best().name == OURS.name


def test_ratios_are_taken_within_rounds():
    found = compared({OURS: [200.0, 900.0, 30.0], TORCHS: [100.0, 300.0, 30.0]})
    assert found.ratios() == {OURS.name: (2, 1.5, 2.5)}


def test_all_of_it_is_json():
    kept = json.loads(json.dumps(compared({OURS: [940.0], TORCHS: [470.0]}).to_dict()))
    assert kept["ours_to_torch"][OURS.name]["median"] == 2
    assert [each["samples_per_s"]["median"] for each in kept["loaders"]] == [940, 470]
    assert kept["ceilings"][0]["name"] == "decoding"


@pytest.mark.parametrize(
    ("cores", "readers", "decoding", "how"), [(2, 2, 110, "read by 2 cores"), (64, 16, 3520, "read by 16 of 64 cores")]
)
def test_rounds_are_interleaved_and_alternate(monkeypatch, cores, readers, decoding, how):
    monkeypatch.setattr(comparison, "whole_cores", lambda: cores)
    done = []

    def run(part, **arguments):
        done.append(arguments["setup"]["workers"] if part == "loader" else part)
        if part == "probe":
            return {"is_loader": False, "kind": "ImageFolder", "length": 10, "per_s": 100.0, "batch_size": None}
        name = Setup(**arguments["setup"]).name
        return {"loader": measured(name, 100.0).to_dict(), "delivery_per_s": 1e5, "device_per_s": None}

    monkeypatch.setattr(comparison, "_run", run)

    def run_together(count, part, **_):
        done.append(part)
        assert count == readers
        return {"reading_per_s": [60.0, 50.0] * (count // 2), "copying_per_s": [1e6] * count}

    monkeypatch.setattr(comparison, "_run_together", run_together)
    found = compare("photos", lambda _: [Setup("ours", 0), Setup("ours", 2)], rounds=2)
    assert done == ["probe", 0, 2, "alone", "alone", 2, 0]
    assert [(each.name, each.samples_per_s.median) for each in found.ceilings] == [
        ("decoding", decoding),
        ("the delivery of ready samples", 1e5),
        ("copying", cores * 1e6),
    ]
    assert how in found.ceilings[0].how
    assert len(found.measurements[0].passes) == 2


def test_setups_are_all_that_are_asked_for_each_once():
    asked = setups([0, 2], ["process", "thread"], versus=True, as_it_is=False)
    assert [setup.name for setup in asked] == [
        "loaders, no workers",
        "torch, no workers",
        "loaders, 2 processes",
        "loaders, 2 threads",
        "torch, 2 processes",
    ]


def test_a_loader_is_rebuilt_with_its_own_arguments():
    given = DataLoader([1.0, 2.0, 3.0], batch_size=2, drop_last=True, num_workers=1, prefetch_factor=3)
    made = Setup("ours", 2, "thread").make(given, None, 64)
    assert (made.batch_size, made.drop_last, made.prefetch_factor, made.num_workers) == (2, True, 3, 2)
    assert made.worker_method == "thread"
    assert Setup("as it is").make(given, None, 64) is given
    assert Setup("torch", 0).make(given, [0, 1], 64).batch_size == 2


def test_attributes_of_a_dataset_are_not_taken_for_arguments_of_a_loader():
    dataset = ArrayDataset({"image": np.zeros((8, 4, 4), np.uint8)})  # its `fields` are arrays
    batch = next(iter(Setup("ours").make(dataset, None, 4)))
    assert batch["image"].shape == (4, 4, 4)


def test_an_epoch_is_spread_over_all_of_a_dataset():
    counts = [spread_indices(10, 25).count(index) for index in range(10)]
    assert set(counts) == {2, 3}
    assert sorted(spread_indices(10, 10)) == list(range(10))
    assert len(set(spread_indices(1000, 10))) == 10
    assert max(spread_indices(1000, 10)) > 500
    assert spread_indices(10, 25) == spread_indices(10, 25)


def test_reading_and_copying_alone_give_rates():
    dataset = ArrayDataset({"image": np.zeros((4, 64, 64, 3), np.uint8)})
    assert reading_per_s(dataset, None, 0.05) > 1000
    assert 100 < copying_per_s(dataset[0], 0.05) < 1e7
    assert copying_per_s("no arrays", 0.05) is None


def test_without_a_dataset_there_is_no_ceiling_and_it_says_so():
    found = compared({Setup("as it is"): [100.0]})
    assert "no ceiling" in dataclasses.replace(found, ceilings=()).sentence()
