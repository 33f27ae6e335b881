"""Ranks share an epoch exactly, the tail is as promised, and a state goes on where it was taken."""

import copy
import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler

import loaders
from loaders import ShardedSampler, StateError
from loaders.sampling import base


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(base, "_BLOCK", 8)


def shares(n, num_replicas, **options):
    return [list(ShardedSampler(n, rank=rank, num_replicas=num_replicas, **options)) for rank in range(num_replicas)]


def interleaved(lists):
    """What the ranks have together, in the order of the epoch."""
    return [index for step in itertools.zip_longest(*lists) for index in step if index is not None]


def global_batches(n, num_replicas, batch_size, **options):
    """The samples of each step, all ranks together; a rank's `batch_size` is the sampler's too."""
    ranks = [
        list(
            BatchSampler(
                ShardedSampler(n, rank=rank, num_replicas=num_replicas, batch_size=batch_size, **options),
                batch_size,
                False,
            )
        )
        for rank in range(num_replicas)
    ]
    return [sorted(index for batch in step for index in batch or []) for step in itertools.zip_longest(*ranks)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n", "num_replicas"), [(12, 4), (13, 4), (3, 8), (5000, 3), (1, 1), (0, 2)])
def test_ranks_have_the_whole_epoch_and_nothing_twice(n, num_replicas, shuffle, small_blocks):
    lists = shares(n, num_replicas, shuffle=shuffle, tail="uneven")
    assert sorted(itertools.chain(*lists)) == list(range(n))
    assert max(map(len, lists)) - min(map(len, lists)) <= 1
    assert interleaved(lists) == ShardedSampler(n, shuffle=shuffle).indices(0, n).tolist()


@pytest.mark.parametrize(
    ("n", "num_replicas", "batch_size"), [(13, 4, 1), (13, 2, 4), (16, 2, 4), (3, 2, 8), (1, 4, 3)]
)
def test_pad_repeats_the_beginning_of_the_epoch_up_to_the_global_batch(n, num_replicas, batch_size):
    order = interleaved(shares(n, num_replicas, batch_size=batch_size))
    assert len(order) % (num_replicas * batch_size) == 0
    assert 0 <= len(order) - n < num_replicas * batch_size
    assert sorted(order[:n]) == list(range(n))
    assert order == [order[position % n] for position in range(len(order))]


@pytest.mark.parametrize(("n", "num_replicas", "batch_size"), [(13, 4, 1), (13, 2, 4), (16, 2, 4), (3, 2, 8)])
def test_drop_leaves_out_what_does_not_fill_a_global_batch(n, num_replicas, batch_size):
    lists = shares(n, num_replicas, batch_size=batch_size, tail="drop")
    kept = n // (num_replicas * batch_size) * num_replicas * batch_size
    assert interleaved(lists) == ShardedSampler(n).indices(0, kept).tolist()
    assert {len(share) for share in lists} == {kept // num_replicas}


@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
@pytest.mark.parametrize("n", [64, 61, 7])
def test_global_batches_are_the_same_on_any_number_of_ranks(n, tail):
    expected = global_batches(n, 1, 8, tail=tail)
    for num_replicas in (2, 4, 8):
        assert global_batches(n, num_replicas, 8 // num_replicas, tail=tail) == expected


def test_epochs_differ_and_return():
    sampler = ShardedSampler(100, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sampler.epoch == 1
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ShardedSampler(100, seed=4)) != first


def test_an_epoch_set_while_iterating_is_the_next_one():
    sampler = ShardedSampler(20_000)
    expected = list(sampler)
    running = iter(sampler)
    head = [next(running)]
    sampler.set_epoch(5)
    assert head + list(running) == expected


def test_without_shuffle_samples_come_in_order():
    assert list(ShardedSampler(10, shuffle=False, rank=1, num_replicas=3, tail="uneven")) == [1, 4, 7]


def test_indices_are_plain_ints_and_as_many_as_promised():
    sampler = ShardedSampler(20_001, rank=1, num_replicas=2, tail="uneven")
    found = list(sampler)
    assert {type(index) for index in found} == {int}
    assert len(found) == len(sampler) == len(sampler.positions()) == 10_000


def test_any_stretch_of_the_epoch_can_be_asked_for():
    sampler = ShardedSampler(2**40, seed=9)
    far = sampler.indices(2**39, 2**39 + 100)
    assert far.dtype == np.int64
    assert np.array_equal(far[40:60], sampler.indices(2**39 + 40, 2**39 + 60))
    padded = ShardedSampler(10, rank=2, num_replicas=4)
    assert padded.indices(0, 12)[list(padded.positions())].tolist() == list(padded)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 13)])
