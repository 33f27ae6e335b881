"""The prefetcher's state, and what the randomness of its transforms is keyed by."""

from __future__ import annotations

import gc
import weakref
from itertools import islice

import numpy as np
import pytest
import torch
from support.simulated_device import SimulatedDevice, prefetch
from support.waiting import assert_no_workers
from torch.utils.data import DataLoader, TensorDataset

import loaders
from loaders import DevicePrefetcher, ShardedSampler, StateError


@pytest.fixture
def device():
    return SimulatedDevice(seed=0)


class Squares:
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return np.array([index * index], np.int64)


def squares(**options):
    return loaders.DataLoader(Squares(), batch_size=2, shuffle=True, seed=5, **options)


@pytest.mark.parametrize("taken", [0, 1, 5, 15, 16])
@pytest.mark.parametrize("static", [False, True])
def test_the_state_counts_batches_handed_out_not_those_on_their_way(device, taken, static):
    everything = [batch.flatten().tolist() for batch in squares()]
    ours = prefetch(device, squares(), depth=3, static=static)
    batches = iter(ours)
    for _ in range(taken):
        next(batches)
    state = ours.state_dict()
    for resumed in (squares(), prefetch(device, squares(), depth=1)):
        resumed.load_state_dict(state)
        rest = []
        for batch in resumed:
            device.drain()
            rest.append(batch.flatten().tolist())
        # After the last batch of an epoch comes the next one.
        assert rest == everything[taken:] if taken < 16 else len(rest) == 16


def test_after_an_epoch_or_a_broken_one_the_next_begins_where_the_loaders_own_would(device):
    plain, ours = squares(), prefetch(device, squares(), depth=2)
    for stop in (16, 3, 16):
        for loader in (plain, ours):
            for step, _ in enumerate(loader, start=1):
                if step == stop:
                    break
            else:
                pass
        assert ours.state_dict() == plain.state_dict()


def test_a_loader_without_state_has_none_here_and_one_that_refuses_refuses_here(device):
    assert not hasattr(prefetch(device, [torch.zeros(1)]), "state_dict")
    assert not hasattr(prefetch(device, [torch.zeros(1)]), "load_state_dict")
    ours = prefetch(device, squares(in_order=False, num_workers=1, multiprocessing_context="fork"))
    batches = iter(ours)
    next(batches)
    with pytest.raises(StateError, match="in_order=False"):
        ours.state_dict()


def test_a_refused_state_keeps_neither_the_iterator_nor_its_workers_alive(device):
    ours = prefetch(device, squares(in_order=False, num_workers=1, multiprocessing_context="fork"))
    batches = iter(ours)
    next(batches)
    with pytest.raises(StateError):
        ours.state_dict()
    iterator = weakref.ref(batches)
    del batches
    gc.collect()
    assert iterator() is None
    assert_no_workers()


def test_a_loader_that_went_on_by_itself_tells_its_own_state(device):
    plain, loader = squares(), squares()
    ours = prefetch(device, loader, depth=2)
    for _ in ours:
        break
    for twin in (plain, plain, loader):
        for _ in twin:
            break
    assert ours.state_dict() == loader.state_dict() == plain.state_dict()
    list(loader)
    list(plain)
    assert ours.state_dict() == plain.state_dict()


class Interrupted(Squares):
    """Ctrl-C is pressed while sample 4 is read, once."""

    is_due = True

    def __getitem__(self, index):
        if index == 4 and self.is_due:
            self.is_due = False
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupt_before_anything_was_handed_out_loses_no_batch(device):
    ours = prefetch(device, loaders.DataLoader(Interrupted(), batch_size=2, seed=5), depth=4)
    with pytest.raises(KeyboardInterrupt):
        next(iter(ours))
    assert ours.state_dict()["batches"] == 0
    assert len(list(ours)) == 16


def test_the_number_of_an_epoch_to_come_does_not_move_the_state_of_this_one(device):
    ours = prefetch(device, squares(), depth=3)
    batches = iter(ours)
    next(batches)
    ours.set_epoch(7)
    assert (ours.state_dict()["epoch"], ours.state_dict()["batches"]) == (0, 1)


