"""Ratios hold exactly, nothing comes twice before its turn, and the keys carry all that workers need."""

import itertools
import json

import numpy as np
import pytest
import torch
from support.chance import chi_square_p

import loaders
from loaders import ArrayDataset, Dataset, DatasetError, Mixture, StateError

SMALLEST_P = 1e-4


class Numbers:
    """Samples that say where they come from."""

    def __init__(self, name, length, describe=False):
        self.name, self.length = name, length
        if describe:
            self.describe = lambda index: f"{name}/{index}.jpg"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"name": self.name, "index": index}


def mix(lengths, ratios, **options):
    return Mixture([Numbers(str(number), length) for number, length in enumerate(lengths)], ratios, **options)


def draws(mixture, epochs, **options):
    """The keys of some epochs, one behind the other: int64 (N, 2)."""
    sampler = mixture.sampler(**{"rank": 0, "num_replicas": 1, **options})
    keys = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        keys += list(sampler)
    return np.array(keys)


MIXTURES = [
    ([30, 20], [1, 1], None),
    ([100, 300], [1, 3], None),
    ([50, 7, 1000], [0.7, 0.2, 0.1], 500),
    ([5, 5], [2, 1], 7),
    ([900, 3, 40, 11], [2.718281828, 1, 3.14159, 0.05], 997),
    ([10], [4], 25),
]


@pytest.mark.parametrize(("lengths", "ratios", "num_samples"), MIXTURES)
def test_every_block_brings_the_shares_to_within_one_sample(lengths, ratios, num_samples):
    mixture = mix(lengths, ratios, num_samples=num_samples)
    numbers = draws(mixture, 9)[:, 0]
    shares = np.array(ratios) / sum(ratios)
    block = int(2 / shares.min()) + 1
    had = np.cumsum(numbers[:, None] == np.arange(len(lengths)), axis=0)
    ends = [
        epoch * len(mixture) + end
        for epoch in range(9)
        for end in [*range(0, len(mixture) - 2 * block, block), len(mixture)]
    ]
    for end in ends[1:]:
        assert np.abs(had[end - 1] - shares * end).max() <= 1
    assert np.abs(had - shares * np.arange(1, len(numbers) + 1)[:, None]).max() <= 2 * block


@pytest.mark.parametrize(("lengths", "ratios", "num_samples"), MIXTURES)
def test_no_sample_comes_again_before_the_others_had_their_turn(lengths, ratios, num_samples):
    mixture = mix(lengths, ratios, num_samples=num_samples)
    keys = draws(mixture, 12)
    block = 2 * (int(2 * sum(ratios) / min(ratios)) + 1)
    for number, length in enumerate(lengths):
        mine = keys[keys[:, 0] == number, 1]
        assert mine.min() >= 0
        assert mine.max() < length
        for start in range(0, len(mine) - length + 1, length):
            # Rounds overlap inside a block only: what belongs to this one lies at most a block outside.
            around = mine[max(0, start - block) : start + length + block]
            assert set(around.tolist()) == set(range(length))
        counts = np.bincount(mine, minlength=length)
        assert counts.max() - counts.min() <= 2


def test_ratios_like_the_lengths_make_an_epoch_of_every_sample_once():
    mixture = mix([30, 70, 11], [30, 70, 11])
    for epoch in np.split(draws(mixture, 5), 5):
        assert sorted(map(tuple, epoch.tolist())) == [
            (n, i) for n, length in enumerate([30, 70, 11]) for i in range(length)
        ]


def test_each_round_through_a_dataset_has_its_own_order():
    rounds = np.argsort(np.split(draws(mix([500], [1], num_samples=1000), 2)[:, 1], 4), axis=1)
    correlations = np.corrcoef(rounds)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(500)