def test_stretches_outside_of_the_epoch_are_refused(start, stop):
    with pytest.raises(IndexError, match="the epoch has 12"):
        ShardedSampler(10, rank=0, num_replicas=4).indices(start, stop)


@pytest.mark.parametrize("loader", [torch.utils.data.DataLoader, loaders.DataLoader])
def test_loaders_take_it_as_their_sampler(loader):
    sampler = ShardedSampler(10, rank=1, num_replicas=2)
    batches = [batch.tolist() for batch in loader(np.arange(10), batch_size=2, sampler=sampler)]
    assert list(itertools.chain(*batches)) == list(sampler)
    assert [len(batch) for batch in batches] == [2, 2, 1]


# -- ranks


def test_rank_and_num_replicas_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ShardedSampler(9, shuffle=False).positions() == range(2, 9, 3)


def test_an_initialised_process_group_is_asked_before_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert ShardedSampler(8).positions() == range(1, 8, 4)


def test_arguments_are_asked_first(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ShardedSampler(8, rank=0, num_replicas=1).positions() == range(8)


def test_one_process_alone_has_everything():
    assert ShardedSampler(8).positions() == range(8)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ({"rank": 1}, {}, "rank is known and num_replicas is not"),
        ({"num_replicas": 2}, {}, "num_replicas is known and rank is not"),
        ({}, {"WORLD_SIZE": "2"}, "num_replicas is known and rank is not"),
        ({}, {"RANK": "one", "WORLD_SIZE": "2"}, "RANK should be a whole number, but is 'one'"),
        ({"rank": 2, "num_replicas": 2}, {}, r"interval \[0, 1\], but got 2 of 2"),
        ({"rank": -1, "num_replicas": 2}, {}, r"interval \[0, 1\]"),
        ({"rank": 0, "num_replicas": 0}, {}, "got 0 of 0"),
    ],
)
def test_ranks_that_cannot_be_are_refused(arguments, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ShardedSampler(8, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": -1}, ValueError, r"between 0 and 2\*\*40 samples, not -1"),
        ({"n": 2**40 + 1}, ValueError, "not 1,099,511,627,777"),
        ({"n": [1, 2]}, TypeError, r"such as len\(dataset\), but got list"),
        ({"n": 5, "tail": "padd"}, ValueError, "but got 'padd'"),
        ({"n": 5, "batch_size": 0}, ValueError, "batch_size should be a positive integer"),
        ({"n": 5, "seed": 0.5}, TypeError, "integer"),
    ],
)
def test_other_arguments_that_cannot_be_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ShardedSampler(**arguments)


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="negative"):
        ShardedSampler(5).set_epoch(-1)


def test_it_needs_no_torch():
    code = "import sys, loaders; list(loaders.ShardedSampler(9)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- state


def taken(sampler, count):
    """The sampler's state after `count` indices, and those."""
    running = iter(sampler)
    head = [next(running) for _ in range(count)]
    return sampler.state_dict(), head


@pytest.mark.parametrize("count", [*range(20), 33])
def test_a_state_goes_on_where_it_was_taken(count, small_blocks):
    state, head = taken(ShardedSampler(33, seed=1), count)
    assert state["position"] == count
    resumed = ShardedSampler(33, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state
    assert head + list(resumed) == list(ShardedSampler(33, seed=1))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 11])
@pytest.mark.parametrize("tail", ["pad", "drop", "uneven"])
def test_a_state_goes_on_with_another_number_of_ranks(count, tail, small_blocks):
    batch_sizes = {4: 3, 2: 6, 1: 12, 3: 4, 12: 1}
    whole = ShardedSampler(130, rank=0, num_replicas=1, batch_size=12, tail=tail)
    state, _ = taken(ShardedSampler(130, rank=2, num_replicas=4, batch_size=3, tail=tail), count)
    for num_replicas, batch_size in batch_sizes.items():
        lists = []
        for rank in range(num_replicas):
            share = ShardedSampler(130, rank=rank, num_replicas=num_replicas, batch_size=batch_size, tail=tail)
            share.load_state_dict(state)
            lists.append(list(share))
        assert interleaved(lists) == list(whole)[4 * count :]


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_state_between_batches_counts_whole_batches(drop_last, small_blocks):
    sampler = ShardedSampler(50)
    batches = BatchSampler(sampler, 6, drop_last)
    for number, _ in enumerate(batches, 1):
        assert sampler.state_dict()["position"] == min(6 * number, 50)


