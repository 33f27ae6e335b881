"""What a worker does, wherever it runs: an order in, an outcome out. NumPy only.

An order describes one batch; a run is some of its rows. Executing a run is a pure function of the order, so a run that
was lost with its worker is executed again, by anyone.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loaders.batching.parcel import pack, unpack
from loaders.batching.rows import Beside, RowWriter
from loaders.rng import enter_sample, leave_sample
from loaders.spec import BatchSpec, Field
from loaders.stateful import KeyedTransforms, bases, describe, resolve

Fetch = Literal["each", "all", "stream"]
# Stands for a row while the worker is in the user's collate_fn: no single sample is at fault then.
COLLATING = -2


@dataclass(frozen=True)
class Job:
    """What every worker of a loader knows from the start.

    Attributes:
        dataset: the user's.
        fetch: rows one by one (`dataset[key]`), a batch at once (`dataset.__getitems__(keys)`), or from `iter(dataset)`.
        collate: the user's collate_fn, which runs here; None where samples go straight into rows.
        batched: False where a "batch" is one sample (`batch_size=None`).
        fields: declared pad and ragged fields.
        keep_going: True where a failing sample does not end its run (`on_error` other than "raise").
        batch_rows, drop_last: the size of a stream's batches, and whether a short last one counts.
        num_workers, seed, init: as torch's WorkerInfo and worker_init_fn have them.
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


@dataclass
class Order:
    """One batch to be made.

    Attributes:
        ticket: unique within an engine.
        keys: one per row, what the sampler gave; for a stream a single serial number of the batch in that stream.
        position: of the first row in the epoch.
        epoch, seed: with the position, the key of each sample's randomness.
        spec: of the rows; None while unknown, and where `collate` makes the batch.
        blocks: (offset, nbytes) of the slot's blocks in the engine's memory.
        attempt: how often rows of this batch were replaced by substitutes.
        raw: the samples themselves are wanted, one by one, not what `collate` makes of them.
    """

    ticket: int
    keys: Sequence[Any]
    position: int
    epoch: int
    seed: int
    spec: BatchSpec | None
    blocks: tuple[tuple[int, int], ...]
    attempt: int = 0
    raw: bool = False
    cancelled: bool = False


@dataclass
class Failure:
    """An exception in the user's code, ready to travel.

    Attributes:
        row: of the batch, None where no single sample is at fault.
        key: what the dataset was asked for; a list of all keys where that was a batch.
        source: what the dataset says the sample is.
        doing: "reading", "collating", "starting" ….
        summary: one line: the exception's type and message.
        text: the formatted traceback.
        error: the exception, None where it cannot be pickled and rebuilt.
        worker: that reported it.
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
        """The failure that is being handled."""
        summary = traceback.format_exception_only(type(error), error)[0].splitlines()[0]
        return cls(row, key, source, doing, summary, traceback.format_exc(), error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "error": _portable(self.error)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self.error = pickle.loads(state["error"])
        except Exception:  # a module that only the worker has; its type and text have arrived
            self.error = None


class _Remade:
    """Unpickles as an exception of the same type that was given the same message."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.error), (str(self.error),)


def _portable(error: BaseException | None) -> bytes:
    """A pickle of the error, or of one of its type with its message alone, or of None."""
    for each in (error, _Remade(error)):
        try:
            pickled = pickle.dumps(each)
            pickle.loads(pickled)  # can fail where dumping did not: an exception with its own __init__, usually
            return pickled
        except Exception:  # whatever the user's exception does, its type and text still arrive
            continue
    return pickle.dumps(None)