def test_datasets_of_one_length_have_orders_of_their_own():
    keys = draws(mix([500, 500], [1, 1]), 1)
    one, other = (keys[keys[:, 0] == number, 1] for number in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(500)


@pytest.mark.parametrize("num_replicas", [2, 4, 5])
def test_every_rank_has_its_share_of_every_dataset(num_replicas):
    # Were the pattern the same in each block, a rank could have one dataset alone.
    mixture = mix([9000, 9000], [1, 1])
    for rank in range(num_replicas):
        numbers = draws(mixture, 1, rank=rank, num_replicas=num_replicas)[:, 0]
        assert chi_square_p(np.bincount(numbers), len(numbers) / 2) > SMALLEST_P


def test_batches_have_nearly_the_same_composition():
    numbers = draws(mix([3000, 1000], [3, 1]), 1)[:, 0].reshape(-1, 40)
    assert np.abs(numbers.sum(axis=1) - 10).max() <= 4


def test_the_datasets_alternate_in_another_way_in_each_epoch():
    # A block of five has few patterns: what differs must be how each block turns its own.
    numbers = draws(mix([50, 50], [1, 1]), 150)[:, 0].reshape(150, -1)
    assert len(np.unique(numbers, axis=0)) == 150


def test_a_long_block_is_no_stretch_of_one_dataset_behind_another():
    numbers = draws(mix([100, 100, 1], [100, 100, 1], num_samples=806), 1)[:, 0]
    stretches = [len(list(stretch)) for _, stretch in itertools.groupby(numbers.tolist())]
    assert max(stretches) < 20


def test_ranks_together_have_the_epoch():
    mixture = mix([50, 7], [5, 1], num_samples=97)
    whole = draws(mixture, 1).tolist()
    for rank in range(4):
        expected = (whole + whole[:3])[rank::4]
        assert draws(mixture, 1, rank=rank, num_replicas=4).tolist() == expected


def test_keys_are_pairs_of_plain_ints():
    for key in mix([5, 6], [1, 1]).sampler(rank=0, num_replicas=1):
        assert type(key) is tuple
        assert list(map(type, key)) == [int, int]


def test_a_state_goes_on_where_it_was_taken():
    mixture = mix([50, 7], [5, 1], seed=3)
    sampler = mixture.sampler(rank=0, num_replicas=1)
    sampler.set_epoch(2)
    whole, running = list(sampler), iter(sampler)
    head = [next(running) for _ in range(20)]
    resumed = mix([50, 7], [5, 1], seed=3).sampler(rank=0, num_replicas=1)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert head + list(resumed) == whole


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (mix([51, 7], [5, 1], num_samples=57), r"lengths is \[51, 7\] in the state and \[50, 7\] here"),
        (mix([50, 7], [4, 1]), r"ratios is \[4.0, 1.0\] in the state"),
        (mix([50, 7], [5, 1], seed=1), "seed is 1"),
        (mix([50, 7], [5, 1], num_samples=58), "n is 58"),
    ],
)
def test_a_state_of_another_mixture_is_refused(other, difference):
    with pytest.raises(StateError, match=difference):
        mix([50, 7], [5, 1]).sampler().load_state_dict(other.sampler().state_dict())


# -- as a dataset


def test_it_is_a_dataset_whose_positions_are_the_first_epoch():
    mixture = mix([8, 4], [2, 1])
    assert isinstance(mixture, Dataset)
    assert len(mixture) == 12
    expected = [{"name": str(number), "index": index} for number, index in mixture.sampler(rank=0, num_replicas=1)]
    assert list(mixture) == [mixture[position] for position in range(12)] == expected
    assert mixture[np.int64(-1)] == expected[-1]
    assert mixture[1, 3] == {"name": "1", "index": 3}


@pytest.mark.parametrize("index", [12, -13])
def test_positions_outside_of_the_epoch_are_refused(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range: there are 12 samples"):
        mix([8, 4], [2, 1])[index]


def test_samples_are_described_as_their_dataset_does():
    mixture = Mixture([Numbers("cats", 5, describe=True), Numbers("dogs", 5)], [1, 1])
    assert mixture.describe((0, 3)) == "cats/3.jpg"
    assert mixture.describe((1, 3)) == "sample 3 of dataset 1"
    for position in range(10):
        sample = mixture[position]
        suffix = f"{sample['index']}.jpg" if sample["name"] == "cats" else f"sample {sample['index']} of dataset 1"
        assert mixture.describe(position).endswith(suffix)


@pytest.mark.parametrize("loader", [torch.utils.data.DataLoader, loaders.DataLoader])
def test_epochs_reach_persistent_workers_with_the_keys(loader):
    datasets = [
        ArrayDataset({"index": np.arange(length), "number": np.full(length, number)})
        for number, length in enumerate((40, 20))
    ]
    mixture = Mixture(datasets, [1, 1], num_samples=30)
    sampler = mixture.sampler(rank=0, num_replicas=1)
    batches = loader(
        mixture,
        batch_size=5,
        sampler=sampler,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
        collate_fn=loaders.numpy_collate,
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = [
            pair for batch in batches for pair in zip(batch["number"].tolist(), batch["index"].tolist(), strict=True)
        ]
        assert found == list(sampler)
    assert len({tuple(draws(mixture, 3)[start : start + 30].ravel()) for start in (0, 30, 60)}) == 3


@pytest.mark.parametrize(
    ("lengths", "ratios", "options", "message"),
    [
        ([], [], {}, "needs datasets that have samples"),
        ([3, 0], [1, 1], {}, r"these have \[3, 0\]"),
        ([3, 3], [1], {}, r"2 datasets needs as many positive ratios, not \[1\]"),
        ([3, 3], [1, 0], {}, r"not \[1, 0\]"),
        ([3, 3], [1, float("nan")], {}, "positive ratios"),
        ([3, 3], [1, float("inf")], {}, "positive ratios"),
        ([3, 3], [1, 1], {"num_samples": 4}, "An epoch of 4 samples is too short .* pass num_samples= of at least 5"),
        ([90, 9], [99, 1], {}, "num_samples= of at least 201"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(lengths, ratios, options, message):
    with pytest.raises(DatasetError, match=message):
        mix(lengths, ratios, **options)


def test_a_key_means_the_same_sample_for_ever():
    # States of earlier versions rely on these numbers.
    mixture = mix([50_000, 7, 1000], [0.7, 0.2, 0.1], num_samples=500, seed=4)
    assert mixture.locate(np.arange(490, 495), epoch=6).tolist() == [[1, 0], [1, 5], [0, 8193], [1, 3], [0, 23377]]
