"""Several samples at once: datasets that write rows together, and what `__getitems__` returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.datasets.read_into import owns_read_into
from loaders.datasets.wrapped import bases, resolve
from loaders.errors import SampleError
from loaders.workers.messages import Job, Keys, Result


class RowsTogether:
    """What a worker knows about the `read_rows_into` of its dataset.

    Attributes:
        offered: whether the dataset may have one.
        error: that it raised in this span; None if it raised none.
    """

    def __init__(self, dataset: Any) -> None:
        self.offered = writes_together(dataset)
        self.error: Exception | None = None
        self._dataset, self._has_told = dataset, False

    def tell(self, result: Result, notes: list[str]) -> None:
        """Add an error to `notes`, once, if each of the samples could then be read by itself.

        Args:
            result: of the span.
            notes: that the caller is warned of.
        """
        error, self.error = self.error, None
        if error is not None and not (self._has_told or result.failures or result.cancelled):
            self._has_told = True
            [base] = bases(self._dataset)
            notes.append(f"{type(base).__name__}.read_rows_into raised {error!r}; samples are read one by one.")


def writes_together(dataset: Any) -> bool:
    """Whether the dataset, or the one inside its `Subset`, may have a `read_rows_into`."""
    found = list(bases(dataset))
    return len(found) == 1 and owns_read_into(type(found[0]), "read_rows_into")


def together(dataset: Any, keys: Sequence[Any], out: Any) -> bool:
    """Let the dataset write several samples into the arrays of `out`. Returns whether it can."""
    [base] = bases(dataset)
    read_rows_into = getattr(base, "read_rows_into", None)
    if read_rows_into is None:
        return False
    read_rows_into(keys if base is dataset else [resolve(dataset, key)[1] for key in keys], out)
    return True


def read_together(job: Job, keys: Sequence[Any]) -> Any:
    """What `__getitems__` returns for these keys: usually a list with one sample for each.

    Raises:
        SampleError: it returned something else, and each sample must be matched with its key.
    """
    # Never the task's own list: the dataset may change what it is given.
    asked = keys.given if isinstance(keys, Keys) else list(keys)
    samples = job.dataset.__getitems__(asked)
    rows = rows_of(samples)
    taken_apart, counted = job.keep_going, job.indexed or job.keep_going
    if (taken_apart and rows is None) or (counted and rows is not None and len(rows) != len(keys)):
        found = f"{len(rows)} samples" if rows is not None else f"a {type(samples).__name__}"
        raise SampleError(
            f"{type(job.dataset).__name__}.__getitems__ returned {found} for {len(keys)} keys.\n"
            "  With return_index=True, and with on_error other than 'raise', it must return a list with one sample "
            "for each key: raise an error for what cannot be read."
        )
    return samples


def rows_of(samples: Any) -> Sequence[Any] | None:
    """The samples one by one, where the collate function would see no difference; None for anything else."""
    if type(samples) is list or (type(samples) is np.ndarray and samples.ndim > 0):
        return list(samples)
    # torch returns a sequence of texts in the container that it came in.
    if type(samples) is tuple and not (samples and isinstance(samples[0], (str, bytes))):
        return samples
    return None
