"""The dataset protocol, and the indexing that this package's datasets share."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from loaders.errors import add_note, describe_sample
from loaders.timing.stages import AUGMENT


@runtime_checkable
class Dataset(Protocol):
    """Anything with a length and samples by index.

    A sample is a dict, tuple, namedtuple or dataclass of ndarrays, scalars and strings, never of tensors. An index past
    the end raises IndexError. For worker processes a dataset must survive pickling and forking, and should be cheap to
    construct: open files on first read.

    A dataset may also have `describe(index) -> str`: the name of the sample in messages, usually its path.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class IndexedDataset(ABC):
    """Indexing like that of a list, and the transform; a subclass defines `__len__` and `_read`."""

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> dict[str, Any]:
        """The sample before the transform; 0 <= index < len(self)."""

    def describe(self, index: SupportsIndex) -> str:
        """The name of the sample in messages, next to its index; empty if it has none."""
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
        # Without this, an IndexError inside a transform would end a `for` loop as if the dataset were exhausted.
        return (self[position] for position in range(len(self)))


def in_range(index: SupportsIndex, length: int) -> int:
    """`index` as a position in [0, length); a negative one counts from the end.

    Raises:
        IndexError: it is out of range.
        TypeError: it is not an integer; slices are not supported.
    """
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range: there are {length} samples")
    return position % length
