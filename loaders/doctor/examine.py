"""All checks in order, of a machine and of a dataset."""

from __future__ import annotations

import multiprocessing
from typing import Any

from loaders.benchmark.setups import spread_indices
from loaders.benchmark.target import dataset_of, is_stock, loader_argument
from loaders.doctor import behaviour, samples
from loaders.doctor.finding import Finding, exit_status
from loaders.doctor.imports import check_worker_imports
from loaders.doctor.machine import MACHINE_CHECKS
from loaders.doctor.open_files import check_open_files

SAMPLES = 32
_TWICE = 4  # samples that are read several times


def examine_machine() -> list[Finding]:
    """What `loaders doctor` reports about this machine."""
    return [check() for check in MACHINE_CHECKS]


def examine_dataset(target: Any, *, count: int = SAMPLES, batch_size: int = 64, spawn: bool = True) -> list[Finding]:
    """What `loaders doctor` reports about a dataset, or the dataset of a loader.

    Args:
        target: a dataset with `__getitem__` and `__len__`, or a loader over one.
        count: how many samples are read, spread over the whole dataset.
        batch_size: for the memory that batches need; a loader has its own.
        spawn: also start a spawned worker and time what it imports, which takes a few seconds.
    """
    dataset = dataset_of(target)
    length = len(dataset) if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") else None
    if length is None:
        kind = type(target if dataset is None else dataset).__name__
        return [
            Finding(
                "dataset",
                "warning",
                f"a {kind} has no items by number, so its samples are not looked at",
                "Give a dataset with __getitem__ and __len__: its randomness is keyed by sample, its order is free.",
            )
        ]
    if length == 0:
        return [
            Finding("dataset", "problem", f"the {type(dataset).__name__} is empty", "Look at the path it was given.")
        ]
    indices = spread_indices(length, min(count, length))
    batch_size = loader_argument(target, "batch_size") or batch_size
    reads = samples.read_samples(dataset, indices)
    declared = tuple(loader_argument(target, "fields") or ())
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_context().get_start_method()
    readable = [read.index for read in reads if read.error is None][:_TWICE]
    found = [
        Finding("dataset", "fine", f"{type(dataset).__name__} of {length:,} samples"),
        samples.check_reading(reads),
    ]
    if not readable:
        return found
    alike = [samples.check_fields(reads), samples.check_shapes(reads, declared)]
    if exit_status(alike) == 0:
        alike.append(behaviour.check_batching(dataset, readable, target))
    found += [
        *alike,
        samples.check_dtypes(reads),
        samples.check_tensors(reads),
        samples.check_contiguity(reads),
        samples.check_sizes(reads, batch_size),
        samples.check_slow_samples(reads),
        behaviour.check_determinism(dataset, readable),
        behaviour.check_repeated_augmentation(dataset, readable[0], stock=is_stock(target)),
        check_open_files(dataset),
        behaviour.check_pickling(dataset, method),
    ]
    if spawn:
        found += [behaviour.check_spawned_worker(dataset, readable[0]), check_worker_imports(dataset)]
    return found
