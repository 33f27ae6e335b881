"""However a loader ends, many times over, no process, thread, descriptor, mapping or byte is left."""

import gc
import itertools
import os
import sys
import threading
import time
from collections import Counter
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import numpy as np
import pytest
from support import inside

from loaders import DataLoader
from loaders.memory import registry
from loaders.memory.arena import PAGE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")

TIMES = 40


class Numbers:
    """Rows of float32 full of their index, and the index; sample `broken` raises."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError("no such number")
        return np.full(600, index, np.float32), index


def children() -> list[str]:
    """The child processes except multiprocessing's servers, which stay once a test has needed them."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    servers = {resource_tracker._resource_tracker._pid, forkserver._forkserver._forkserver_pid}
    return [pid for pid in pids if int(pid) not in servers]


def descriptors() -> Counter:
    """How many descriptors of each kind are open."""
    links = [Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd")]
    return Counter(os.readlink(link).split(":")[0] for link in links if os.path.lexists(link))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:loaders")


def left() -> dict[str, object]:
    """All that a loader could leave behind."""
    gc.collect()
    return {
        "processes": children(),
        "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("loaders-")],
        "descriptors": descriptors(),
        "mappings": mappings(),
        "pools": len(registry.shared),
    }


def private_mappings() -> int:
    """How many mappings the size of a loader's address range belong to no file."""
    large = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        large += stop - start > 1 << 32 and line.split()[4] == "0"
    return large


def exhausted(loader):
    assert sum(len(labels) for _, labels in loader) == 64


def never_advanced(loader):
    iter(loader)


def half_way(loader):
    for _ in itertools.islice(loader, 3):
        pass


def half_way_with_batches_held(loader):
    held = list(itertools.islice(loader, 5))
    del loader
    assert held[4][0][0, 0] == 16


def outlived_by_its_iterator(loader):
    batches = iter(loader)
    del loader
    next(batches)


def two_iterators(loader):
    for _ in itertools.islice(zip(loader, loader, strict=True), 2):
        pass


def left_by_an_exception(loader):
    with pytest.raises(RuntimeError, match="of the consumer"):  # noqa: PT012  # it must leave the loop
        for _ in loader:
            raise RuntimeError("of the consumer")


def in_a_cycle(loader):
    batches = iter(loader)
    cycle = [loader, batches, next(batches)]
    cycle.append(cycle)


def nested(loader):
    for _ in itertools.islice(loader, 2):
        for _ in itertools.islice(loader, 2):
            pass


ENDS = [
    exhausted,
    never_advanced,
    half_way,
    half_way_with_batches_held,
    outlived_by_its_iterator,
    two_iterators,
    left_by_an_exception,
    in_a_cycle,
    nested,
]
ENGINES = {
    "inline": {"num_workers": 0},
    "thread": {"num_workers": 2, "worker_method": "thread"},
    "thread, persistent": {"num_workers": 2, "worker_method": "thread", "persistent_workers": True},
    "process": {"num_workers": 1, "multiprocessing_context": "fork"},
    "process, persistent": {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True},
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@pytest.fixture(autouse=True)
def _quick_collections():
    gc.collect()
    gc.freeze()


@every_engine
def test_many_loaders_that_end_in_every_way_leave_nothing(engine):
    half_way(DataLoader(Numbers(), batch_size=4, **engine))
    before, before_private = left(), private_mappings()
    for number in range(TIMES):
        ENDS[number % len(ENDS)](DataLoader(Numbers(), batch_size=4, **engine))
    assert left() == before
    assert private_mappings() == before_private


@every_engine
def test_many_epochs_of_one_loader_that_end_in_every_way_add_nothing(engine):
    loader = DataLoader(Numbers(), batch_size=4, **engine)
    half_way(loader)
    exhausted(loader)
    before, reserved = left(), inside.pool_of(loader).arena.reserved_nbytes
    for number in range(TIMES):
        ENDS[number % len(ENDS)](loader)
    assert left() == before
    inside.pool_of(loader).reclaim()
    assert inside.pool_of(loader).leased_count == 0
    assert inside.pool_of(loader).arena.reserved_nbytes <= 2 * reserved


@every_engine
def test_exceptions_of_the_dataset_leave_nothing(engine):
    loader = DataLoader(Numbers(broken=21), batch_size=4, **engine)
    with pytest.raises(ValueError, match="no such number"):
        list(loader)
    before = left()
    for _ in range(12):
        with pytest.raises(ValueError, match="no such number"):
            list(loader)
    assert left() == before
    del loader
    assert left()["processes"] == []


@pytest.mark.parametrize("engine", [ENGINES["process"], ENGINES["thread"]], ids=["process", "thread"])
def test_descriptors_do_not_grow_with_the_number_of_batches_held(engine):
    gc.collect()
    others = mappings()
    loader = DataLoader(Numbers(), batch_size=1, **engine)
    batches = iter(loader)
    held = [next(batches) for _ in range(5)]
    few = sum(descriptors().values())
    mapped = mappings()
    held += itertools.islice(batches, 50)
    assert len(held) == 55
    assert sum(descriptors().values()) == few
    assert mappings() == mapped <= others + 1


def test_the_descriptors_of_a_loader_are_few_and_known():
    before = descriptors()
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    batches = iter(loader)
    next(batches)
    opened = descriptors() - before
    assert opened["/memfd"] == 2  # the memory's, and a copy that Python's mmap makes
    assert opened["socket"] == 2  # one per worker
    assert opened["pipe"] == 2 + 2 + 2 * 2  # spans, results, and those by which multiprocessing watches each worker
    assert sum(opened.values()) <= 14


@pytest.mark.parametrize("engine", [ENGINES["process"], ENGINES["process, persistent"]], ids=["process", "persistent"])
def test_workers_that_are_killed_leave_nothing(engine):
    before = left()
    for _ in range(10):
        loader = DataLoader(Numbers(), batch_size=4, **engine)
        batches = iter(loader)
        next(batches)
        for child in children():
            os.kill(int(child), 9)
        assert sum(1 for _ in batches) == 15
        del loader, batches
    assert left() == before


def test_a_worker_that_is_reading_when_its_loader_is_dropped_is_gone_with_it(monkeypatch):
    monkeypatch.setattr("loaders.workers.supervisor._GRACE_S", 0.1)

    class Stuck(Numbers):
        def __getitem__(self, index):
            if index == 20:
                time.sleep(600)
            return super().__getitem__(index)

    before = left()
    for number in range(5):
        loader = DataLoader(
            Stuck(), batch_size=4, num_workers=2, multiprocessing_context="fork", persistent_workers=number % 2
        )
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        del loader, batches
    assert left() == before


def test_memory_of_abandoned_epochs_is_reused():
    """A slot that a worker still writes to when its iterator is dropped is reused once the worker is done."""
    loader = DataLoader(
        Numbers(),
        batch_size=4,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=True,
        prefetch_factor=4,
    )
    exhausted(loader)
    slot, open_at_once = 3 * PAGE + PAGE, 2 * 4
    for _ in range(TIMES):
        never_advanced(loader)
        half_way(loader)
        # The slots of this epoch, of the last one, and of one whose workers have not reported yet that they are done.
        assert inside.pool_of(loader).arena.reserved_nbytes <= 4 * open_at_once * slot
    exhausted(loader)
