"""Checks of the arguments of a `DataLoader`, besides those that torch's own constructor makes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DistributedSampler, IterableDataset

from loaders.batch.spec import Field
from loaders.dataloader.auto_workers import AutoWorkers, first_workers, most_workers
from loaders.sampling.base import KeyedSampler


def check_arguments(
    dataset: Any,
    *,
    seed: int | None,
    worker_method: str,
    fields: Mapping[str, Field] | None,
    on_error: str,
    return_index: bool,
) -> None:
    """Check the arguments that torch's constructor does not know.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message says what is.
    """
    if worker_method not in ("process", "thread"):
        raise ValueError(f'worker_method should be "process" or "thread", but got {worker_method!r}')
    if on_error not in ("raise", "skip", "substitute"):
        raise ValueError(f'on_error should be "raise", "skip" or "substitute", but got {on_error!r}')
    if seed is not None and not 0 <= operator.index(seed) < 1 << 63:
        raise ValueError(f"seed should be at least 0 and less than 2**63, but got {seed}")
    if on_error != "raise" and isinstance(dataset, IterableDataset):
        raise ValueError(f"on_error={on_error!r} needs a map-style dataset: a stream cannot continue after an error")
    if return_index and isinstance(dataset, IterableDataset):
        raise ValueError("return_index=True needs a map-style dataset: the samples of a stream have no index")
    for name, declared in (fields or {}).items():
        if not isinstance(name, str) or not isinstance(declared, Field):
            raise TypeError(
                'fields should be a dict like {"boxes": Field(ragged=True)}; the fields of a tuple are "0", "1", …; '
                f"but got {name!r}: {declared!r}"
            )


def workers_of(num_workers: Any, dataset: Any) -> tuple[int, int]:
    """(initial workers, most workers) for the argument; where the number is fixed, the most is 0.

    Raises:
        ValueError: it is a string other than "auto".
    """
    if not isinstance(num_workers, (str, AutoWorkers)):
        return num_workers, 0
    if isinstance(num_workers, str) and num_workers != "auto":
        raise ValueError(f'num_workers should be an int or "auto", but got {num_workers!r}')
    # What a stream yields depends on the number of workers: one yields everything once, on every machine.
    first = (1, 0) if isinstance(dataset, IterableDataset) else (first_workers(), most_workers())
    return AutoWorkers(first[0]), first[1]


def check_sampler(sampler: Any) -> None:
    """Reject a DistributedSampler around one of our samplers that already shards over ranks.

    Raises:
        ValueError: each rank would see a share of its share.
    """
    if not isinstance(sampler, DistributedSampler):
        return
    inner: Any = sampler.dataset
    inner = getattr(inner, "_sampler", inner)  # Lightning wraps it once more
    if isinstance(inner, KeyedSampler) and inner.num_replicas > 1:
        raise ValueError(
            f"a {type(sampler).__name__} around a {type(inner).__name__} of {inner.num_replicas} ranks: each rank "
            "would see a share of its share. Ours already shards: pass it directly, in Lightning with "
            "Trainer(use_distributed_sampler=False)."
        )


def check_iteration(*, num_workers: int, timeout_s: float, pin_memory: bool, pin_memory_device: str) -> None:
    """Check and warn as torch does when an iteration begins, except about the number of workers."""
    if num_workers == 0 and timeout_s != 0:
        raise AssertionError("timeout needs worker processes or threads: without them there is nothing to wait for")
    if pin_memory and pin_memory_device:
        warnings.warn(f"pin_memory_device={pin_memory_device!r} is deprecated and ignored.", stacklevel=4)
    if pin_memory and not torch.accelerator.is_available():
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, "
            "then device pinned memory won't be used.",
            stacklevel=4,
        )
