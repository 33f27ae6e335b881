"""Messages between the loader and its workers: jobs, tasks, results, failures. All of them can be pickled."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loaders.batch.packing import dumps, pack, unpack
from loaders.batch.rows import Overflow
from loaders.batch.spec import BatchSpec, Field
from loaders.timing.stages import NO_TIMES, Times

# Characters of a summary, which is kept in the loader's list of errors and in its state; the full message is not.
_SUMMARY = 500

Fetch = Literal["each", "all", "stream"]


@dataclass(frozen=True)
class Job:
    """What every worker of a loader is given at its start.

    Attributes:
        dataset: the user's.
        fetch: samples one by one (`dataset[key]`), a batch at once (`dataset.__getitems__(keys)`), or `iter(dataset)`.
        collate: the user's collate_fn, which runs here; None where samples go straight into rows.
        batched: False where a "batch" is one sample (`batch_size=None`).
        fields: declared pad and ragged fields.
        keep_going: True where a failing sample does not end its span (`on_error` other than "raise").
        batch_rows, drop_last: the size of a stream's batches, and whether a short last one is dropped.
        num_workers, seed, init: as in torch's WorkerInfo and worker_init_fn.
        indexed: True where the caller gets every sample's key, too (`return_index`).
    """

    dataset: Any
    fetch: Fetch
    collate: Callable[[Any], Any] | None
    batched: bool
    fields: Mapping[str, Field]
    keep_going: bool
    batch_rows: int
    drop_last: bool
    num_workers: int
    seed: int
    init: Callable[[int], None] | None
    indexed: bool = False


class Keys(list[Any]):
    """The keys of one batch, where the batch sampler gave something other than a list.

    Attributes:
        given: what it gave (a tuple, an array, a tensor, a slice …), which is passed to `__getitems__`.
    """

    def __init__(self, given: Any, keys: Iterable[Any] | None = None) -> None:
        super().__init__(given if keys is None else keys)
        self.given = given
        self._are_items = keys is None

    def __reduce__(self) -> tuple[Any, ...]:
        # Items of a tensor are not pickled one by one: each would bring the whole tensor with it.
        return Keys, (self.given,) if self._are_items else (self.given, list(self))


def keys_of(given: Any, dataset: Any, *, whole: bool) -> list[Any]:
    """The keys in what a batch sampler gave, one per sample as far as that can be known.

    Args:
        given: what it gave.
        dataset: its length bounds a slice.
        whole: True where `given` is passed to the dataset's `__getitems__` as it is. Then a value that holds no keys,
            such as a number or a file name, is one key.

    Raises:
        TypeError: `given` cannot be iterated over; torch raises it, too.
    """
    if not whole or type(given) is list or isinstance(given, Iterator):
        return list(given)
    if isinstance(given, slice):
        return Keys(given, range(len(dataset))[given])
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0:
        return Keys(given, [given])
    return Keys(given)


@dataclass
class Task:
    """One batch to be made.

    Attributes:
        ticket: unique within an engine.
        keys: one per row, as the sampler gave them; for a stream just the serial number of the batch in it.
        position: of the first row in the epoch, counted over all ranks; that of the next row is `stride` further.
        epoch, seed: with the position, the key of each sample's randomness.
        spec: of the rows; None while unknown, and where `collate` makes the batch.
        blocks: (offset, nbytes) of the slot's blocks in the engine's memory.
        resume: for a stream that resumes from a loaded state: (batches before it, the dataset's own state or None).
        attempt: how often rows of this batch were replaced by substitutes.
        raw: True where the samples themselves are wanted, one by one, not the result of `collate`.
    """

    ticket: int
    keys: Sequence[Any]
    position: int
    epoch: int
    seed: int
    spec: BatchSpec | None
    blocks: tuple[tuple[int, int], ...]
    stride: int = 1
    attempt: int = 0
    raw: bool = False
    resume: tuple[int, Any] = (0, None)
    cancelled: bool = False


@dataclass
class Failure:
    """An exception in the user's code, in a form that can be pickled.

    Attributes:
        row: in the batch; None where no single sample is at fault.
        key: what the dataset was asked for; a list of all keys where that was a batch.
        source: what the dataset says the sample is.
        doing: "reading", "collating", "starting" ….
        summary: one line of bounded length: the exception's type and message.
        text: the formatted traceback.
        error: the exception, None where it cannot be pickled and rebuilt.
        worker: the number of the worker that reported it.
    """

    row: int | None
    key: Any
    source: str | None
    doing: str
    summary: str
    text: str
    error: BaseException | None
    worker: int = 0

    @classmethod
    def of(
        cls, error: BaseException, doing: str, row: int | None = None, key: Any = None, source: str | None = None
    ) -> Failure:
        """The failure of `error`, which must be the exception being handled."""
        summary = traceback.format_exception_only(type(error), error)[0].splitlines()[0]
        if len(summary) > _SUMMARY:
            summary = f"{summary[:_SUMMARY]}… ({len(summary):,} characters)"
        return cls(row, key, source, doing, summary, traceback.format_exc(), error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "error": _portable(self.error)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self.error = pickle.loads(state["error"])
        except Exception:  # its class is in a module that only the worker has
            self.error = None


class _Remade:
    """Unpickles as an exception of the same type with the same message."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.error), (str(self.error),)


def _portable(error: BaseException | None) -> bytes:
    """A pickle of the error; if that fails, of one of its type with the same message; else of None."""
    for each in (error, _Remade(error)):
        try:
            pickled = dumps(each)
            pickle.loads(pickled)  # can fail where dumping did not, usually for an exception with its own __init__
            return pickled
        except Exception:  # whatever the user's exception does, its type and text still arrive
            continue
    return pickle.dumps(None)


@dataclass
class Parcel:
    """The result of a collate_fn: a pickle, and per buffer its bytes or its size in the slot's block of that number."""

    pickled: bytes
    pieces: list[int | bytearray]

    def open(self, memories: Sequence[Any]) -> Any:
        """The result; `memories` are the leased blocks."""
        buffers = [
            piece if isinstance(piece, bytearray) else memoryview(memories[number])[:piece] if piece else bytearray()
            for number, piece in enumerate(self.pieces)
        ]
        return unpack(self.pickled, buffers)


# Shared by all plain results.
NOTHING = Overflow()
_NONE: list[Failure] = []


@dataclass
class Result:
    """The outcome of a span.

    Attributes:
        rows: how many rows the batch has where only the worker knows (streams), else None; 0 ends a stream.
        spec: found from the first sample, where the task had none.
        stream_state: what the dataset's `state_dict()` gave after this batch of its stream.
        times: when it began, and what the clock measured.
        notes: warnings for the user, each to be given once.
    """

    worker: int
    ticket: int
    start: int
    stop: int
    elapsed_s: float = 0.0
    cancelled: bool = False
    rows: int | None = None
    spec: BatchSpec | None = None
    stream_state: Any = None
    overflow: Overflow = field(default_factory=Overflow)
    failures: list[Failure] = field(default_factory=list)
    parcel: Parcel | None = None
    value: Any = None
    times: Times = NO_TIMES
    notes: tuple[str, ...] = ()

    @classmethod
    def plain(
        cls, worker: int, ticket: int, start: int, stop: int, elapsed_s: float, cancelled: bool, times: Times
    ) -> Result:
        """The rows are written, and there is nothing else to report. Must not be changed."""
        return cls(worker, ticket, start, stop, elapsed_s, cancelled, None, None, None, NOTHING, _NONE, times=times)

    @property
    def is_plain(self) -> bool:
        """True where the rows are written and there is nothing else to report."""
        told = self.failures or self.parcel or self.overflow or self.notes
        return not told and self.rows is None and self.spec is None

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed: torch cannot pickle tensors of all its dtypes, and pickles whole storages.
        return _result, pack(self.__dict__)


def _result(pickled: bytes, buffers: Sequence[Any]) -> Result:
    result = object.__new__(Result)
    result.__dict__.update(unpack(pickled, buffers))
    return result


def warn_of(notes: list[str], told: set[str], *, stacklevel: int) -> None:
    """Warn once of each of the workers' notes. A note is removed first, as its warning may be raised as an error."""
    while notes:
        note = notes.pop(0)
        if note not in told:
            told.add(note)
            warnings.warn(note, stacklevel=stacklevel + 1)
