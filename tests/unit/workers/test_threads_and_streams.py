"""Streams that split themselves by torch's `get_worker_info()`, in threads, of which it knows nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch.utils.data
from torch.utils.data import IterableDataset, get_worker_info

from loaders import DataLoader, worker_info

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def share_of(info: Any) -> range:
    return range(info.id, 12, info.num_workers) if info is not None else range(12)


class AsksTorch(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(share_of(get_worker_info()))


class AsksTorchLate(IterableDataset[int]):
    """As libraries do it: deep inside, with the first sample."""

    def __iter__(self) -> Iterator[int]:
        yield from (number for number in share_of(torch.utils.data.get_worker_info()))


class AsksUs(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(share_of(worker_info()))


class AsksBoth(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(share_of(get_worker_info() or worker_info()))


class AsksNobody(IterableDataset[int]):
    """Endless streams of random numbers do."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


def read(dataset: Any, **how: Any) -> tuple[list[int], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader: Any = DataLoader(dataset, 2, **how)
        samples = [sample for _ in range(2) for batch in loader for sample in batch.tolist()]
    return sorted(samples), [text for each in caught if "loaders.worker_info" in (text := str(each.message))]


@pytest.mark.parametrize("kind", [AsksTorch, AsksTorchLate])
def test_a_stream_that_every_thread_reads_whole_is_told_once(kind: Any) -> None:
    samples, [note] = read(kind(), num_workers=3, worker_method="thread")
    assert samples == sorted([*range(12)] * 6)
    assert note.startswith(f"{__name__}.__iter__ (line ")
    assert "calls torch.utils.data.get_worker_info()" in note
    assert "each of the 3 threads reads the whole stream" in note


@pytest.mark.parametrize("kind", [AsksUs, AsksBoth, AsksNobody])
def test_one_that_asks_us_or_nobody_is_not(kind: Any) -> None:
    assert read(kind(), num_workers=2, worker_method="thread")[1] == []


@pytest.mark.parametrize(
    "how",
    [{}, {"num_workers": 1, "worker_method": "thread"}, {"num_workers": 2, "multiprocessing_context": "fork"}],
    ids=["inline", "one thread", "processes"],
)
def test_nor_one_that_is_read_once(how: dict[str, Any]) -> None:
    samples, notes = read(AsksTorch(), **how)
    assert (samples, notes) == (sorted([*range(12)] * 2), [])


def test_nobody_s_profiler_is_taken_away_or_left_behind() -> None:
    seen: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        seen.append(event)

    sys.setprofile(profile)
    try:
        read(AsksTorch())
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert "call" in seen
    read(AsksTorch())
    assert sys.getprofile() is None
