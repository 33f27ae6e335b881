import itertools
import pickle
import threading

import numpy as np
import pytest

from loaders import DataLoader, sample_rng
from loaders.randomness.streams import Domain, KeyedGenerator, enter_sample, leave_sample

# torch warns of more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def nobody_reads():
    yield
    leave_sample()


def first_words(keys, count=1):
    generator = KeyedGenerator()
    return np.array([generator.rekey(*key).bit_generator.random_raw(count) for key in keys])


def chi_square(counts):
    """The statistic of observed counts against equal ones, in standard deviations from its mean."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.size - 1
    return (statistic - degrees) / np.sqrt(2 * degrees)


NEIGHBOURS = {
    "positions": [(Domain.SAMPLE, 0, 0, position) for position in range(40_000)],
    "epochs": [(Domain.SAMPLE, 0, epoch, 7) for epoch in range(40_000)],
    "seeds": [(Domain.SAMPLE, seed, 0, 7) for seed in range(40_000)],
    "streams": [(Domain.TRANSFORM, 0, 0, 7, stream) for stream in range(40_000)],
    "domains and positions": [(domain, 1, 2, position) for position in range(10_000) for domain in Domain],
}


@pytest.mark.parametrize("keys", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbouring_keys_draw_independently(keys):
    words = first_words(keys)[:, 0]
    assert len(set(words.tolist())) == len(words)
    # Each of the top, middle and low bits, alone and together with the key before: 16 x 16 cells.
    for shift in (60, 32, 0):
        nibble = (words >> np.uint64(shift)).astype(int) & 15
        assert abs(chi_square(np.bincount(nibble, minlength=16))) < 5
        pairs = 16 * nibble[:-1] + nibble[1:]
        assert abs(chi_square(np.bincount(pairs, minlength=256))) < 5
    # Every bit flips half of the time from one key to the next.
    flips = np.unpackbits((words[1:] ^ words[:-1]).view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(flips - 0.5).max() < 5 * 0.5 / np.sqrt(len(words))


def test_uniform_draws_of_neighbouring_samples_are_uncorrelated():
    draws = first_words([(Domain.SAMPLE, 3, 1, position) for position in range(20_000)], 2) / 2.0**64
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(draws[:-lag, 0], draws[lag:, 0])[0, 1]) < 5 / np.sqrt(len(draws))
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 5 / np.sqrt(len(draws))


def test_streams_of_neighbouring_keys_never_meet():
    keys = list(itertools.product(Domain, (0, 1), (0, 1), (0, 1, 2), (0, 1)))
    words = first_words(keys, 256)
    assert len(set(words.flat)) == words.size


def test_every_part_of_a_key_counts_over_its_whole_range():
    keys = [
        (Domain.SAMPLE, 0, 0, 0),
        (Domain.SAMPLE, 2**63, 0, 0),
        (Domain.SAMPLE, -1, 0, 0),
        (Domain.SAMPLE, 0, 2**40, 0),
    ]
    keys += [(Domain.SAMPLE, 0, 0, 2**40), (Domain.SAMPLE, 0, 0, 2**63)]
    assert len(set(first_words(keys).flat)) == len(keys)


def test_going_back_to_a_key_gives_the_same_numbers_also_from_the_middle_of_a_draw():
    generator = KeyedGenerator()
    numpy = generator.rekey(Domain.SAMPLE, 1, 2, 3)
    first = [numpy.random(), numpy.integers(5, dtype=np.uint32), numpy.normal()]
    numpy.integers(5, dtype=np.uint32)  # leaves half a word behind
    assert generator.rekey(Domain.SAMPLE, 1, 2, 3) is numpy
    assert [numpy.random(), numpy.integers(5, dtype=np.uint32), numpy.normal()] == first


def test_a_copy_goes_its_own_way():
    generator = KeyedGenerator()
    copy = pickle.loads(pickle.dumps(generator))
    one, other = generator.rekey(Domain.SAMPLE, 1, 2, 3), copy.rekey(Domain.SAMPLE, 1, 2, 4)
    assert one.random() == first_draw(1, 2, 3)
    assert other.random() == first_draw(1, 2, 4)


def first_draw(seed, epoch, position):
    return KeyedGenerator().rekey(Domain.SAMPLE, seed, epoch, position).random()


def test_within_a_sample_draws_go_on_and_the_next_sample_starts_anew():
    enter_sample(1, 2, 3)
    one = [sample_rng().random(), sample_rng().random()]
    enter_sample(1, 2, 4)
    two = [sample_rng().random(), sample_rng().random()]
    assert one[0] == first_draw(1, 2, 3)
    assert two[0] == first_draw(1, 2, 4)
    assert len({*one, *two}) == 4
    enter_sample(1, 2, 3)
    assert [sample_rng().random(), sample_rng().random()] == one


def test_outside_of_a_sample_every_call_is_a_new_generator():
    enter_sample(1, 2, 3)
    keyed = sample_rng()
    leave_sample()
    assert sample_rng() is not keyed
    assert sample_rng().random() != sample_rng().random()


def test_threads_read_their_own_samples():
    draws = {}
    barrier = threading.Barrier(3)

    def read(position):
        enter_sample(1, 2, position)
        barrier.wait(30)
        draws[position] = [sample_rng().random()]
        barrier.wait(30)
        draws[position].append(sample_rng().random())

    threads = [threading.Thread(target=read, args=(position,)) for position in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for position in range(3):
        rng = KeyedGenerator().rekey(Domain.SAMPLE, 1, 2, position)
        assert draws[position] == [rng.random(), rng.random()]


class Draws:
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return index, sample_rng().random(), sample_rng().integers(1000)


@pytest.mark.parametrize(
    "arguments", [{"num_workers": 3}, {"num_workers": 3, "worker_method": "thread"}], ids=["processes", "threads"]
)
def test_samples_draw_the_same_whoever_reads_them(arguments):
    import torch

    def epochs(**arguments):
        loader = DataLoader(Draws(), 7, shuffle=True, generator=torch.Generator().manual_seed(5), **arguments)
        return [[[field.tolist() for field in batch] for batch in loader] for _ in range(2)]

    inline = epochs()
    assert epochs(**arguments) == inline
    draws = [draw for epoch in inline for batch in epoch for draw in batch[1]]
    assert len(set(draws)) == 60
