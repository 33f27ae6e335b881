"""The shuffle is a bijection at every size, and nothing about it stands out.

Seeds are fixed, so every p here is one number: it passes for good or it does not.
"""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from support.chance import bin_uniform_p, chi_square_p

from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.sampling import permutation as module
from loaders.sampling.permutation import MAX_N, Permutation, draw_keys, permutation, scale, scramble

SMALLEST_P = 1e-4
# Around the end of the tables, a square, primes, a power of two, and the largest of all.
SIZES = [5, 97, 4096, 4097, 4225, 65_536, 1_000_003, 10**9 + 7, MAX_N - 87, MAX_N]


def make(n, epoch=0, seed=0):
    return Permutation(n, KeyedGenerator().rekey(Domain.ORDER, seed, epoch, 0))


def whole(n, **key):
    return make(n, **key)(np.arange(n))


def many(n, positions, keys):
    """Where `positions` go under many keys: int64 (keys, len(positions))."""
    generator, positions = KeyedGenerator(), np.asarray(positions)
    return np.stack([Permutation(n, generator.rekey(Domain.ORDER, 7, key, 0))(positions) for key in range(keys)])


def undo(permuted, shuffle):
    """The inverse of a network, without the cycle walk: its rounds in reverse, subtracting."""
    a, b = shuffle._sides
    halves = [permuted // b, permuted % b]
    for number in reversed(range(len(shuffle._keys))):
        added, scratch = np.empty((2, len(permuted)), np.uint64)
        scramble(halves[1 - number % 2].astype(np.uint64), shuffle._keys[number], added, scratch)
        scale(added, (a, b)[number % 2])
        halves[number % 2] = (halves[number % 2] - added.astype(np.int64)) % (a, b)[number % 2]
    return halves[0] * b + halves[1]


@pytest.mark.parametrize("n", [*range(68), 4095, 4096, 4097, 4098, 4160, 4161, 4225, 4226, 10_007, 65_536, 300_007])
def test_every_position_goes_to_a_place_of_its_own(n):
    assert np.array_equal(np.sort(whole(n)), np.arange(n))


@pytest.mark.parametrize("n", [4097, 1_000_003, 10**9 + 7, 2**33, MAX_N - 87, MAX_N - 1, MAX_N])
def test_large_shuffles_can_be_undone_so_they_are_bijections(n):
    for epoch, start in itertools.product(range(3), (0, n // 2, n - 2000)):
        positions = np.arange(start, start + 2000)
        shuffle = make(n, epoch)
        result = shuffle(positions)
        assert result.min() >= 0
        assert result.max() < n
        back = undo(result, shuffle)
        while (back >= n).any():  # cycle walking backwards
            back[back >= n] = undo(back[back >= n], shuffle)
        assert np.array_equal(back, positions)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_every_order_of_a_few_is_as_likely_as_any_other(n):
    orders = many(n, range(n), 60 * math.factorial(n))
    found = orders @ (10 ** np.arange(n))
    counts = np.unique(found, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert n == 1 or chi_square_p(counts, 60) > SMALLEST_P


@pytest.mark.parametrize("n", SIZES)
def test_positions_and_neighbours_are_uniform_over_keys(n):
    first, last = [0, 1, 2], [n // 2, n - 2, n - 1]
    places = many(n, first + last, 1500)
    for column in range(places.shape[1]):
        assert bin_uniform_p(places[:, column], n) > SMALLEST_P
    for one, other in ((0, 1), (0, 2), (4, 5)):
        assert bin_uniform_p((places[:, one] - places[:, other]) % n - 1, n - 1) > SMALLEST_P


def test_the_network_is_sound_far_below_the_sizes_that_it_is_used_for(monkeypatch):
    # The smaller, the harder: half as many rounds show here beyond doubt.
    monkeypatch.setattr(module, "_TABLE_N", 0)
    places = many(65, [0, 1, 2], 20_000)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert bin_uniform_p((places[:, one] - places[:, other]) % 65 - 1, 64) > SMALLEST_P


@pytest.mark.parametrize("n", [4096, 4097, 10_007])
def test_as_many_positions_stay_where_they_are_as_chance_has_it(n):
    fixed = np.array([(whole(n, epoch=epoch) == np.arange(n)).sum() for epoch in range(400)])
    counts = np.bincount(np.minimum(fixed, 4), minlength=5)
    poisson = [math.exp(-1) / math.factorial(k) for k in range(4)]
    assert chi_square_p(counts, 400 * np.array([*poisson, 1 - sum(poisson)])) > SMALLEST_P


@pytest.mark.parametrize("n", [4096, 100_003, 262_144])
def test_an_epoch_has_no_pattern_at_any_distance(n):
    order = whole(n)
    side = math.isqrt(n - 1) + 1
    for lag in (1, 2, 64, side - 1, side, side + 1):
        assert bin_uniform_p((order[lag:] - order[:-lag]) % n - 1, n - 1, bins=256) > SMALLEST_P
    ascents = (order[1:] > order[:-1]).sum()
    assert abs(ascents - (n - 1) / 2) < 4 * math.sqrt((n + 1) / 12)


def test_samples_that_share_a_half_do_not_stay_together():
    # What is left of a network with too few rounds: pairs meet in the same half again far too often, or never.
    n = 4225
    side = math.isqrt(n)
    meetings = []
    for epoch in range(300):
        together = np.bincount(np.arange(n) % side * side + whole(n, epoch=epoch) % side)
        meetings.append((together * (together - 1) // 2).sum())
    expected = side * math.comb(side, 2) * (side - 1) / (n - 1)
    assert abs(np.mean(meetings) - expected) < 4 * math.sqrt(expected / 300)
    assert 0.7 < np.var(meetings) / expected < 1.35


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"epoch": 2**40}, {"seed": 2**63}])
@pytest.mark.parametrize("n", [4096, 200_003])
def test_orders_of_other_epochs_and_seeds_are_independent(n, other):
    one, two = whole(n) * 16 // n, whole(n, **other) * 16 // n
    assert chi_square_p(np.bincount(one * 16 + two, minlength=256), n / 256) > SMALLEST_P
    assert abs(np.corrcoef(whole(n), whole(n, **other))[0, 1]) < 4 / math.sqrt(n)


def test_the_hash_keeps_all_that_tells_values_apart():
    for key in draw_keys(KeyedGenerator().rekey(Domain.ORDER, 0, 0, 0), 64):
        values = np.array([0, 1 << 63], np.uint64)  # an even factor would make them one
        scramble(values, key, values, np.empty_like(values))
        assert values[0] != values[1]


def test_a_key_means_the_same_order_for_ever():
    # States of earlier versions rely on these numbers.
    assert whole(10).tolist() == [5, 6, 4, 0, 3, 2, 8, 1, 9, 7]
    assert make(1_300_000, epoch=3, seed=42)(np.arange(5)).tolist() == [246937, 1080095, 269236, 515115, 199363]
    assert make(MAX_N, epoch=3, seed=42)(np.arange(3)).tolist() == [41009208602, 630102460429, 128326496871]


def test_the_largest_shuffle_takes_memory_for_its_block_alone():
    positions = np.arange(1000)
    tracemalloc.start()
    try:
        permutation(MAX_N, Domain.ORDER, 0, 12_345)(positions)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
