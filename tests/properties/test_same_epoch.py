"""Whatever reads an epoch, and wherever it is interrupted, it has the same bits as in a plain loop."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import inside
from support.photo_zoo import jpeg, photo
from support.waiting import assert_no_workers

from loaders import DataLoader, ImageFolder, RandomResizedCrop, ShardedSampler, sample_rng
from loaders.randomness.streams import Domain, enter_sample, keyed_word, leave_sample

# More workers than this machine may have cores, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")

SEED = 2**40 + 7
N = 61
GLOBAL_BATCH = 8
BATCHES = 8  # 61 samples and 3 of padding


class Draws:
    """Draws from everything keyed; with `everywhere` also from the process's generators, which threads share."""

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {
            "index": index,
            "image": sample_rng().integers(0, 256, (3, 2), np.uint8),
            "more": sample_rng().normal(),
        }
        if self.everywhere and index % 3 == 0:  # not every sample does
            return {**sample, "process": np.array([random.gauss(0, 1), np.random.randn(), torch.randn(()).item()])}
        return {**sample, "process": np.zeros(3)}


@dataclass(frozen=True)
class Case:
    """How an epoch is read: up to batch `stop` by `world` ranks, then by `other_world` ranks to the end.

    Attributes:
        engine: inline, thread, or the method by which worker processes are started.
        kill: the batch after which a worker of every rank is killed; None for no kill.
    """

    engine: str
    workers: int
    other_workers: int
    world: int
    other_world: int
    stop: int
    kill: int | None
    epoch: int


def plain_loop(epoch: int, everywhere: bool) -> list[str]:
    """The epoch by its definition alone: no loader, no worker, one sample after the other."""
    dataset, sampler = Draws(everywhere), ShardedSampler(N, seed=5, rank=0, num_replicas=1, batch_size=GLOBAL_BATCH)
    sampler.set_epoch(epoch)
    hashes, generators = [], (random.getstate(), np.random.get_state(), torch.get_rng_state())
    for batch in range(BATCHES):
        rows = []
        for position in range(batch * GLOBAL_BATCH, (batch + 1) * GLOBAL_BATCH):
            enter_sample(SEED, epoch, position)
            word = keyed_word(Domain.PROCESS, SEED, epoch, position)
            random.seed(word)
            np.random.seed(word & 0xFFFFFFFF)
            torch.manual_seed(word)
            (index,) = sampler.indices(position, position + 1).tolist()
            rows.append(dataset[index])
        leave_sample()
        hashes.append(hash_of([{name: np.stack([row[name] for row in rows]) for name in rows[0]}]))
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    torch.set_rng_state(generators[2])
    return hashes


def hash_of(ranks: list[dict[str, Any]]) -> str:
    """The hash of one batch of every rank: row j of rank r stands at position j · world + r of the global batch."""
    digest = hashlib.sha256()
    for name in ranks[0]:
        digest.update(np.ascontiguousarray(np.stack([np.asarray(rank[name]) for rank in ranks], axis=1)).tobytes())
    return digest.hexdigest()


def read(case: Case, world: int, workers: int, state: dict[str, Any] | None, stop: int) -> tuple[list[str], Any]:
    """The hashes of the global batches up to `stop`, and the state that all ranks agree on there."""
    arguments: dict[str, Any] = {"num_workers": 0}
    if case.engine == "thread" and workers:
        arguments = {"num_workers": workers, "worker_method": "thread"}
    elif case.engine != "inline" and workers:
        arguments = {"num_workers": workers, "multiprocessing_context": case.engine}
    ranks, states = [], []
    for rank in range(world):
        size = GLOBAL_BATCH // world
        sampler = ShardedSampler(N, seed=5, rank=rank, num_replicas=world, batch_size=size)
        loader = DataLoader(Draws(case.engine != "thread"), size, sampler=sampler, seed=SEED, **arguments)
        if state is None:
            loader.set_epoch(case.epoch)
        else:
            loader.load_state_dict(state)
        iterator, batches = iter(loader), []
        for batch in iterator:
            batches.append({name: value.clone() for name, value in batch.items()})
            if case.kill == len(batches) and case.engine not in ("inline", "thread") and workers:
                os.kill(next(iter(inside.processes_of(iterator))).process.pid, signal.SIGKILL)
            if len(batches) == stop:
                break
        ranks.append(batches)
        states.append(loader.state_dict())
        del iterator
    assert all(each == states[0] for each in states)
    return [hash_of(list(batch)) for batch in zip(*ranks, strict=True)], states[0]


def check(case: Case) -> None:
    begun, state = read(case, case.world, case.workers, None, case.stop) if case.stop else ([], None)
    rest = []
    if case.stop < BATCHES:
        rest, _ = read(case, case.other_world, case.other_workers, state, BATCHES - case.stop)
    assert begun + rest == plain_loop(case.epoch, everywhere=case.engine != "thread")


WORKERS, WORLDS = st.sampled_from([0, 1, 2, 4]), st.sampled_from([1, 2, 4])
CASES = st.builds(
    Case,
    engine=st.sampled_from(["inline", "thread", "fork"]),
    workers=WORKERS,
    other_workers=WORKERS,
    world=WORLDS,
    other_world=WORLDS,
    stop=st.integers(0, BATCHES),
    kill=st.none() | st.integers(1, 3),
    epoch=st.integers(0, 2),
)


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(CASES)
@example(Case("inline", 0, 0, 1, 2, 3, None, 0))
@example(Case("inline", 0, 0, 4, 1, 5, None, 1))
@example(Case("thread", 2, 4, 2, 4, 2, None, 1))
@example(Case("fork", 2, 0, 1, 4, 4, 1, 0))
@example(Case("fork", 1, 4, 2, 1, 4, 2, 1))
@example(Case("fork", 0, 2, 2, 2, 1, 1, 2))
@example(Case("fork", 4, 1, 1, 1, BATCHES, 3, 1))
def test_every_way_of_reading_an_epoch_gives_the_bits_of_a_plain_loop(case: Case) -> None:
    check(case)
    assert_no_workers()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_freshly_started_workers_give_the_bits_of_a_plain_loop(method: str) -> None:
    check(Case(method, 2, 0, 1, 2, 4, 1, 1))
    assert_no_workers()


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}])
def test_random_crops_are_those_of_a_plain_loop(tmp_path: Path, workers: dict[str, Any]) -> None:
    (tmp_path / "class").mkdir()
    for number in range(N):
        (tmp_path / "class" / f"{number:02d}.jpg").write_bytes(jpeg(photo(40 + number, 90 - number)))
    dataset = ImageFolder(tmp_path, crop=RandomResizedCrop(8))
    loader = DataLoader(dataset, GLOBAL_BATCH, seed=SEED, **workers)
    loader.set_epoch(1)
    found = torch.cat([batch["image"] for batch in loader]).numpy()
    for position in range(N):
        enter_sample(SEED, 1, position)
        np.testing.assert_array_equal(found[position], dataset[position]["image"])
    leave_sample()
    assert_no_workers()
