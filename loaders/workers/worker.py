"""What a worker does, wherever it runs: a task in, a result out. NumPy only.

A task describes one batch; a span is some of its rows. Executing a span is a pure function of the task, so a span that
was lost with its worker is executed again, by any worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loaders.batch.packing import pack
from loaders.batch.rows import RowWriter
from loaders.batch.spec import BatchSpec
from loaders.datasets.read_into import own_read_into
from loaders.datasets.wrapped import bases, describe, resolve
from loaders.randomness.calls import Calls
from loaders.randomness.process_generators import ProcessGenerators
from loaders.randomness.streams import Domain, enter_sample, leave_sample, set_aside, take_up
from loaders.randomness.transforms import Found, KeyedTransforms
from loaders.system.interrupts import is_interrupt
from loaders.timing.stages import COLLATE, WRITE, Clock
from loaders.workers.info import forget_questions, has_asked
from loaders.workers.messages import Failure, Job, Parcel, Result, Task
from loaders.workers.together import RowsTogether, read_together, rows_of, together

_WHOLE = (
    "{} calls torch.utils.data.get_worker_info(), which does not work in threads: each of the {} threads reads the "
    "whole stream. Use worker_method='process', or split the stream by loaders.worker_info()."
)
# Stands in for a row while the worker is in the user's collate_fn: no single sample is at fault then.
COLLATING = -2


class Worker:
    """Executes spans against its own view of the dataset. Not safe across threads: one per thread or process.

    Args:
        job: what to do.
        number: of this worker, from 0.
        memory: the buffer that tasks' blocks lie in.
        apart: True where results must leave this process: they are packed into the slot.
        threaded: True where other workers run beside this one in the same process.
        shared: transforms that these workers have in common.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        memory: Any,
        *,
        apart: bool,
        threaded: bool = False,
        shared: Sequence[Found] = (),
    ) -> None:
        self.job = job
        self.number = number
        self._memory = memory
        self._apart = apart
        self._threaded = threaded
        self._transforms = KeyedTransforms(job.dataset, job.collate, shared if job.num_workers > 1 else ())
        self._has_read = False
        # Threads share the process's generators with each other and the consumer: their draws are not reproducible. A
        # stream cannot be read twice, so every sample of it is keyed before it is known whether it draws.
        self._generators = ProcessGenerators(shared=not apart, keyed=job.fetch == "stream") if not threaded else None
        self._reads_into = any(own_read_into(base) is not None for base in bases(job.dataset))
        self._together = RowsTogether(job.dataset)
        self._writer: tuple[tuple[int, int], RowWriter] | None = None  # for (ticket, rows)
        self._clock = Clock()
        self._stream: tuple[int, Iterator[Any], int] | None = None  # epoch, iterator, serial of its next batch

    def execute(self, task: Task, start: int, stop: int, reading: Callable[[int], bool]) -> Result:
        """Execute rows `start` to `stop` of `task`. `reading(row)` is called before each; False ends the span."""
        outer = set_aside()
        try:
            execute = self._keyed if self._has_read else self._first
            result = execute(task, start, stop, reading)
        finally:
            take_up(outer)
        self._together.tell(result, self._transforms.notes)
        if self._transforms.notes:
            result.notes, self._transforms.notes = tuple(self._transforms.notes), []
        return result

    def _first(self, task: Task, start: int, stop: int, reading: Callable[[int], bool]) -> Result:
        """The first span of this worker, from which it learns how the dataset behaves."""
        stream, several = self.job.fetch == "stream", self.job.num_workers > 1
        threaded = self._threaded and several
        forget_questions()
        # A profiler, so not in the consumer's own thread, where a signal handler may raise inside it.
        with Calls(watch=self._apart or self._threaded) as calls:
            result = self._keyed(task, start, stop, reading)
        # torch's `get_worker_info()` does not know threads: each reads the whole of a stream that is split by it.
        if threaded and stream and calls.asked and not has_asked():
            self._transforms.notes.append(_WHOLE.format(calls.asked[0], self.job.num_workers))
        if result.cancelled:
            return result
        self._has_read = True
        more = self._transforms.look_again(calls.transforms, threaded=threaded, alone=not several, stream=stream)
        return self._keyed(task, start, stop, reading) if more and not stream else result

    def _keyed(self, task: Task, start: int, stop: int, reading: Callable[[int], bool]) -> Result:
        """Execute a span so that its samples depend on their keys alone."""
        if self._generators is None:
            return self._execute(task, start, stop, reading)
        try:
            self._generators.begin()
            result = self._execute(task, start, stop, reading)
            return self._execute(task, start, stop, reading) if self._generators.drew() else result
        finally:
            self._generators.end()

    def _execute(self, task: Task, start: int, stop: int, reading: Callable[[int], bool]) -> Result:
        result = Result(self.number, task.ticket, start, stop)
        by_rows = self.job.collate is None and self.job.fetch == "each" and self.job.batched
        due = self._clock.begin_run(start, stop, whole=not by_rows)
        try:
            if by_rows:
                self._do_rows(task, result, reading, due)
            elif self.job.fetch == "stream":
                self._do_stream(task, result, reading, look=due < stop)
            else:
                self._do_batch(task, result, reading, look=due < stop)
        except Exception as error:  # the user's sample cannot be a row: a declared field that is no array …
            self._raise_if_interrupted(error)
            result.failures.append(Failure.of(error, "writing samples into their rows"))
        finally:
            leave_sample()
        elapsed_ns, result.times = self._clock.end_run(start, stop)
        result.elapsed_s = elapsed_ns / 1e9
        return result

    def _raise_if_interrupted(self, error: Exception) -> None:
        """Raise the error of a signal handler, possible in the consumer's own thread: no sample is at fault then."""
        if not (self._apart or self._threaded) and is_interrupt(error):
            raise error

    def _do_rows(self, task: Task, result: Result, reading: Callable[[int], bool], due: int) -> None:
        # This loop and what it calls are the cost of a small sample.
        writer, keys = self._writer_of(task), task.keys
        dataset, clock = self.job.dataset, self._clock
        keys_more = bool(self._transforms) or (self._generators is not None and self._generators.keyed)
        is_numbers = self._together.offered and not keys_more  # samples that draw need a key each
        if is_numbers and writer is not None and self._did_together(task, result, writer, reading, due):
            return
        reads_into = writer is not None and self._reads_into and writer.takes_rows
        for row in range(result.start, result.stop):
            if not reading(row):
                result.cancelled = True
                return
            if row == due:
                clock.begin_sample()
            sample = _PLACED
            try:
                if keys_more:
                    self._enter(task, row)
                else:
                    enter_sample(task.seed, task.epoch, task.position + row * task.stride)
                sample = self._read_into(writer, row, keys[row]) if reads_into else dataset[keys[row]]
            except Exception as error:  # whatever the user's code raises is delivered
                self._raise_if_interrupted(error)
                result.failures.append(self._failure(error, row, keys[row], "reading"))
                if not self.job.keep_going:
                    return
            if row == due:
                with WRITE:
                    if sample is not _PLACED:
                        self._place(writer, row, sample, result)
                due = clock.end_sample(row)
            elif writer is not None and sample is not _PLACED:
                writer.write(row, sample, result.overflow)
            elif sample is not _PLACED:
                self._place(None, row, sample, result)

    def _read_into(self, writer: Any, row: int, key: Any) -> Any:
        """Let the dataset write a sample into its row; or return the sample where it does not offer that."""
        base, index = resolve(self.job.dataset, key)
        if (read_into := own_read_into(base)) is None:
            return self.job.dataset[key]
        read_into(index, writer.row(row))
        return _PLACED

    def _did_together(
        self, task: Task, result: Result, writer: RowWriter, reading: Callable[[int], bool], due: int
    ) -> bool:
        """Whether the dataset has written all rows of the span in one call. If not, nothing has happened."""
        start, stop = result.start, result.stop
        # Marked by its middle row: if this process dies, the span is done again in halves, down to the row at fault.
        if not (writer.takes_rows and stop - start > 1 and reading((start + stop) // 2)):
            return False
        if due < stop:
            self._clock.begin_sample()
        try:
            if not together(self.job.dataset, task.keys[start:stop], writer.rows(start, stop)):
                return False
        except Exception as error:  # reading the samples one by one shows which of them is at fault
            self._raise_if_interrupted(error)
            self._together.error = error
            return False
        if due < stop:
            self._clock.end_sample(-1, stop - start)
        return True

    def _do_batch(self, task: Task, result: Result, reading: Callable[[int], bool], *, look: bool) -> None:
        clock = self._clock
        failed_together: Failure | None = None
        if self.job.fetch == "all" and not task.raw:
            if not reading(0):
                result.cancelled = True
                return
            if look:
                clock.begin_sample()
            try:
                self._enter(task, 0)
                samples = read_together(self.job, task.keys)
            except Exception as error:
                self._raise_if_interrupted(error)
                failed_together = self._failure(error, None, list(task.keys), "reading")
                if not self.job.keep_going:
                    result.failures.append(failed_together)
                    return
            else:
                self._finish(task, samples, result, reading)
                return
        good: list[tuple[int, Any]] = []
        for row in range(result.start, result.stop):
            if not reading(row):
                result.cancelled = True
                return
            key = task.keys[row]
            if look:
                clock.begin_sample()
            try:
                self._enter(task, row)
                if self.job.fetch == "all":
                    [sample] = read_together(self.job, [key])
                else:
                    sample = self.job.dataset[key]
                good.append((row, sample))
            except Exception as error:
                self._raise_if_interrupted(error)
                result.failures.append(self._failure(error, row, key, "reading"))
                if not self.job.keep_going:
                    return
            if look:
                clock.end_sample(row)
        if look:
            clock.begin_sample()  # for the batch as a whole: what follows belongs to no single sample
        if failed_together is not None and not result.failures:
            result.failures.append(failed_together)
        elif not (result.failures or task.raw):
            self._finish(task, [sample for _, sample in good], result, reading)
        elif self.job.collate is None and self.job.batched:
            for row, sample in good:
                self._place(None, row, sample, result)
        else:
            result.overflow.samples.extend(good)  # the batch may be short: the consumer fills it up and collates

    def _do_stream(self, task: Task, result: Result, reading: Callable[[int], bool], *, look: bool) -> None:
        serial = task.keys[0]
        if not reading(0):
            result.cancelled = True
            return
        if look:
            self._clock.begin_sample()
        rows = self.job.batch_rows if self.job.batched else 1
        try:
            if self._stream is None or self._stream[0] != task.epoch or self._stream[2] > serial:
                self._stream = None
                base, state = task.resume
                self._enter(task, (base - serial) * rows)
                if state is not None:
                    self.job.dataset.load_state_dict(state)
                self._stream = task.epoch, iter(self.job.dataset), base if state is not None else 0
            _, stream, at = self._stream
            self._stream = task.epoch, stream, serial + 1
            samples: list[Any] = []
            # A stream that was lost with its worker is replayed up to where it was: same batches, errors and draws.
            for batch in range(at - serial, 1):
                try:
                    samples = self._draw(task, stream, batch * rows, rows)
                except Exception as error:
                    self._raise_if_interrupted(error)
                    if batch == 0:  # errors of earlier batches were raised the first time
                        raise
                    continue
                if len(samples) < rows:
                    # It has ended, whatever another `next` would return.
                    self._stream = task.epoch, (stream := iter(())), serial + 1
        except Exception as error:
            self._raise_if_interrupted(error)
            result.failures.append(self._failure(error, None, None, "reading"))
            return
        if not samples or (self.job.drop_last and self.job.batched and len(samples) < rows):
            result.rows = 0
            return
        result.rows = len(samples)
        if hasattr(self.job.dataset, "state_dict"):
            result.stream_state = self.job.dataset.state_dict()
        self._finish(task, samples, result, reading)

    def _draw(self, task: Task, stream: Iterator[Any], first: int, rows: int) -> list[Any]:
        """The next `rows` samples of a stream, fewer at its end; `first` counts from the first row of the task."""
        samples: list[Any] = []
        while len(samples) < rows:
            self._enter(task, first + len(samples))
            sample = next(stream, _END)
            if sample is _END:
                break
            samples.append(sample)
        return samples

    def _finish(self, task: Task, samples: Any, result: Result, reading: Callable[[int], bool]) -> None:
        """Write a whole batch of samples into rows, or collate it with the user's collate_fn."""
        if self.job.collate is None and self.job.batched:
            rows = rows_of(samples)
            if rows is None or (self.job.fetch == "all" and len(rows) > len(task.keys)):
                result.overflow.whole = (samples,)
                return
            if self.job.fetch == "all" and len(rows) != len(task.keys):
                result.rows = len(rows)
            writer = self._writer_of(task, len(rows))
            with WRITE:
                for row, sample in enumerate(rows):
                    self._place(writer, row, sample, result)
            return
        value = samples if self.job.batched else samples[0]
        doing = "collating"
        try:
            if self.job.collate is not None:
                reading(COLLATING)
                self._enter_collate(task)
                with COLLATE:
                    value = self.job.collate(value)
            doing = "sending back"
            if self._apart:
                with WRITE:
                    result.parcel = self._pack(task, value)
            else:
                result.value = value
        except Exception as error:
            self._raise_if_interrupted(error)
            keys = None if self.job.fetch == "stream" else list(task.keys)
            result.failures.append(self._failure(error, None, keys, doing))

    def _place(self, writer: RowWriter | None, row: int, sample: Any, result: Result) -> None:
        if writer is not None:
            writer.write(row, sample, result.overflow)
            return
        if result.spec is None:
            result.spec = BatchSpec.from_sample(sample, self.job.fields)
        result.overflow.samples.append((row, sample))

    def _pack(self, task: Task, value: Any) -> Parcel:
        pickled, buffers = pack(value)
        pieces: list[int | bytearray] = []
        view = memoryview(self._memory)
        for number, buffer in enumerate(buffers):
            raw = buffer.raw()
            if number < len(task.blocks) and raw.nbytes <= task.blocks[number][1]:
                offset = task.blocks[number][0]
                view[offset : offset + raw.nbytes] = raw
                pieces.append(raw.nbytes)
            else:
                pieces.append(bytearray(raw))
        return Parcel(pickled, pieces)

    def _writer_of(self, task: Task, rows: int | None = None) -> RowWriter | None:
        if task.spec is None:
            return None
        rows = len(task.keys) if rows is None else rows
        # A batch that is read again can have another number of rows, and then other offsets.
        if self._writer is None or self._writer[0] != (task.ticket, rows):
            offsets = [offset for offset, _ in task.blocks]
            self._writer = (task.ticket, rows), RowWriter(task.spec, self._memory, offsets, rows)
        return self._writer[1]

    def _enter(self, task: Task, row: int) -> None:
        """Key what is drawn from here on by the sample in `row`."""
        position = task.position + row * task.stride
        enter_sample(task.seed, task.epoch, position)
        if self._transforms:
            self._transforms.rekey(task.seed, task.epoch, position)
        if self._generators is not None and self._generators.keyed:
            self._generators.enter(Domain.PROCESS, task.seed, task.epoch, position)

    def _enter_collate(self, task: Task) -> None:
        """Key what is drawn from here on by the batch."""
        enter_sample(task.seed, task.epoch, task.position, Domain.COLLATE)
        if self._transforms:
            self._transforms.rekey(task.seed, task.epoch, task.position, Domain.COLLATE)
        if self._generators is not None:
            self._generators.enter(Domain.COLLATE_PROCESS, task.seed, task.epoch, task.position)

    def _failure(self, error: Exception, row: int | None, key: Any, doing: str) -> Failure:
        return Failure.of(error, doing, row, key, describe(self.job.dataset, key) if row is not None else None)


_END, _PLACED = object(), object()
