"""Checks of the dataset itself: its randomness, its copies, how it reaches workers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.benchmark.target import loader_argument
from loaders.bridge import to_numpy
from loaders.doctor.finding import Finding
from loaders.nested import leaves

_LARGE_NBYTES = 256 << 20
_TOO_LARGE_NBYTES = 1 << 30  # to be copied just for a check
_REPETITIONS = 4
_EVERY_RUN_S = 60.0


def check_determinism(dataset: Any, indices: Sequence[int]) -> Finding:
    """Whether a sample is the same when it is read again under the same key."""
    check = "determinism"
    first, again = (_read(dataset, indices, seed=0) for _ in range(2))
    for found in (first, again):
        if isinstance(found, Exception):
            return Finding(
                check,
                "problem",
                f"samples that can be read alone cannot be in a loader: {type(found).__name__}: {found}",
                "Read it with DataLoader(dataset, num_workers=0) and follow the traceback.",
            )
    assert not isinstance(first, Exception)
    assert not isinstance(again, Exception)
    if _differ(first, again):
        return Finding(
            check,
            "problem",
            "the same sample under the same key differs from one time to the next: it draws from a generator of its "
            "own, from the clock, or it changes what it reads from",
            "Draw from loaders.sample_rng() in __getitem__ and in transforms.",
        )
    other = _read(dataset, indices, seed=1)
    drawn = not isinstance(other, Exception) and _differ(first, other)
    return Finding(check, "fine", "equal keys give equal samples" + (", other keys others" if drawn else ""))


def check_repeated_augmentation(dataset: Any, index: int, *, stock: bool = False) -> Finding:
    """Whether workers would repeat each other: copies of the dataset that draw the same numbers, whatever their keys.

    Two copies stand for two workers. Numbers from a generator that is copied with the dataset repeat; those keyed by
    the sample do not.

    Args:
        stock: for torch's own DataLoader, which keys nothing: there an albumentations pipeline repeats, too.
    """
    check = "augmentation in workers"
    try:
        if _sent_nbytes(dataset) > _TOO_LARGE_NBYTES:
            return Finding(check, "fine", "not looked at: the dataset is too large to be copied for it")
        copies = [copy.deepcopy(dataset) for _ in range(2)]
    except Exception as error:
        return Finding(check, "fine", f"not looked at: the dataset cannot be copied ({type(error).__name__}: {error})")
    indices = [index] * _REPETITIONS
    ours, others = (
        _read_plainly(one, indices) if stock else _read(one, indices, seed) for seed, one in enumerate(copies)
    )
    if isinstance(ours, Exception) or isinstance(others, Exception):
        return Finding(check, "fine", "not looked at: the sample cannot be read")
    if not any(_differ([ours[0]], [each]) for each in ours[1:]):
        return Finding(check, "fine", "nothing is drawn")
    if not _differ(ours, others):
        return Finding(
            check,
            "problem",
            "two workers draw the same numbers: a generator is part of the dataset, and each worker starts from the "
            "same copy of it, in every epoch" + (" of torch's own DataLoader" if stock else ""),
            "Draw from loaders.sample_rng() in __getitem__; wrap albumentations in loaders.Albumentations"
            + (", or use loaders.DataLoader." if stock else "."),
        )
    return Finding(check, "fine", "two workers draw differently")


def check_batching(dataset: Any, indices: Sequence[int], target: Any) -> Finding:
    """Whether samples can form a batch, with the collate_fn and the fields of `target` if it is a loader."""
    from loaders.dataloader.loader import DataLoader

    is_batched = not hasattr(target, "batch_sampler") or target.batch_sampler is not None
    options = {name: value for name in ("collate_fn", "fields") if (value := loader_argument(target, name)) is not None}
    try:
        next(iter(DataLoader(dataset, len(indices) if is_batched else None, sampler=list(indices), **options)))
    except Exception as error:
        return Finding(
            "batches",
            "problem",
            f"{len(indices)} samples make no batch: {type(error).__name__}: {error}",
            "Give arrays, numbers or text in each field, or a collate_fn that knows what to do.",
        )
    return Finding("batches", "fine", "samples go together")


def check_pickling(dataset: Any, method: str = "fork") -> Finding:
    """Whether the dataset can be sent to spawned workers, and how large it is then.

    Args:
        method: how workers are started here; under fork nothing is sent.
    """
    severity: Any = "warning" if method == "fork" else "problem"
    try:
        nbytes = _sent_nbytes(dataset)
    except Exception as error:
        return Finding(
            "pickling",
            severity,
            f"the dataset cannot be pickled, so workers cannot be spawned: {type(error).__name__}: {error}",
            "Put functions at the top of a module in place of lambdas, and open files when they are first read.",
        )
    if nbytes > _LARGE_NBYTES:
        return Finding(
            "pickling",
            "warning",
            f"{nbytes / 1e6:,.0f} MB: each spawned worker gets, and keeps, a copy",
            "Leave data in files (np.load(mmap_mode='r')), or keep it in a DecodedCache, which all workers share.",
        )
    return Finding("pickling", "fine", f"{nbytes / 1e3:,.1f} KB")


def check_spawned_worker(dataset: Any, index: int) -> Finding:
    """Whether a newly started worker gives the same sample as this process."""
    from loaders.dataloader.loader import DataLoader
    from loaders.errors import LoadersError

    check, here = "a spawned worker", _read(dataset, [index], seed=0)
    try:
        if _sent_nbytes(dataset) > _TOO_LARGE_NBYTES:
            return Finding(check, "fine", "not looked at: the dataset is too large to be sent for it")
    except Exception as error:
        return Finding(check, "fine", f"not looked at: the dataset cannot be pickled ({type(error).__name__})")
    if isinstance(here, Exception):
        return Finding(check, "fine", "not looked at: the sample cannot be read")
    loader: Any = DataLoader(
        dataset,
        batch_size=None,
        sampler=[index],
        seed=0,
        num_workers=1,
        multiprocessing_context="spawn",
        timeout=_EVERY_RUN_S,
    )
    try:
        there = [_fields(sample) for sample in loader]
    except (LoadersError, ImportError, AttributeError, pickle.PickleError, OSError, RuntimeError) as error:
        told = str(error).strip().splitlines()
        return Finding(
            check,
            "problem",
            f"cannot read a sample: {type(error).__name__}: {told[0] if told else 'no message'}",
            "Let the dataset depend only on what it holds and what its module imports, not on what __main__ has set.",
        )
    if _differ(here, there):
        return Finding(
            check,
            "problem",
            "gives another sample than this process, under the same key",
            "Let the dataset depend only on what it holds, not on variables that the program has set.",
        )
    return Finding(check, "fine", "gives the same sample as this process")


def _sent_nbytes(dataset: Any) -> int:
    """Size in bytes of the pickled dataset, which must also unpickle. Arrays are counted, not copied."""
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
    pickle.loads(sent, buffers=buffers)
    return len(sent) + sum(buffer.raw().nbytes for buffer in buffers)


def _read(dataset: Any, indices: Sequence[int], seed: int) -> list[dict[str, Any]] | Exception:
    """The fields of samples as our loader gives them without workers, under the keys of `seed`; or the exception."""
    from loaders.dataloader.loader import DataLoader

    loader: Any = DataLoader(dataset, batch_size=None, sampler=list(indices), seed=seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only arrays: these are only read
            return [_fields(sample) for sample in loader]
    except Exception as error:
        return error


def _read_plainly(dataset: Any, indices: Sequence[int]) -> list[dict[str, Any]] | Exception:
    """The same by plain indexing, as in a worker of torch's own loader."""
    try:
        return [_fields(dataset[index]) for index in indices]
    except Exception as error:
        return error


def _fields(sample: Any) -> dict[str, Any]:
    """Copies of a loader's sample, as arrays again."""
    return dict(leaves(to_numpy(sample)))


def _differ(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether the samples differ in any bit."""
    return [_bytes_of(sample) for sample in ours] != [_bytes_of(sample) for sample in others]


def _bytes_of(sample: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, np.asarray(value).tobytes() if hasattr(value, "__array__") else repr(value))
        for name, value in sample.items()
    ]
