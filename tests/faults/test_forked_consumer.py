"""The consumer forks in the middle of an epoch: neither side disturbs the other."""

import gc
import multiprocessing
import os
import sys
import traceback

import numpy as np
import pytest
from support import inside

from loaders import DataLoader
from loaders.errors import WorkerLostError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
ENGINES = {
    "inline": {"num_workers": 0},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "thread, persistent": {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
    "process": {"num_workers": 2, "multiprocessing_context": "fork"},
    "process, persistent": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
}


class Numbers:
    """Rows of float32 full of their index, and the index."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.full(1000, index, np.float32), index


def assert_epoch(batches, start=0):
    for number, (rows, labels) in enumerate(batches, start):
        assert labels.tolist() == list(range(4 * number, 4 * number + 4))
        assert (rows == labels[:, None]).all()
    assert number == 15


class Fork:
    """A child that runs `work(wait)`; `wait()` returns once the parent calls `end()`."""

    def __init__(self, work, *, through_exit=False):
        wait, self._go = os.pipe()
        self._report, report = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            status = 1
            try:
                work(lambda: os.read(wait, 1))
                status = 0
            except BaseException:  # reported to the parent
                os.write(report, traceback.format_exc().encode()[-4000:])
            if through_exit:
                # As when the interpreter ends: finalizers at exit, then every object that is left.
                import atexit

                atexit._run_exitfuncs()
                gc.collect()
            os._exit(status)
        os.close(wait)
        os.close(report)

    def end(self):
        os.write(self._go, b"!")
        os.close(self._go)
        said = os.read(self._report, 4000).decode()
        os.close(self._report)
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, said


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def loader(request):
    return DataLoader(Numbers(), batch_size=4, **request.param)


@pytest.mark.parametrize("debug", ["", "slots"])
def test_a_child_that_ends_with_a_live_iterator_disturbs_no_batch_of_its_parent(loader, debug, monkeypatch):
    monkeypatch.setenv("LOADERS_DEBUG", debug)
    batches = iter(loader)
    rows, labels = next(batches)

    def drop_all(wait):
        nonlocal batches, rows, labels
        batches = rows = labels = None
        gc.collect()
        wait()

    children = [Fork(drop_all, through_exit=exits) for exits in (False, True)]
    (second, labels_of_second) = next(batches)
    for child in children:
        child.end()
    assert (rows == labels[:, None]).all()
    assert (second == labels_of_second[:, None]).all()
    assert_epoch(batches, 2)
    assert_epoch(loader)


class Gated(Numbers):
    """From the third batch on, samples wait for `gate`."""

    def __init__(self, gate):
        self.gate = gate

    def __getitem__(self, index):
        if index >= 8:
            assert self.gate.wait(60)
        return super().__getitem__(index)


def test_a_child_that_drops_its_iterator_cancels_nothing_that_the_parents_workers_are_doing():
    dataset = Gated(multiprocessing.get_context("fork").Event())
    loader = DataLoader(dataset, batch_size=4, **ENGINES["process, persistent"])
    batches = iter(loader)
    for _ in range(2):
        next(batches)

    def drop(wait):
        nonlocal batches
        del batches
        gc.collect()

    Fork(drop).end()
    dataset.gate.set()
    assert_epoch(batches, 2)


def test_a_child_may_iterate_the_loader_it_inherited_while_its_parent_goes_on(loader):
    batches = iter(loader)
    next(batches)

    def iterate(wait):
        assert_epoch(loader)
        wait()
        assert_epoch(loader)

    child = Fork(iterate)
    assert_epoch(batches, 1)
    child.end()
    assert_epoch(loader)


def test_an_iterator_whose_workers_are_the_parents_says_so_in_the_child(loader):
    batches = iter(loader)
    next(batches)

    def go_on(wait):
        if loader.num_workers == 0:
            assert_epoch(batches, 1)
        else:
            with pytest.raises(WorkerLostError, match=r"belong to process .*\n  Iterate the loader itself"):
                next(batches)

    Fork(go_on).end()
    assert_epoch(batches, 1)


def test_a_batch_the_child_inherited_keeps_its_bytes_while_the_parent_goes_on(loader):
    batches = iter(loader)
    held = next(batches)

    def look(wait):
        rows, labels = held
        wait()
        assert labels.tolist() == [0, 1, 2, 3]
        assert (rows == labels[:, None]).all()

    child = Fork(look)
    held.clear()
    assert_epoch(batches, 1)
    assert_epoch(loader)
    child.end()
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader).leased_count == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_workers_of_a_loader_hold_no_batch_that_was_held_when_they_started():
    other = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    held = [next(iter(loader)) for _ in range(3)]
    assert_epoch(other)  # its workers live on
    held.clear()
    assert_epoch(loader)
    gc.collect()
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader).leased_count == 0


def test_torchs_own_workers_may_read_a_batch_that_their_parent_has_dropped():
    """Under fork a stock DataLoader over a batch reads what it inherited, for as long as its workers live."""
    from torch.utils.data import DataLoader as Stock
    from torch.utils.data import TensorDataset

    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    batches = iter(loader)
    dataset = TensorDataset(*next(batches))
    stock = Stock(dataset, batch_size=2, num_workers=1, prefetch_factor=1, multiprocessing_context="fork")
    reading = iter(stock)
    dataset.tensors = ()  # only here: the workers have a copy
    assert_epoch(batches, 1)
    assert_epoch(loader)
    for number, (rows, labels) in enumerate(reading):
        assert (rows == labels[:, None]).all()
        assert labels.tolist() == [2 * number, 2 * number + 1]
