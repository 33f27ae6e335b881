"""Draws follow the weights, each for itself, and shares and states work as in the sharded sampler."""

import json

import numpy as np
import pytest
import torch
from support.chance import bin_uniform_p, chi_square_p

from loaders import StateError, WeightedSampler

SMALLEST_P = 1e-4


def sampler(weights, num_samples, **options):
    return WeightedSampler(weights, num_samples, **{"rank": 0, "num_replicas": 1, **options})


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [0.5], [1e-3, 1e3, 1], np.ones(1000), np.arange(1, 200) * 1e-300])
def test_draws_follow_the_weights(weights):
    counts = np.bincount(list(sampler(weights, 200_000)), minlength=len(weights))
    expected = np.asarray(weights) / np.sum(weights) * 200_000
    often = expected >= 5
    assert np.abs(counts[~often] - expected[~often]).max(initial=0) < 5
    assert (
        often.sum() == 1
        or chi_square_p(counts[often], expected[often] * counts[often].sum() / expected[often].sum()) > SMALLEST_P
    )


def test_what_has_no_weight_is_never_drawn():
    weights = np.array([0, 0, 1, 0, 2, 0, 0], float)
    assert set(sampler(weights, 5000)) == {2, 4}
    # Half of all uniform numbers times the smallest float are rounded to zero, where the first one ends.
    assert set(sampler([0, 5e-324], 100)) == {1}


def test_rounding_never_draws_behind_the_last_weight():
    # The other half is rounded up to the sum itself.
    assert set(sampler([5e-324, 0], 100)) == {0}


def test_draws_are_independent_of_each_other_of_epochs_and_of_seeds():
    n = 65_536
    one = sampler(np.ones(16), n)
    draws = one.indices(0, n)
    one.set_epoch(1)
    for other in (
        np.roll(draws, 1),
        np.roll(draws, 16),
        one.indices(0, n),
        sampler(np.ones(16), n, seed=1).indices(0, n),
    ):
        assert chi_square_p(np.bincount(draws * 16 + other, minlength=256), n / 256) > SMALLEST_P


@pytest.mark.parametrize("epoch", [0, 1])
def test_fine_steps_of_the_weights_are_drawn_evenly(epoch):
    one = sampler(np.ones(1_000_003), 100_000)
    one.set_epoch(epoch)
    assert bin_uniform_p(one.indices(0, 100_000), 1_000_003, bins=1000) > SMALLEST_P
    assert bin_uniform_p(one.indices(0, 100_000) % 1009, 1009, bins=1009) > SMALLEST_P


def test_a_first_draw_is_as_random_as_any():
    firsts = []
    for seed in range(2000):
        firsts += sampler(np.ones(32), 1, seed=seed).indices(0, 1).tolist()
    assert bin_uniform_p(firsts, 32) > SMALLEST_P


def test_ranks_share_the_draws_of_an_epoch():
    whole = list(sampler(np.arange(9), 22))
    for rank in range(4):
        share = WeightedSampler(np.arange(9), 22, rank=rank, num_replicas=4)
        assert list(share) == (whole + whole[:2])[rank::4]


def test_a_state_goes_on_where_it_was_taken():
    one = sampler([1, 2, 3], 50, seed=2)
    one.set_epoch(3)
    whole, running = list(one), iter(one)
    head = [next(running) for _ in range(20)]
    resumed = sampler([1, 2, 3], 50, seed=2)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert head + list(resumed) == whole


def test_a_state_of_other_weights_is_refused():
    with pytest.raises(StateError, match=r"weights_crc32 is \d+ in the state and \d+ here"):
        sampler([1, 2, 3], 50).load_state_dict(sampler([1, 2, 4], 50).state_dict())


def test_weights_may_be_a_tensor_or_a_strided_array():
    expected = list(sampler([1.0, 2.0, 3.0], 50))
    assert list(sampler(torch.tensor([1, 2, 3]), 50)) == expected
    assert list(sampler(np.array([1.0, 9, 2, 9, 3])[::2], 50)) == expected
    assert list(sampler(np.array([1, 2, 3], np.float32), 50)) == expected


def test_more_may_be_drawn_than_there_are_and_none():
    assert len(list(sampler([1, 1], 100))) == 100
    assert list(sampler([1, 1], 0)) == []


def test_keys_mean_the_same_draws_for_ever():
    # States of earlier versions rely on these numbers.
    one = sampler(np.arange(1000), 100, seed=5)
    one.set_epoch(2)
    assert one.indices(90, 95).tolist() == [557, 857, 587, 414, 714]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "positive and finite sum"),
        ([0, 0], "positive and finite sum, but 2 have the sum 0"),
        ([1e308, 1e308], "positive and finite sum"),
        ([1, -1], "not negative"),
        ([1, float("nan")], "finite"),
        ([1, float("inf")], "finite"),
        ([[1, 2]], r"shape \(n,\)"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSampler(weights, 5)
