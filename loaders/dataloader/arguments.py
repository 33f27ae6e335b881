"""What is wrong with the arguments of a `DataLoader`: torch's own checks go on from here."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from loaders.batch.spec import Field
from loaders.dataloader.auto_workers import first_workers, most_workers

if TYPE_CHECKING:
    from loaders.dataloader.loader import DataLoader


def check_arguments(
    dataset: Any,
    *,
    seed: int | None,
    worker_method: str,
    fields: Mapping[str, Field] | None,
    on_error: str,
    return_index: bool,
) -> None:
    """Check what torch's constructor does not know.

    Raises:
        ValueError, TypeError: an argument is none that is allowed; the message says what is.
    """
    if worker_method not in ("process", "thread"):
        raise ValueError(f'worker_method should be "process" or "thread", but got {worker_method!r}')
    if on_error not in ("raise", "skip", "substitute"):
        raise ValueError(f'on_error should be "raise", "skip" or "substitute", but got {on_error!r}')
    if seed is not None and not 0 <= operator.index(seed) < 1 << 63:
        raise ValueError(f"seed should be at least 0 and less than 2**63, but got {seed}")
    if on_error != "raise" and isinstance(dataset, IterableDataset):
        raise ValueError(f"on_error={on_error!r} needs a map-style dataset: a stream cannot go on behind an error")
    if return_index and isinstance(dataset, IterableDataset):
        raise ValueError("return_index=True needs a map-style dataset: the samples of a stream have no index")
    for name, declared in (fields or {}).items():
        if not isinstance(name, str) or not isinstance(declared, Field):
            raise TypeError(
                'fields should be a dict like {"boxes": Field(ragged=True)}; the fields of a tuple are "0", "1", …; '
                f"but got {name!r}: {declared!r}"
            )


def workers_of(num_workers: Any, dataset: Any) -> tuple[int, int]:
    """(workers to begin with, the most there may be) for the argument; 0 for the most where the number is fixed.

    Raises:
        ValueError: it is text, and not "auto".
    """
    if not isinstance(num_workers, str):
        return num_workers, 0
    if num_workers != "auto":
        raise ValueError(f'num_workers should be an int or "auto", but got {num_workers!r}')
    # What a stream gives depends on how many share it: one gives everything once, on every machine.
    return (1, 0) if isinstance(dataset, IterableDataset) else (first_workers(), most_workers())


def check_iteration(loader: DataLoader[Any]) -> None:
    """What torch checks and warns about when an iteration begins."""
    if loader.num_workers > 0:
        loader.check_worker_number_rationality()
    elif loader.timeout != 0:
        raise AssertionError("timeout needs worker processes or threads: without them there is nobody to wait for")
    if loader.pin_memory and loader.pin_memory_device:
        warnings.warn(f"pin_memory_device={loader.pin_memory_device!r} is deprecated and ignored.", stacklevel=4)
    if loader.pin_memory and not torch.accelerator.is_available():
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, "
            "then device pinned memory won't be used.",
            stacklevel=4,
        )