def test_a_state_that_the_loader_was_given_is_told_and_so_is_what_it_did_by_itself(device):
    loader = squares()
    ours = prefetch(device, loader)
    next(iter(ours))
    ahead = squares()
    list(ahead)
    list(islice(ahead, 2))
    loader.load_state_dict(ahead.state_dict())
    assert ours.state_dict() == ahead.state_dict()
    with pytest.warns(UserWarning, match="is discarded"):
        loader.set_epoch(0)
    list(islice(loader, 9))
    assert (ours.state_dict()["epoch"], ours.state_dict()["batches"]) == (0, 9)


def test_of_nested_loops_the_one_that_got_the_last_batch_tells_the_state(device):
    ours = prefetch(device, squares(), depth=3)
    outer = iter(ours)
    for _ in range(14):
        next(outer)
    inner = iter(ours)
    next(inner)
    next(outer)
    assert (ours.state_dict()["epoch"], ours.state_dict()["batches"]) == (0, 15)


def test_a_state_that_was_taken_is_nobody_elses_to_change(device):
    ours = prefetch(device, squares())
    batches = iter(ours)
    next(batches)
    before = ours.state_dict()
    ours.state_dict()["origin"].clear()
    ours.state_dict()["keys"] = 99
    assert ours.state_dict() == before


def drawn(device, loader, **options):
    """What a transform draws for each batch."""
    transform = lambda batch: int(loaders.sample_rng().integers(1 << 60))  # noqa: E731
    return list(prefetch(device, loader, transform=transform, **options))


@pytest.mark.parametrize("options", [{}, {"depth": 4}, {"static": True}])
def test_a_transform_draws_the_same_numbers_for_a_batch_at_any_depth_and_after_resuming(device, options):
    loader = squares()
    expected = [drawn(device, loader), drawn(device, loader)]
    assert len({number for epoch in expected for number in epoch}) == 32
    on_the_cpu = DevicePrefetcher(squares(), "cpu", transform=lambda _: int(loaders.sample_rng().integers(1 << 60)))
    assert list(on_the_cpu) == expected[0]
    workers = squares(num_workers=2, multiprocessing_context="fork")
    assert [drawn(device, workers, **options), drawn(device, workers, **options)] == expected
    cut = squares()
    for step, _ in enumerate(cut, start=1):
        if step == 5:
            break
    resumed = squares()
    resumed.load_state_dict(cut.state_dict())
    assert drawn(device, resumed, **options) == expected[0][5:]


def test_over_a_stock_loader_the_draws_of_a_transform_follow_torchs_seed_and_the_epoch(device):
    stock = DataLoader(TensorDataset(torch.arange(12)), batch_size=3)

    def two_epochs(seed):
        torch.manual_seed(seed)
        transform = lambda batch: int(loaders.sample_rng().integers(1 << 60))  # noqa: E731
        prefetcher = prefetch(device, stock, transform=transform)
        return [*prefetcher, *prefetcher]

    assert two_epochs(1) == two_epochs(1)
    assert len({*two_epochs(1), *two_epochs(2)}) == 16


def test_draws_do_not_depend_on_the_order_in_which_batches_come(device):
    def drawn_by_batch(**options):
        loader = squares(num_workers=2, worker_method="thread", **options)
        transform = lambda batch: (batch.flatten().tolist(), int(loaders.sample_rng().integers(1 << 60)))  # noqa: E731
        return {tuple(key): number for key, number in DevicePrefetcher(loader, "cpu", transform=transform)}

    assert drawn_by_batch(in_order=False) == drawn_by_batch()


def test_no_draw_comes_twice_in_an_epoch_that_goes_on_with_another_number_of_ranks(device):
    def of(rank, ranks):
        sampler = ShardedSampler(32, rank=rank, num_replicas=ranks, seed=5, batch_size=4 // ranks)
        return loaders.DataLoader(Squares(), 4 // ranks, sampler=sampler, seed=5)

    def draw(_):
        return int(loaders.sample_rng().integers(1 << 60))

    ranks = [prefetch(device, of(rank, 2), transform=draw) for rank in range(2)]
    draws = [number for each in ranks for number in islice(each, 3)]
    alone = of(0, 1)
    alone.load_state_dict(ranks[0].state_dict())
    draws += drawn(device, alone)
    assert len(draws) == 2 * 3 + 5
    assert len(set(draws)) == len(draws)
