"""Who reads what when. Samples are held up by a gate, never by a clock."""

import threading

import numpy as np
import pytest
from support import inside
from support.numpy_datasets import Gate, Numbers
from torch.utils.data import Sampler

from loaders import DataLoader, worker_info
from loaders.dataloader.dispatch import _SPAN_S
from loaders.dataloader.plan import Plan

# torch warns of more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

PROCESSES, THREADS = {"worker_method": "process"}, {"worker_method": "thread"}
both = pytest.mark.parametrize("how", [PROCESSES, THREADS], ids=["processes", "threads"])


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.close()


class Gated(Numbers):
    """Numbers that also tell who read them."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        info = worker_info()
        return {**sample, "worker": -1 if info is None else info.id}


class Drawn(Sampler):
    """Positions in order; counts how many were drawn."""

    def __init__(self, length):
        self.length = length
        self.count = 0

    def __len__(self):
        return self.length

    def __iter__(self):
        for position in range(self.length):
            self.count += 1
            yield position


def primed(gate, length=48, **arguments):
    """A loader that knows its samples' shape from an epoch before, so that batches are opened when one begins."""
    # A sampler of the user's: no batch of the epoch to come is made before it begins.
    own = {"sampler": list(range(length)), "num_workers": 2, "persistent_workers": True}
    loader = DataLoader(Gated(length, gate), **{**own, **arguments})
    for _ in loader:
        pass
    assert len(gate.entered(length)) == length
    inside.kept_of(loader).cost_s = 1e-6  # as on a machine without other work: a span is a worker's share of a batch
    return loader


def rows_ahead(loader):
    """How many samples workers may read before a batch is asked for."""
    return loader.batch_size * inside.plan_of(loader).depth(loader.num_workers)


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


@both
def test_the_first_batch_is_shared_by_all_workers(gate, how):
    gate.hold(1)
    loader = DataLoader(Gated(32, gate), 32, num_workers=2, **how)
    begun = []

    def let_go_when_all_others_are_read():
        # The worker that holds sample 1 cannot have read what comes after its span.
        begun.extend(gate.entered(2))
        while not {24, 25, 26, 27, 28, 29, 30, 31} <= set(begun):
            begun.extend(gate.entered(1))
        gate.open()

    helper = threading.Thread(target=let_go_when_all_others_are_read)
    helper.start()
    [batch] = loader
    helper.join()
    assert batch["label"].tolist() == list(range(32))
    assert set(batch["worker"].tolist()) == {0, 1}


@both
def test_a_slow_sample_of_the_very_first_batch_holds_up_no_other_batch(gate, how):
    gate.hold(1)
    loader = DataLoader(Gated(16, gate), 4, num_workers=2, **how)
    begun = set()

    def let_go_when_the_next_batch_is_read():
        try:
            while not {4, 5, 6, 7} <= begun:  # the shape of the samples is known from sample 0
                begun.update(gate.entered(1))
        finally:
            gate.open()

    helper = threading.Thread(target=let_go_when_the_next_batch_is_read)
    helper.start()
    assert labels(loader) == [list(range(start, start + 4)) for start in range(0, 16, 4)]
    helper.join()


@both
def test_one_slow_sample_holds_up_no_other_batch(gate, how):
    loader = primed(gate, batch_size=8, **how)
    gate.hold(3)  # the last of the first span: 8 rows, 2 workers, samples that cost nothing
    ahead = rows_ahead(loader)
    batches = iter(loader)
    assert set(gate.entered(ahead)) == set(range(ahead))  # all open batches are read while it hangs
    assert gate.is_quiet()
    gate.open()
    assert labels(batches) == [list(range(start, start + 8)) for start in range(0, 48, 8)]


@both
def test_a_slow_sample_occupies_one_worker_and_the_others_go_on(gate, how):
    loader = primed(gate, batch_size=8, num_workers=3, **how)
    gate.hold(2, 5)
    ahead = rows_ahead(loader)
    batches = iter(loader)
    assert set(gate.entered(ahead)) == set(range(ahead))
    gate.open(2)
    assert [label for batch in labels(batches) for label in batch] == list(range(48))


@both
def test_workers_fill_all_open_batches_while_the_consumer_is_away(gate, how):
    loader = primed(gate, batch_size=4, **how)
    ahead = rows_ahead(loader)
    batches = iter(loader)
    assert sorted(gate.entered(ahead)) == list(range(ahead))
    assert gate.is_quiet()
    assert next(batches)["label"].tolist() == [0, 1, 2, 3]
    assert sorted(gate.entered(4)) == list(range(ahead, ahead + 4))  # one handed out, one begun
    del batches


