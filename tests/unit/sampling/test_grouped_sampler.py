"""Groups are read few at a time, samples are mixed as well as that allows, and the order is that of every other run."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import GroupedSampler
from loaders.errors import StateError

SIZES = [3, 0, 5, 2, 40, 0, 7, 1, 1, 12, 6, 9]
OF = np.repeat(np.arange(len(SIZES)), SIZES)


def make(sizes=SIZES, groups_open=3, **options):
    return GroupedSampler(sizes, groups_open=groups_open, **{"rank": 0, "num_replicas": 1, "tail": "uneven", **options})


def order(epoch=0, **options):
    sampler = make(**options)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("sizes", [SIZES, [], [0, 0], [1], [5000, 0, 6000, 1], [1] * 300])
@pytest.mark.parametrize("groups_open", [1, 2, 5, 1000])
def test_every_sample_comes_once_in_an_epoch(sizes, groups_open):
    assert sorted(order(sizes=sizes, groups_open=groups_open)) == list(range(sum(sizes)))


@pytest.mark.parametrize("groups_open", [1, 2, 3, 5])
def test_at_most_so_many_groups_are_open_and_each_is_opened_once(groups_open):
    groups = OF[order(groups_open=groups_open)]
    first, last = ({each: at for at, each in reversed(list(enumerate(run)))} for run in (groups, groups[::-1]))
    last = {each: len(groups) - 1 - at for each, at in last.items()}
    for position in range(len(groups)):
        assert sum(first[each] <= position <= last[each] for each in first) <= groups_open


def test_buffers_have_as_equal_numbers_of_groups_as_possible():
    groups = np.repeat(np.arange(17), 10)[order(sizes=[10] * 17, groups_open=16)]
    assert [len(set(groups[part].tolist())) for part in (slice(0, 80), slice(80, 170))] == [8, 9]


def test_epochs_and_seeds_have_orders_of_their_own_and_runs_do_not():
    assert order() == order()
    assert len({tuple(order(**options)) for options in ({}, {"epoch": 1}, {"seed": 1}, {"groups_open": 4})}) == 4


def test_all_orders_of_groups_and_samples_are_equally_likely():
    counts = np.zeros((4, 4))
    for seed in range(2000):
        counts[np.arange(4), order(sizes=[2, 2], groups_open=2, seed=seed)] += 1
    assert abs(counts - 500).max() < 110  # five standard deviations
    firsts = [order(sizes=[2, 2], groups_open=1, seed=seed)[0] for seed in range(2000)]
    assert abs(np.bincount(firsts) - 500).max() < 110


def test_indices_at_any_positions_are_those_of_the_whole_order():
    whole, sampler = order(), make()
    for start, stop in ((0, 0), (3, 50), (41, 42), (0, len(whole))):
        assert sampler.indices(start, stop).tolist() == whole[start:stop]


def test_a_state_fits_the_same_groups_alone():
    state = make().state_dict()
    make().load_state_dict(state)
    for other in (make(groups_open=4), make(sizes=SIZES[::-1]), make(seed=1), make(sizes=[sum(SIZES)])):
        with pytest.raises(StateError, match="does not fit this GroupedSampler"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments", [{"sizes": [[1]]}, {"sizes": [1.5]}, {"sizes": [-1, 3]}, {"sizes": ["a"]}, {"groups_open": 0}]
)
def test_what_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match="should be"):
        make(**arguments)


@pytest.mark.parametrize(
    ("groups", "groups_open", "batch", "epochs"),
    [(512, 1, 32, 6), (512, 4, 32, 6), (512, 16, 32, 6), (512, 64, 128, 6), (17, 16, 32, 400)],
)
def test_batches_are_as_mixed_as_the_documentation_says(groups, groups_open, batch, epochs):
    """The variance of a batch's mean: (b + w) / B of a full shuffle, and that of the mean of the open groups."""
    per_group = 64
    rng = np.random.default_rng(0)
    between, within = rng.normal(size=groups), rng.normal(size=(groups, per_group))
    values = (2 * between[:, None] + within).ravel()
    b, w = 4 * between.var(), within.var()
    means = []
    for epoch in range(epochs):
        shuffled = values[order(sizes=[per_group] * groups, groups_open=groups_open, epoch=epoch)]
        means.append(shuffled.reshape(-1, batch).mean(axis=1))
    k = groups / -(-groups // groups_open)  # buffers are of equal size
    expected = (b + w) / batch + b / k * (groups - k) / (groups - 1)
    found = np.concatenate(means).var()
    assert 0.85 * expected < found < 1.15 * expected


def test_a_batch_sees_as_many_groups_as_drawing_from_the_open_ones_gives():
    sampler = make(sizes=[512] * 208, groups_open=16)
    groups = (np.array(list(sampler)) // 512).reshape(-1, 64)
    seen = np.mean([len(np.unique(batch)) for batch in groups])
    assert abs(seen - 16 * (1 - (1 - 1 / 16) ** 64)) < 0.3