def test_a_state_is_plain_and_small():
    state = ShardedSampler(2**40).state_dict()
    assert {type(value) for value in state.values()} <= {int, str, bool}
    assert len(json.dumps(state)) < 200


def test_the_middle_of_the_largest_epoch_is_resumed_at_once():
    sampler = ShardedSampler(2**40, rank=1, num_replicas=2)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 3, "position": 2**39})
    assert [next(iter(sampler))] == sampler.indices(2**39 + 1, 2**39 + 2).tolist()


def test_a_loaded_state_is_used_once():
    sampler = ShardedSampler(30)
    whole = list(sampler)
    sampler.load_state_dict(taken(sampler, 10)[0])
    assert list(sampler) == whole[10:]
    assert list(sampler) == whole


def test_an_iterator_that_nobody_used_takes_nothing_from_a_loaded_state():
    sampler = ShardedSampler(30)
    whole = list(sampler)
    stray = iter(sampler)
    sampler.load_state_dict(taken(ShardedSampler(30), 10)[0])
    iter(sampler)
    assert list(sampler) == whole[10:]
    assert list(stray) == whole


def test_an_older_iterator_does_not_move_a_loaded_state(small_blocks):
    sampler = ShardedSampler(30)
    older = iter(sampler)
    next(older)
    state = taken(ShardedSampler(30), 20)[0]
    sampler.load_state_dict(state)
    list(older)
    assert sampler.state_dict() == state


def test_setting_the_epoch_that_a_state_has_keeps_its_place():
    sampler = ShardedSampler(30)
    sampler.set_epoch(4)
    whole, (state, _) = list(sampler), taken(sampler, 10)
    resumed = ShardedSampler(30)
    resumed.load_state_dict(state)
    assert resumed.epoch == 4
    resumed.set_epoch(4)
    assert resumed.state_dict() == state
    assert list(resumed) == whole[10:]


def test_setting_another_epoch_begins_it_anew():
    sampler = ShardedSampler(30)
    sampler.load_state_dict(taken(sampler, 10)[0])
    sampler.set_epoch(5)
    assert sampler.state_dict()["position"] == 0
    assert np.array_equal(list(sampler), sampler.indices(0, 30))


def test_a_finished_epoch_is_resumed_as_finished():
    sampler = ShardedSampler(7, rank=1, num_replicas=2, tail="uneven")
    list(sampler)
    state = sampler.state_dict()
    assert state["position"] == 7
    longer, _ = taken(ShardedSampler(7, rank=0, num_replicas=2, tail="uneven"), 4)
    assert longer == state
    sampler.load_state_dict(state)
    assert list(sampler) == []
    sampler.set_epoch(1)
    assert len(list(sampler)) == 3


def test_a_position_past_the_end_is_the_end():
    sampler = ShardedSampler(7, rank=0, num_replicas=2, tail="uneven")
    sampler.load_state_dict({**sampler.state_dict(), "position": 4 * 2})
    assert sampler.state_dict()["position"] == 7
    assert list(sampler) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_and_pickles_keep_the_place(copied):
    sampler = ShardedSampler(30)
    state, _ = taken(sampler, 10)
    assert copied(sampler).state_dict() == state
    sampler.load_state_dict(state)
    assert list(copied(sampler)) == list(sampler)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (ShardedSampler(31), "n is 31 in the state and 30 here; length is 31 in the state and 30 here"),
        (ShardedSampler(30, seed=1), "seed is 1 in the state and 0 here"),
        (ShardedSampler(30, shuffle=False), "shuffle is False in the state and True here"),
        (ShardedSampler(30, tail="drop"), "tail is 'drop' in the state and 'pad' here"),
        (ShardedSampler(30, rank=0, num_replicas=4), "length is 32 in the state and 30 here"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_its_differences_named(other, difference):
    sampler = ShardedSampler(30)
    with pytest.raises(StateError, match=f"{difference}\\.\n  .*batch_size="):
        sampler.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2 in the state and 1 here"),
        ({"position": -1}, "there is no position -1 of epoch 0"),
        ({"position": None}, "position None"),
        ({"epoch": 1.5}, "epoch 1.5"),
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(change, message):
    sampler = ShardedSampler(30)
    sampler.load_state_dict(taken(sampler, 10)[0])
    before = sampler.state_dict()
    with pytest.raises(StateError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before
    assert len(list(sampler)) == 20


def test_a_state_of_something_else_is_refused():
    with pytest.raises(StateError, match="the state has no version; the state has no n;"):
        ShardedSampler(30).load_state_dict({})
