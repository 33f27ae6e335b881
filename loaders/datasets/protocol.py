"""What a dataset is, and the indexing that those of this package share."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from loaders.errors import add_note, describe_sample
from loaders.timing.stages import AUGMENT


@runtime_checkable
class Dataset(Protocol):
    """Anything with a length and samples by number.

    A sample is a dict, tuple, namedtuple or dataclass of ndarrays, scalars and strings, never of tensors. An index past
    the end raises IndexError. For worker processes a dataset must survive pickling and forking, and should be cheap to
    make: open files when they are first read.

    A dataset may also have `describe(index) -> str`: what messages call the sample, usually its path.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class IndexedDataset(ABC):
    """Indexing like a list's, and the transform: a subclass says how many samples there are and how to read one."""

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> dict[str, Any]:
        """The sample before the transform; 0 <= index < len(self)."""

    def describe(self, index: SupportsIndex) -> str:
        """What messages call the sample besides its number; empty where there is nothing to add."""
        return ""

    def __getitem__(self, index: SupportsIndex) -> Any:
        position = in_range(index, len(self))
        sample = self._read(position)
        if self.transform is None:
            return sample
        try:
            with AUGMENT:
                return self.transform(sample)
        except Exception as error:
            add_note(error, f"Raised by the transform of {describe_sample(position, self.describe(position))}.")
            raise

    def __iter__(self) -> Iterator[Any]:
        # Without this, an IndexError inside a transform would end a `for` loop as if the dataset were over.
        return (self[position] for position in range(len(self)))


def in_range(index: SupportsIndex, length: int) -> int:
    """The position that `index` means, counted from the end if negative.

    Raises:
        IndexError: it lies outside.
        TypeError: it is no integer; slices are not supported.
    """
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range: there are {length} samples")
    return position % length
