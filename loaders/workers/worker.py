"""What a worker does, wherever it runs: an order in, an outcome out. NumPy only.

An order describes one batch; a run is some of its rows. Executing a run is a pure function of the order, so a run that
was lost with its worker is executed again, by anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from loaders.batch.packing import pack
from loaders.batch.rows import RowWriter
from loaders.batch.spec import BatchSpec
from loaders.datasets.wrapped import bases, describe, resolve
from loaders.randomness.process_generators import ProcessGenerators
from loaders.randomness.streams import Domain, enter_sample, leave_sample
from loaders.randomness.transforms import KeyedTransforms
from loaders.timing.stages import COLLATE, WRITE, Clock
from loaders.workers.messages import Failure, Job, Order, Outcome, Parcel

# Stands for a row while the worker is in the user's collate_fn: no single sample is at fault then.
COLLATING = -2


class Worker:
    """Executes runs against its own view of the dataset. Not safe across threads: one per thread or process.

    Args:
        job: what to do.
        number: of this worker, from 0.
        memory: the buffer that orders' blocks lie in.
        apart: True where results must leave this process: they are packed into the slot.
        threaded: True where other workers run beside this one in the same process.
    """

    def __init__(self, job: Job, number: int, memory: Any, *, apart: bool, threaded: bool = False) -> None:
        self.job = job
        self.number = number
        self._memory = memory
        self._apart = apart
        self._transforms = KeyedTransforms(job.dataset)
        # Threads share the process's generators with each other and with the consumer: nothing is promised of them.
        # A stream cannot be read twice, so there every sample is keyed before it is known whether it draws.
        self._generators = ProcessGenerators(shared=not apart, keyed=job.fetch == "stream") if not threaded else None
        self._reads_into = any(hasattr(base, "read_into") for base in bases(job.dataset))
        self._writer: tuple[int, RowWriter] | None = None
        self._clock = Clock()
        self._stream: tuple[int, Iterator[Any], int] | None = None  # epoch, iterator, serial of its next batch

    def execute(self, order: Order, start: int, stop: int, reading: Callable[[int], bool]) -> Outcome:
        """Do rows `start` to `stop` of `order`. `reading(row)` is called before each; False ends the run."""
        if self._generators is None:
            return self._execute(order, start, stop, reading)
        self._generators.begin()
        try:
            outcome = self._execute(order, start, stop, reading)
            return self._execute(order, start, stop, reading) if self._generators.drew() else outcome
        finally:
            self._generators.end()

    def _execute(self, order: Order, start: int, stop: int, reading: Callable[[int], bool]) -> Outcome:
        outcome = Outcome(self.number, order.ticket, start, stop)
        by_rows = self.job.collate is None and self.job.fetch == "each" and self.job.batched
        due = self._clock.begin_run(start, stop, whole=not by_rows)
        try:
            if by_rows:
                self._do_rows(order, outcome, reading, due)
            elif self.job.fetch == "stream":
                self._do_stream(order, outcome, reading, look=due < stop)
            else:
                self._do_batch(order, outcome, reading, look=due < stop)
        except Exception as error:  # what the user's code gave cannot be a row: a declared field that is no array …
            outcome.failures.append(Failure.of(error, "writing samples into their rows"))
        finally:
            leave_sample()
        elapsed_ns, outcome.times = self._clock.end_run(start, stop)
        outcome.elapsed_s = elapsed_ns / 1e9
        return outcome

    def _do_rows(self, order: Order, outcome: Outcome, reading: Callable[[int], bool], due: int) -> None:
        writer = self._writer_of(order)
        dataset, clock = self.job.dataset, self._clock
        for row in range(outcome.start, outcome.stop):
            if not reading(row):
                outcome.cancelled = True
                return
            key = order.keys[row]
            if row == due:
                clock.begin_sample()
            try:
                self._enter(order, row)
                sample = _PLACED
                if writer is not None and self._reads_into and writer.takes_rows:
                    base, index = resolve(dataset, key)
                    if hasattr(base, "read_into"):
                        base.read_into(index, writer.row(row))
                    else:
                        sample = dataset[key]
                else:
                    sample = dataset[key]
            except Exception as error:  # whatever the user's code raises is delivered
                outcome.failures.append(self._failure(error, row, key, "reading"))
                if not self.job.keep_going:
                    return
            if row == due:
                with WRITE:
                    if sample is not _PLACED:
                        self._place(writer, row, sample, outcome)
                due = clock.end_sample(row)
            elif sample is not _PLACED:
                self._place(writer, row, sample, outcome)

    def _do_batch(self, order: Order, outcome: Outcome, reading: Callable[[int], bool], *, look: bool) -> None:
        clock = self._clock
        together: Failure | None = None
        if self.job.fetch == "all" and not order.raw:
            if not reading(0):
                outcome.cancelled = True
                return
            if look:
                clock.begin_sample()
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
            if look:
                clock.begin_sample()
            try:
                self._enter(order, row)
                dataset = self.job.dataset
                good.append((row, dataset.__getitems__([key])[0] if self.job.fetch == "all" else dataset[key]))
            except Exception as error:
                outcome.failures.append(self._failure(error, row, key, "reading"))
                if not self.job.keep_going:
                    return
            if look:
                clock.end_sample(row)
        if look:
            clock.begin_sample()  # the batch as a whole: what follows is nobody's alone
        if together is not None and not outcome.failures:
            outcome.failures.append(together)
        elif not (outcome.failures or order.raw):
            self._finish(order, [sample for _, sample in good], outcome, reading)
        elif self.job.collate is None and self.job.batched:
            for row, sample in good:
                self._place(None, row, sample, outcome)
        else:
            outcome.beside.samples.extend(good)  # the batch may be short: the consumer fills it up and collates

    def _do_stream(self, order: Order, outcome: Outcome, reading: Callable[[int], bool], *, look: bool) -> None:
        serial = order.keys[0]
        if not reading(0):
            outcome.cancelled = True
            return
        if look:
            self._clock.begin_sample()
        rows = self.job.batch_rows if self.job.batched else 1
        try:
            if self._stream is None or self._stream[0] != order.epoch or self._stream[2] > serial:
                self._stream = None
                base, state = order.resume
                self._enter(order, (base - serial) * rows)
                if state is not None:
                    self.job.dataset.load_state_dict(state)
                self._stream = order.epoch, iter(self.job.dataset), base if state is not None else 0
            _, stream, at = self._stream
            self._stream = order.epoch, stream, serial + 1
            samples: list[Any] = []
            # A stream that was lost with its worker is replayed up to where it was: same batches, errors and draws.
            for batch in range(at - serial, 1):
                try:
                    samples = self._draw(order, stream, batch * rows, rows)
                except Exception:
                    if batch == 0:  # the others were raised the first time
                        raise
                    continue
                if len(samples) < rows:
                    # It has ended, whatever it would say if it were asked again.
                    self._stream = order.epoch, (stream := iter(())), serial + 1
        except Exception as error:
            outcome.failures.append(self._failure(error, None, None, "reading"))
            return
        if not samples or (self.job.drop_last and self.job.batched and len(samples) < rows):
            outcome.rows = 0
            return
        outcome.rows = len(samples)
        if hasattr(self.job.dataset, "state_dict"):
            outcome.stream_state = self.job.dataset.state_dict()
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
            with WRITE:
                for row, sample in enumerate(samples):
                    self._place(writer, row, sample, outcome)
            return
        result = samples if self.job.batched else samples[0]
        doing = "collating"
        try:
            if self.job.collate is not None:
                reading(COLLATING)
                self._enter_collate(order)
                with COLLATE:
                    result = self.job.collate(result)
            doing = "sending back"
            if self._apart:
                with WRITE:
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
        """What is drawn from here on belongs to the sample in `row`."""
        position = order.position + row * order.stride
        enter_sample(order.seed, order.epoch, position)
        if self._transforms:
            self._transforms.rekey(order.seed, order.epoch, position)
        if self._generators is not None:
            self._generators.enter(Domain.PROCESS, order.seed, order.epoch, position)

    def _enter_collate(self, order: Order) -> None:
        """What is drawn from here on belongs to the batch."""
        enter_sample(order.seed, order.epoch, order.position, Domain.COLLATE)
        if self._generators is not None:
            self._generators.enter(Domain.COLLATE_PROCESS, order.seed, order.epoch, order.position)

    def _failure(self, error: Exception, row: int | None, key: Any, doing: str) -> Failure:
        source = describe(self.job.dataset, key) if row is not None else None
        return Failure.of(error, doing, row, key, source)


_END, _PLACED = object(), object()
