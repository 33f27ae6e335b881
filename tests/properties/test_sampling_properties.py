"""Whatever the sizes, ranks share an epoch exactly, and it may be interrupted and resumed anywhere."""

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import GroupedSampler, Mixture, ShardedSampler, WeightedSampler
from loaders.sampling.permutation import MAX_N


def interleaved(samplers):
    """What the ranks together have left, in the order of the epoch."""
    lists = [list(sampler) for sampler in samplers]
    return [share[step] for step in range(max(map(len, lists))) for share in lists if step < len(share)]


def make(kind, n, **options):
    if kind == "weighted":
        return WeightedSampler(np.arange(1, 30), n, **options)
    if kind == "mixture":
        seed = options.pop("seed")
        return Mixture([range(17), range(5)], [2, 1], seed=seed, num_samples=n + 7).sampler(**options)
    if kind == "grouped":
        sizes = np.diff([0, *sorted({min(n, at) for at in (1, 2, 2, 30, 31, 500, 4096)}), n])
        return GroupedSampler(sizes, groups_open=2, **options)
    return ShardedSampler(n, shuffle=kind == "shuffled", **options)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["shuffled", "ordered", "grouped", "weighted", "mixture"]),
    n=st.one_of(st.integers(0, 40), st.integers(4090, 4110)),
    batch=st.sampled_from([1, 6, 12]),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=2, max_size=3),
    tail=st.sampled_from(["pad", "drop", "uneven"]),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
    data=st.data(),
)
def test_an_epoch_is_the_same_however_it_is_shared_and_interrupted(kind, n, batch, worlds, tail, seed, epoch, data):
    """`worlds`: the numbers of ranks of consecutive runs; each stops somewhere, and the next one resumes there."""

    def ranks(world):
        return [
            make(kind, n, seed=seed, rank=r, num_replicas=world, tail=tail, batch_size=12 * batch // world)
            for r in range(world)
        ]

    (alone,) = ranks(1)
    alone.set_epoch(epoch)
    whole = list(alone)
    assert whole == [tuple(row) if kind == "mixture" else row for row in alone.indices(0, alone.length).tolist()]
    if kind in ("shuffled", "ordered", "grouped") and tail != "drop":
        assert sorted(whole[:n]) == list(range(n))

    state, done = alone.state_dict() | {"epoch": epoch, "position": 0}, 0
    for world in worlds:
        samplers = ranks(world)
        for sampler in samplers:
            sampler.load_state_dict(state)
        steps = data.draw(st.integers(0, (len(whole) - done) // world), label="steps")
        heads = [list(islice(iter(sampler), steps)) for sampler in samplers]
        assert [index for step in zip(*heads, strict=True) for index in step] == whole[done : done + steps * world]
        done += steps * world
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
        assert state["position"] == done
    last = ranks(worlds[0])
    for sampler in last:
        sampler.load_state_dict(state)
    assert interleaved(last) == whole[done:]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4097, MAX_N), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**30), data=st.data())
def test_any_two_positions_of_any_epoch_are_different_samples(n, seed, epoch, data):
    sampler = ShardedSampler(n, seed=seed, rank=0, num_replicas=1)
    sampler.set_epoch(epoch)
    start = data.draw(st.integers(0, n - 1000))
    found = sampler.indices(start, start + 1000)
    assert len(np.unique(found)) == 1000
    assert found.min() >= 0
    assert found.max() < n
    assert np.array_equal(found[500:501], sampler.indices(start + 500, start + 501))