@dataclass
class Parcel:
    """The result of a collate_fn: a pickle, and per buffer its size in the slot's block of that number, or its bytes."""

    pickled: bytes
    pieces: list[int | bytearray]

    def open(self, memories: Sequence[Any]) -> Any:
        """The result; `memories` are the leased blocks."""
        buffers = [
            piece if isinstance(piece, bytearray) else memoryview(memories[number])[:piece] if piece else bytearray()
            for number, piece in enumerate(self.pieces)
        ]
        return unpack(self.pickled, buffers)


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        rows: how many rows the batch has where only the worker knows (streams), else None; 0 ends a stream.
        spec: found from the first sample, where the order had none.
    """

    worker: int
    ticket: int
    start: int
    stop: int
    elapsed_s: float = 0.0
    cancelled: bool = False
    rows: int | None = None
    spec: BatchSpec | None = None
    beside: Beside = field(default_factory=Beside)
    failures: list[Failure] = field(default_factory=list)
    parcel: Parcel | None = None
    result: Any = None

    @property
    def is_plain(self) -> bool:
        """True where the rows are written and there is nothing else to tell."""
        return not (self.failures or self.parcel or self.beside) and self.rows is None and self.spec is None


class Worker:
    """Executes runs against its own view of the dataset. Not safe across threads: one per thread or process.

    Args:
        job: what to do.
        number: of this worker, from 0.
        memory: the buffer that orders' blocks lie in.
        apart: True where results must leave this process: they are packed into the slot.
    """

    def __init__(self, job: Job, number: int, memory: Any, *, apart: bool) -> None:
        self.job = job
        self.number = number
        self._memory = memory
        self._apart = apart
        self._transforms = KeyedTransforms(job.dataset)
        self._reads_into = any(hasattr(base, "read_into") for base in bases(job.dataset))
        self._writer: tuple[int, RowWriter] | None = None
        self._stream: tuple[int, Iterator[Any], int] | None = None  # epoch, iterator, serial of its next batch

    def execute(self, order: Order, start: int, stop: int, reading: Callable[[int], bool]) -> Outcome:
        """Do rows `start` to `stop` of `order`. `reading(row)` is called before each; False ends the run."""
        outcome = Outcome(self.number, order.ticket, start, stop)
        began = time.perf_counter()
        try:
            if self.job.fetch == "stream":
                self._do_stream(order, outcome, reading)
            elif self.job.collate is None and self.job.fetch == "each" and self.job.batched:
                self._do_rows(order, outcome, reading)
            else:
                self._do_batch(order, outcome, reading)
        except Exception as error:  # what the user's code gave cannot be a row: a declared field that is no array …
            outcome.failures.append(Failure.of(error, "writing samples into their rows"))
        finally:
            leave_sample()
        outcome.elapsed_s = time.perf_counter() - began
        return outcome

    def _do_rows(self, order: Order, outcome: Outcome, reading: Callable[[int], bool]) -> None:
        writer = self._writer_of(order)
        dataset = self.job.dataset
        for row in range(outcome.start, outcome.stop):
            if not reading(row):
                outcome.cancelled = True
                return
            key = order.keys[row]
            try:
                self._enter(order, row)
                if writer is not None and self._reads_into and writer.takes_rows:
                    base, index = resolve(dataset, key)
                    if hasattr(base, "read_into"):
                        base.read_into(index, writer.row(row))
                        continue
                sample = dataset[key]
            except Exception as error:  # whatever the user's code raises is delivered
                outcome.failures.append(self._failure(error, row, key, "reading"))
                if self.job.keep_going:
                    continue
                return
            self._place(writer, row, sample, outcome)

    def _do_batch(self, order: Order, outcome: Outcome, reading: Callable[[int], bool]) -> None:
        together: Failure | None = None
        if self.job.fetch == "all" and not order.raw:
            if not reading(0):
                outcome.cancelled = True
                return
            try:
                self._enter(order, 0)
                samples = list(self.job.dataset.__getitems__(list(order.keys)))
            except Exception as error:
                together = self._failure(error, None, list(order.keys), "reading")
                if not self.job.keep_going:
                    outcome.failures.append(together)
                    return
            else:
                self._finish(order, samples, outcome, reading)
                return
        good: list[tuple[int, Any]] = []
        for row in range(outcome.start, outcome.stop):
            if not reading(row):
                outcome.cancelled = True
                return
            key = order.keys[row]
            try:
                self._enter(order, row)
                dataset = self.job.dataset
                good.append((row, dataset.__getitems__([key])[0] if self.job.fetch == "all" else dataset[key]))
            except Exception as error:
                outcome.failures.append(self._failure(error, row, key, "reading"))
                if not self.job.keep_going:
                    return
        if together is not None and not outcome.failures:
            outcome.failures.append(together)
        elif not (outcome.failures or order.raw):
            self._finish(order, [sample for _, sample in good], outcome, reading)
        elif self.job.collate is None and self.job.batched:
            for row, sample in good:
                self._place(None, row, sample, outcome)
        else:
            outcome.beside.samples.extend(good)  # the batch may be short: the consumer fills it up and collates

    def _do_stream(self, order: Order, outcome: Outcome, reading: Callable[[int], bool]) -> None:
        serial = order.keys[0]
        if not reading(0):
            outcome.cancelled = True
            return
        rows = self.job.batch_rows if self.job.batched else 1
        try:
            if self._stream is None or self._stream[0] != order.epoch or self._stream[2] > serial:
                self._stream = None
                self._enter(order, -serial * rows)
                self._stream = order.epoch, iter(self.job.dataset), 0
            _, stream, at = self._stream
            self._stream = order.epoch, stream, serial + 1
            # A stream that was lost with its worker is replayed up to where it was: same batches, errors and draws.
            for missed in range(at - serial, 0):
                try:
                    self._draw(order, stream, missed * rows, rows)
                except Exception:  # was raised in the consumer the first time
                    continue
            samples = self._draw(order, stream, 0, rows)
        except Exception as error:
            outcome.failures.append(self._failure(error, None, None, "reading"))
            return
        if not samples or (self.job.drop_last and self.job.batched and len(samples) < rows):
            outcome.rows = 0
            return
        outcome.rows = len(samples)
        self._finish(order, samples, outcome, reading)

    def _draw(self, order: Order, stream: Iterator[Any], first: int, rows: int) -> list[Any]:
        """The next `rows` samples of a stream, fewer at its end; `first` counts from the first row of the order."""
        samples: list[Any] = []
        while len(samples) < rows:
            self._enter(order, first + len(samples))
            sample = next(stream, _END)
            if sample is _END:
                break
            samples.append(sample)
        return samples

    def _finish(self, order: Order, samples: list[Any], outcome: Outcome, reading: Callable[[int], bool]) -> None:
        """A whole batch of samples: into rows, or through the user's collate_fn into a parcel."""
        if self.job.collate is None and self.job.batched:
            writer = self._writer_of(order, len(samples))
            for row, sample in enumerate(samples):
                self._place(writer, row, sample, outcome)
            return
        result = samples if self.job.batched else samples[0]
        doing = "collating"
        try:
            if self.job.collate is not None:
                reading(COLLATING)
                result = self.job.collate(result)
            doing = "sending back"
            if self._apart:
                outcome.parcel = self._pack(order, result)
            else:
                outcome.result = result
        except Exception as error:
            keys = None if self.job.fetch == "stream" else list(order.keys)
            outcome.failures.append(self._failure(error, None, keys, doing))

    def _place(self, writer: RowWriter | None, row: int, sample: Any, outcome: Outcome) -> None:
        if writer is not None:
            writer.write(row, sample, outcome.beside)
            return
        if outcome.spec is None:
            outcome.spec = BatchSpec.from_sample(sample, self.job.fields)
        outcome.beside.samples.append((row, sample))

    def _pack(self, order: Order, result: Any) -> Parcel:
        pickled, buffers = pack(result)
        pieces: list[int | bytearray] = []
        view = memoryview(self._memory)
        for number, buffer in enumerate(buffers):
            raw = buffer.raw()
            if number < len(order.blocks) and raw.nbytes <= order.blocks[number][1]:
                offset = order.blocks[number][0]
                view[offset : offset + raw.nbytes] = raw
                pieces.append(raw.nbytes)
            else:
                pieces.append(bytearray(raw))
        return Parcel(pickled, pieces)

    def _writer_of(self, order: Order, rows: int | None = None) -> RowWriter | None:
        if order.spec is None:
            return None
        if self._writer is None or self._writer[0] != order.ticket:
            offsets = [offset for offset, _ in order.blocks]
            self._writer = order.ticket, RowWriter(order.spec, self._memory, offsets, rows or len(order.keys))
        return self._writer[1]

    def _enter(self, order: Order, row: int) -> None:
        enter_sample(order.seed, order.epoch, order.position + row)
        if self._transforms:
            self._transforms.rekey(order.seed, order.epoch, order.position + row)

    def _failure(self, error: Exception, row: int | None, key: Any, doing: str) -> Failure:
        source = describe(self.job.dataset, key) if row is not None else None
        return Failure.of(error, doing, row, key, source)


_END = object()