@both
@pytest.mark.parametrize(("factor", "workers"), [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_an_explicit_prefetch_factor_says_how_far_ahead_indices_are_drawn(how, factor, workers):
    sampler = Drawn(80)
    loader = DataLoader(
        Numbers(80), 4, sampler=sampler, num_workers=workers, prefetch_factor=factor, persistent_workers=True, **how
    )
    assert len(list(loader)) == 20
    sampler.count = 0
    batches = iter(loader)
    ahead = factor * workers  # as in torch's loader: before the first batch is asked for, and one more for each
    assert sampler.count == 4 * ahead
    for taken in range(1, 5):
        next(batches)
        assert sampler.count == 4 * (ahead + taken)


@both
@pytest.mark.parametrize("workers", [1, 2, 6])
def test_by_default_indices_are_drawn_equally_far_ahead_whatever_the_workers(how, workers):
    sampler = Drawn(96)
    loader = DataLoader(Numbers(96), 16, sampler=sampler, num_workers=workers, persistent_workers=True, **how)
    list(loader)
    sampler.count = 0
    batches = iter(loader)
    assert sampler.count == 16 * Plan(loader.dataset, loader.collate_fn, 16, True, None).depth(2)
    before = sampler.count
    next(batches)
    assert sampler.count == before + 16


def test_without_workers_indices_are_drawn_when_their_batch_is_asked_for():
    sampler = Drawn(12)
    batches = iter(DataLoader(Numbers(12), 4, sampler=sampler))
    for taken in range(4):
        assert sampler.count == 4 * taken
        next(batches, None)


@both
def test_out_of_order_a_later_batch_comes_while_the_first_hangs(gate, how):
    loader = primed(gate, length=24, batch_size=4, in_order=False, **how)
    gate.hold(0)
    batches = iter(loader)
    early = [next(batches)["label"].tolist()[0] for _ in range(5)]  # all but the one that hangs
    assert 0 not in early
    gate.open()
    rest = labels(batches)
    assert sorted(early + [each[0] for each in rest]) == [0, 4, 8, 12, 16, 20]


@both
def test_in_order_the_first_batch_comes_first_however_slow(gate, how):
    loader = primed(gate, length=24, batch_size=4, **how)
    gate.hold(0)
    batches = iter(loader)
    assert {0, 4, 5, 6, 7} <= set(gate.entered(rows_ahead(loader) - 1))  # sample 1 waits behind sample 0
    gate.open()
    assert next(batches)["label"].tolist() == [0, 1, 2, 3]
    del batches


# -- spans


@pytest.mark.parametrize(
    ("cost_s", "rows", "workers", "length"),
    [
        (1.0, 64, 2, 1),  # slow samples: each is a span
        (_SPAN_S, 64, 2, 2),
        (_SPAN_S / 4, 64, 2, 5),
        (1e-7, 64, 2, 32),  # fast ones: at least one span per worker
        (1e-7, 64, 3, 22),
        (1e-7, 1, 3, 1),
        (0.0, 64, 2, 8),  # unknown: several spans per worker, to learn from
    ],
)
def test_spans_take_about_as_long_as_they_should_and_every_worker_has_a_share(cost_s, rows, workers, length):
    loader = DataLoader(Numbers(64), 8, num_workers=workers, worker_method="thread")
    epoch = iter(loader)
    inside.dispatch_of(epoch).cost_s = cost_s
    spans = inside.dispatch_of(epoch).spans(0, rows)
    assert {stop - start for start, stop in spans[:-1]} <= {length}
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(rows))
    assert inside.dispatch_of(epoch).spans(rows, rows) == []


def test_the_cost_of_a_sample_is_learned_from_what_was_read():
    class Costly(Numbers):
        def __getitem__(self, index):
            total = sum(range(20_000))
            return {**super().__getitem__(index), "total": total}

    loader = DataLoader(Costly(16), 8, num_workers=1, worker_method="thread")
    epoch = iter(loader)
    dispatch = inside.dispatch_of(epoch)
    for _ in epoch:
        pass
    assert 1e-5 < dispatch.cost_s < 1


# -- leaving


@both
def test_an_epoch_left_half_way_reads_nothing_more(gate, how):
    loader = DataLoader(Gated(400, gate), 4, num_workers=2, **how)
    batches = iter(loader)
    next(batches)
    del batches
    begun = 0
    while not gate.is_quiet():
        begun += len(gate.entered(1))
    assert begun <= 4 + rows_ahead(loader) + 4  # the batch delivered, those open, and the one opened for it


def test_a_thread_that_is_late_never_writes_into_a_batch_of_another_epoch(gate, monkeypatch):
    monkeypatch.setattr("loaders.workers.threads._GRACE_S", 0.05)

    class Late(Numbers):
        late = False

        def read_into(self, index, out):
            if self.late and index == 3:
                self.gate.pass_by(index)  # waits until nobody waits for it any more
                index = 99
            out["label"][...] = index
            out["x"][...] = index
            if index == 99:
                self.gate.pass_by(index)

        def __getitem__(self, index):
            return {"x": np.full((2, 3), index, np.uint8), "label": index}

    dataset = Late(16, gate)
    loader = DataLoader(dataset, 4, num_workers=2, worker_method="thread")
    expected = labels(loader)
    gate.hold(3)
    dataset.late = True
    epoch = iter(loader)
    assert gate.entered(1) == [3]
    del epoch
    dataset.late = False
    batches = list(loader)
    blocks = [
        block for _ in range(16) for block in inside.pool_of(loader).acquire([1, 1])
    ]  # whatever is free, and more
    memory = inside.pool_of(loader).arena.buffer
    before = [memory[block.offset : block.offset + block.nbytes] for block in blocks]
    gate.open()
    assert gate.entered(1) == [99]
    assert labels(batches) == expected
    assert [memory[block.offset : block.offset + block.nbytes] for block in blocks] == before
