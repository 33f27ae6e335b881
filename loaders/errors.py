"""Every exception the library raises on purpose.

    LoadersError
    ├── ConversionError
    │   ├── ShareError (ValueError)         the bytes cannot be shared between NumPy and torch
    │   ├── DtypeError (TypeError)          the dtype has no counterpart in the other library
    │   ├── ArrayKindError (TypeError)      the kind of array has none: masked, sparse, meta, a list …
    │   └── ImageShapeError (ValueError)    the shape is not that of an image or a batch of images
    ├── SampleError                         one sample of a dataset is at fault, and is named
    │   ├── DecodeError (OSError)           a file, or a member of a shard, could not be read or decoded
    │   ├── FieldShapeError (ValueError, RuntimeError)
    │   │                                   the samples of a batch disagree about a shape
    │   ├── FieldDtypeError (TypeError, ValueError, RuntimeError)
    │   │                                   … about a dtype, or have one that torch lacks
    │   ├── FieldNameError (ValueError, KeyError, TypeError, RuntimeError)
    │   │                                   … about their fields
    │   ├── UserCodeError (RuntimeError)    user code raised an exception that cannot be raised again
    │   ├── WorkerLostError (RuntimeError)  workers died on it repeatedly, or could not be started
    │   └── WorkerTimeoutError (RuntimeError, TimeoutError)
    │                                       no worker answered within `timeout`
    ├── BufferMemoryError (MemoryError)     batch buffers need more memory than there is, or than is allowed
    ├── SlotStateError (RuntimeError)       a slot was used in the wrong state
    ├── DatasetError (ValueError)           a dataset cannot be built from what it was given
    ├── StateError (ValueError)             a saved state does not fit what it is loaded into
    ├── DeviceError (RuntimeError)          an accelerator is missing or refused
    ├── CollectError (ValueError)           a model's outputs do not fit together, or rows of them are missing
    └── MissingExtraError (ImportError)     an optional dependency is not installed

Each also derives from the built-in errors that torch or NumPy raise there, so `except TypeError` keeps working.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


class LoadersError(Exception):
    """Base of every error that `loaders` raises on purpose."""


class ConversionError(LoadersError):
    """An array or tensor cannot cross between NumPy and torch as asked."""


class ShareError(ConversionError, ValueError):
    """The two libraries cannot share these bytes; the message says why and what to do."""


class DtypeError(ConversionError, TypeError):
    """The dtype has no counterpart in the other library, not even by a lossless copy."""


class ArrayKindError(ConversionError, TypeError):
    """The value is not an array or tensor, or is of a kind that the other library lacks, whatever its dtype."""


class ImageShapeError(ConversionError, ValueError):
    """The shape is not that of an image or a batch of images, or does not fit the mean and std given."""


class SampleError(LoadersError):
    """One sample is at fault. The message names it; the attributes are for programs.

    Attributes:
        index: the index the dataset was asked for, or None where only the position in the batch is known.
        source: what the dataset says the sample is, usually a path; None if it says nothing.
        field: the field of the sample, such as "image" or "meta.boxes"; None if the whole sample is at fault.
    """

    def __init__(
        self, message: str, *, index: int | None = None, source: str | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.index = index
        self.source = source
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from workers to the consumer by pickle; the default would drop the keyword arguments.
        return _rebuild_sample_error, (type(self), str(self), self.index, self.source, self.field)


def _rebuild_sample_error(
    kind: type[SampleError], message: str, index: int | None, source: str | None, field: str | None
) -> SampleError:
    return kind(message, index=index, source=source, field=field)


class DecodeError(SampleError, OSError):
    """A file could not be read as an image, or a member of a shard as what its extension says."""

    # OSError.__str__ formats errno and filename when given two arguments; ours is always one message.
    __str__ = Exception.__str__


class FieldShapeError(SampleError, ValueError, RuntimeError):
    """The samples of a batch disagree about the shape of a field."""


class FieldDtypeError(SampleError, TypeError, ValueError, RuntimeError):
    """The samples of a batch disagree about the dtype of a field, or have one that torch does not know."""


class FieldNameError(SampleError, ValueError, KeyError, TypeError, RuntimeError):
    """The samples of a batch disagree about which fields they have."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class UserCodeError(SampleError, RuntimeError):
    """The dataset, collate_fn or worker_init_fn raised an exception that cannot be raised again here: a StopIteration,
    or one that cannot be pickled. The message has its type and message, `__cause__` its traceback.
    """


class SlotStateError(LoadersError, RuntimeError):
    """A slot was used in the wrong state."""


class BufferMemoryError(LoadersError, MemoryError):
    """Batch buffers would need more memory than the machine has left, or than `max_buffer_bytes` allows."""


class WorkerLostError(SampleError, RuntimeError):
    """Workers died repeatedly on one sample, or could not be started."""


class WorkerTimeoutError(SampleError, RuntimeError, TimeoutError):
    """No worker answered within `timeout`; the message names the samples that were being read."""

    __str__ = Exception.__str__


class DatasetError(LoadersError, ValueError):
    """A dataset cannot be built from what it was given: no images, or fields of different length."""


class StateError(LoadersError, ValueError):
    """A saved state does not fit what it is loaded into; the message names every difference."""


class DeviceError(LoadersError, RuntimeError):
    """An accelerator is missing, unknown to torch, or refused what was asked."""


class CollectError(LoadersError, ValueError):
    """A model's outputs do not fit its earlier outputs, or rows of the dataset are missing."""


class MissingExtraError(LoadersError, ImportError):
    """A package of one of the extras is not installed; the message says which extra to install."""


def describe_sample(index: int | None, source: str | None, position: int | None = None) -> str:
    """How every message names a sample: `sample 90211 ("train/cat/90211.jpg")` or `sample at row 3 of the batch`."""
    name = f"sample {index}" if index is not None else f"sample at row {position} of the batch"
    return f'{name} ("{source}")' if source else name


def describe_samples(keys: Sequence[Any], limit: int = 8) -> str:
    """How every message names a whole batch: `samples 0, 1, 2 …`."""
    return f"samples {', '.join(map(str, keys[:limit]))}{' …' if len(keys) > limit else ''}"


def add_note(error: BaseException, note: str) -> None:
    """Add a note below the traceback of an error that is not ours. Python 3.10 has no notes."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
