"""A DecodedCache whose readers are killed at any instruction: what it has is right, and nobody waits for the dead."""

from __future__ import annotations

import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.patterns import WORDS, Patterns, pattern, read_at_random
from support.waiting import Killer, assert_no_workers, wait_until

from loaders import DataLoader, DecodedCache
from loaders.datasets.cache import records

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], DecodedCache]:
    def make_one(length: int) -> DecodedCache:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        path = folder / "cache" if request.param == "file" else None
        return DecodedCache(Patterns(length, folder / "log"), 256 << 20, path=path)

    return make_one


def assert_intact(cache: DecodedCache) -> None:
    """What is present is right to the last byte, and no two records overlap."""
    places = []
    store = cache._records
    for index in np.flatnonzero(store._table).tolist():
        sample = store.get(index)
        assert sample["label"] == index
        np.testing.assert_array_equal(sample["image"], pattern(index))
        offset = int(store._table[index])
        places.append((offset, offset + store._word(offset // 8 + records._NBYTES)))
    places.sort()
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))
    assert not places or places[-1][1] <= cache.cached_nbytes


def assert_still_fills(cache: DecodedCache) -> None:
    for _ in range(2):
        for index in range(len(cache)):
            assert cache[index]["label"] == index
    assert cache.cached_count == len(cache)
    assert_intact(cache)


# -- kills at each step of storing a sample


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def with_the_lock() -> None:
    flock = fcntl.flock

    def deadly(fd: int, operation: int) -> None:
        flock(fd, operation)
        if operation & fcntl.LOCK_EX:
            die()

    fcntl.flock = deadly


def after_the_claim() -> None:
    records._write = lambda *_: die()  # type: ignore[assignment, return-value]


def in_the_middle_of_the_bytes() -> None:
    pwritev = os.pwritev

    def deadly(fd: int, parts: list[Any], offset: int) -> int:
        whole = b"".join(bytes(part) for part in parts)
        pwritev(fd, [whole[: len(whole) // 2]], offset)
        die()
        return 0

    os.pwritev = deadly  # type: ignore[assignment]


def before_it_is_present() -> None:
    threading.Lock = die  # type: ignore[assignment, misc]


@pytest.mark.parametrize("moment", [with_the_lock, after_the_claim, in_the_middle_of_the_bytes, before_it_is_present])
def test_a_kill_at_any_step_leaves_the_sample_absent_and_all_others_right(
    make: Callable[[int], DecodedCache], moment: Callable[[], None]
) -> None:
    cache = make(6)
    cache[0], cache[1]

    def victim() -> None:
        moment()
        cache[2]

    for _ in range(2):
        process = FORK.Process(target=victim)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert cache.cached_count == 2
        assert_intact(cache)
    assert_still_fills(cache)


# -- kills at random


def test_random_kills_of_concurrent_readers_damage_nothing(make: Callable[[int], DecodedCache]) -> None:
    rng = random.Random(8)
    seeds = itertools.count()
    killed = 0

    def start(cache: DecodedCache) -> Any:
        process = FORK.Process(target=read_at_random, args=(cache, next(seeds)))
        process.start()
        return process

    def fill(cache: DecodedCache) -> None:
        nonlocal killed
        readers = [start(cache) for _ in range(3)]
        while cache.cached_count < len(cache):
            # Not to synchronise: the moment of the kill is random.
            wait([reader.sentinel for reader in readers], rng.uniform(0.0, 0.012))
            number = rng.randrange(len(readers))
            if killed < 40:
                os.kill(readers[number].pid, signal.SIGKILL)
                readers[number].join()
                killed += readers[number].exitcode == -signal.SIGKILL
                assert readers[number].exitcode in (0, -signal.SIGKILL)
                readers[number] = start(cache)
        for reader in readers:
            reader.join()
            assert reader.exitcode == 0

    # Where processes start slowly, a cache is full after few kills.
    while killed < 20:
        cache = make(150)
        fill(cache)
        assert_intact(cache)
        reads = cache.dataset.reads
        assert_still_fills(cache)
        assert cache.dataset.reads == reads


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_however_started_share_one_memory_and_the_second_epoch_reads_nothing(
    make: Callable[[int], DecodedCache], method: str
) -> None:
    cache = make(24)
    order = list(range(24))  # not one that is computed: nothing of a third epoch is read
    loader = DataLoader(cache, 4, sampler=order, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    epochs = [[batch["image"][:, -1] - WORDS + 1 for batch in loader] for _ in range(2)]
    for batches in epochs:
        assert torch.cat(batches).tolist() == [index << 32 for index in range(24)]
    # The very first sample may be read twice: it defines the shapes.
    assert 24 <= cache.dataset.reads <= 25
    assert 0.45 <= cache.hit_rate <= 0.55
    del loader
    assert_no_workers()
    assert_intact(cache)


def test_threads_share_it_too(make: Callable[[int], DecodedCache]) -> None:
    cache = make(24)
    for _ in range(2):
        loader = DataLoader(cache, 4, num_workers=2, worker_method="thread")
        assert torch.cat([batch["label"] for batch in loader]).tolist() == list(range(24))
    assert_intact(cache)
    assert cache.cached_count == 24
    assert 24 <= cache.dataset.reads <= 25


def test_a_loader_whose_workers_are_killed_gives_the_same_batches(make: Callable[[int], DecodedCache]) -> None:
    cache = make(200)
    iterator = iter(DataLoader(cache, 8, num_workers=2, multiprocessing_context="fork"))
    with Killer(iterator, random.Random(3), mean_s=0.01, at_most=12) as killer:
        labels = []
        for batch in iterator:
            labels += batch["label"].tolist()
            assert torch.equal(batch["image"][0], torch.from_numpy(pattern(int(batch["label"][0]))))
    assert labels == list(range(200))
    assert killer.killed
    assert_intact(cache)
    assert_still_fills(cache)


def test_independent_programs_fill_one_file(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from support.patterns import *; p = Path(sys.argv[2]); "
        "cache = DecodedCache(Patterns(80, p / 'log'), 256 << 20, path=p / 'cache'); "
        "read_at_random(cache, int(sys.argv[3]))"
    )
    tests = str(Path(__file__).parents[1])
    runs = [subprocess.Popen([sys.executable, "-c", program, tests, str(tmp_path), str(seed)]) for seed in range(3)]
    wait_until((tmp_path / "log").exists, "the first read")
    runs[0].kill()
    codes = [run.wait(60) for run in runs]
    assert codes[0] in (0, -signal.SIGKILL)
    assert codes[1:] == [0, 0]
    # With the identity from the file: the dataset's class has another module name in those programs.
    header = np.fromfile(tmp_path / "cache", np.int64, 1024)
    store = records.SharedRecords(80, 256 << 20, tmp_path / "cache", header[8:12].tobytes())
    for index in range(80):
        np.testing.assert_array_equal(store.get(index)["image"], pattern(index))
