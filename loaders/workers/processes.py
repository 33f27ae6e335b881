"""Worker processes over shared memory, and their supervision.

No lock crosses processes and all state is here in the consumer, so workers may be killed at any instruction: their
cells show what they were doing, and it is done again.
"""

from __future__ import annotations

import itertools
import os
import pickle
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.context import BaseContext

from loaders.errors import BufferMemoryError, WorkerLostError
from loaders.memory.slots import SlotPool
from loaders.system.interrupts import is_interrupt, undisturbed
from loaders.timing.stages import Times
from loaders.workers.engine import Reading
from loaders.workers.messages import Failure, Job, Result, Task
from loaders.workers.strikes import LAST_CHANCE_AFTER_S, Strikes, failure_of_lost
from loaders.workers.supervisor import Supervisor, WorkerProcess
from loaders.workers.task_memory import PlacedTask, TaskMemory
from loaders.workers.wire import (
    CANCELLED,
    CELL_NBYTES,
    DONE,
    NO_TICKET,
    ROW_AT,
    SINCE_AT,
    SPAN,
    STOP,
    STOPPED,
    open_pipes,
    widen_pipe,
)

_APART = 7  # index in a DONE record: bytes of the payload that comes through the socket
_RECORDS_PER_WRITE = select.PIPE_BUF // SPAN.size


class ProcessEngine:
    """Worker processes: whichever is free takes the next span from one pipe and writes rows into shared slots.

    Args:
        job: what to do.
        pool: slots in a shared arena.
        context: of multiprocessing: fork, forkserver or spawn.
        num_workers: how many to start with; by default the job's number, which is also the maximum.

    Attributes:
        intact: False once an exception, such as one from a signal handler, has interrupted a call: then only `close`
            may be called. An exception while `collect` waits interrupts nothing.
    """

    def __init__(self, job: Job, pool: SlotPool, context: BaseContext, num_workers: int | None = None) -> None:
        self.pool = pool
        self.num_workers = num_workers or job.num_workers
        self._job = job
        self._pid = os.getpid()
        self.intact = True
        self._closed = False
        self._poll = select.poll()
        self._by_channel: dict[int, WorkerProcess] = {}
        self._placed: dict[int, PlacedTask] = {}
        self._strikes = Strikes()
        self._later: list[tuple[float, PlacedTask, tuple[int, int]]] = []  # due time, task, span
        self._ready: list[Result] = []
        self._refusal: Failure | None = None  # of a worker that cannot unpickle the job
        self._tail = b""
        self._workers = 0  # started and not stopped, not counting replacements
        # Blocks that belong to no batch: the workers' cells, then every spec.
        self._own = pool.acquire([CELL_NBYTES * (2 * job.num_workers + 4)], bounded=False)
        self._memory = TaskMemory(pool, self._own)
        try:
            with undisturbed():
                *self._lanes, self._done = open_pipes(1 + (job.num_workers if job.fetch == "stream" else 1))
        except OSError:
            pool.discard(self._own)
            raise
        for fd in (*(write for _, write in self._lanes), self._done[0]):
            os.set_blocking(fd, False)
        widen_pipe(self._done[1])
        self._unsent: list[deque[bytes]] = [deque() for _ in self._lanes]
        self._poll.register(self._done[0], select.POLLIN)
        self._supervisor = Supervisor(
            job,
            pool.arena,
            context,
            cells=self._own[0],
            lanes=[read for read, _ in self._lanes],
            done=self._done[1],
            not_theirs=[self._done[0], *(write for _, write in self._lanes)],
            poll=self._poll,
        )

    # -- the engine protocol

    def submit(self, task: Task, spans: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Put the task into shared memory and its spans into the pipe."""
        self._begin()
        placed = self._placed.get(task.ticket)
        if placed is None or placed.task is not task:
            try:
                placed = self._placed[task.ticket] = self._memory.place(task, lane % len(self._lanes))
            except BufferMemoryError:
                self.intact = True  # nothing has changed
                raise
            except Exception as error:
                if is_interrupt(error):
                    raise
                failure = Failure.of(error, "sending", None, list(task.keys))
                self._ready += [Result(0, task.ticket, start, stop, failures=[failure]) for start, stop in spans]
                self.intact = True
                return
        placed.spans.update(spans)
        self._send(placed, spans)
        # Only now, so that the first worker has something to do while the next ones are started.
        while self._workers < self.num_workers and (number := self._free_number()) is not None:
            self._supervisor.start(number)
            self._workers += 1
        self.intact = True

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The available results. Also sends what is due, and reaps and replaces workers that have died."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._begin()
        while True:
            if self._later:
                self._send_later()
            if any(self._unsent):
                self._flush()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._ready:
                left = 0.0
            dead = []
            self.intact = True  # polling changes nothing: an event that is lost here is reported again
            events = self._poll.poll(self._until_due_ms(left))
            self.intact = False
            for fd, _ in events:
                if fd == self._done[0]:
                    self._read_done()
                elif fd in self._by_channel:
                    self._read_channel(self._by_channel[fd])
                elif fd in self._supervisor.by_outbox:
                    self._supervisor.send_on(self._supervisor.by_outbox[fd])
                elif fd in self._supervisor.by_sentinel:
                    dead.append(self._supervisor.by_sentinel[fd])
            for worker in dead:
                with undisturbed():
                    self._reap(worker)
            if self._refusal is not None:
                self._supervisor.refused(self._refusal)
            if self._ready or (deadline is not None and time.monotonic() >= deadline):
                ready = self._ready
                self._ready, self.intact = [], True  # no signal handler can run from here to the return
                return ready

    def wait(self, timeout_s: float | None) -> None:
        """Wait until a worker has reported or died, or a delayed span is due."""
        if not self._ready:
            self._poll.poll(self._until_due_ms(timeout_s))

    def _until_due_ms(self, timeout_s: float | None) -> float | None:
        waits = [due - time.monotonic() for due, *_ in self._later] + ([] if timeout_s is None else [timeout_s])
        return max(0.0, min(waits)) * 1000 if waits else None

    def cancel(self, task: Task) -> None:
        """Set the task's flag in shared memory, which workers check before every row."""
        task.cancelled = True
        placed = self._placed.get(task.ticket)
        if placed is not None:
            self._memory.cancel(placed)

    def reading(self) -> list[Reading]:
        """What each worker's cell says."""
        now = time.monotonic_ns()
        found = []
        for worker in self._supervisor.processes.values():
            placed, _, row = self._held_by(worker)
            if placed is not None and row != -1:
                since_s = (now - int(worker.cell[SINCE_AT])) / 1e9
                found.append(Reading(worker.number or 0, placed.task.ticket, row, since_s))
        return sorted(found, key=lambda reading: -reading.since_s)

    def resize(self, workers: int) -> None:
        """Start more workers with the next task, or stop those that are idle first."""
        self._begin()
        self.num_workers = workers
        surplus = self._workers - workers
        if surplus > 0:
            self._workers = workers
            self._unsent[0].extend([STOP] * surplus)
            self._flush()
        self.intact = True

    def _begin(self) -> None:
        if not self.intact or self._closed:
            raise WorkerLostError("the workers are stopped, or a call was interrupted.\n  Start a new iteration.")
        self.intact = False

    def _free_number(self) -> int | None:
        """The lowest number that no worker has; None while workers that are stopping still have the rest."""
        taken = {worker.number for worker in self._supervisor.processes.values()}
        return next((number for number in range(self._job.num_workers) if number not in taken), None)

    def close(self, *, force: bool = False) -> None:
        """Stop all workers: idle ones at once; those in the middle of a sample are killed after a grace period.

        It may be called in any state. When it returns, no process is left that could write into the pool's memory.

        Args:
            force: kill all of them at once.
        """
        if self._pid != os.getpid():
            return
        with undisturbed():
            if self._closed:
                return
            self._closed = True
            for placed in self._placed.values():
                self._memory.cancel(placed)
            for unsent in self._unsent:
                # Closing the pipes is not enough: a process that was forked from this one may hold them open.
                unsent.clear()
                unsent.extend([STOP] * len(self._supervisor.processes))
            self._supervisor.close(self._flush, force=force or not self.intact)
            for fd in itertools.chain(self._done, *self._lanes):
                os.close(fd)
            self.pool.discard([*(placed.block for placed in self._placed.values()), *self._own])
            self._placed.clear()

    # -- tasks and spans

    def _send(self, placed: PlacedTask, spans: Sequence[tuple[int, int]], *, first: bool = False) -> None:
        ticket, at, nbytes = placed.task.ticket, placed.block.offset, placed.nbytes
        records = [SPAN.pack(ticket, start, stop, at, nbytes, 0, 0, 0) for start, stop in spans]
        unsent = self._unsent[placed.lane]
        if first:
            unsent.extendleft(reversed(records))
        else:
            unsent.extend(records)
        self._flush()

    def _send_later(self) -> None:
        """Send the delayed spans that are due."""
        now = time.monotonic()
        due = [entry for entry in self._later if entry[0] <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for _, placed, span in due:
            self._send(placed, [span], first=True)

    def _flush(self) -> None:
        for (_, write), unsent in zip(self._lanes, self._unsent, strict=True):
            while unsent:
                chunk = [unsent[i] for i in range(min(len(unsent), _RECORDS_PER_WRITE))]
                try:
                    os.write(write, b"".join(chunk))  # at most PIPE_BUF: all or nothing
                except BlockingIOError:
                    break
                for _ in chunk:
                    unsent.popleft()

    def _finish(self, result: Result) -> None:
        """Report a span, unless it has been reported: a worker may die right after its report."""
        if result.ticket == NO_TICKET:
            self._refusal = result.failures[0]
        placed = self._placed.get(result.ticket)
        if placed is None or placed.spans.pop(result.start, None) is None:
            return
        self._ready.append(result)
        if not placed.spans:
            del self._placed[result.ticket]
            self.pool.discard([placed.block])

    # -- results from workers

    def _read_done(self) -> None:
        try:
            while len(data := os.read(self._done[0], 1 << 16)) > 0:
                self._tail += data
                if len(data) < 1 << 16:
                    break
        except BlockingIOError:
            pass
        at, tail, processes = 0, self._tail, self._supervisor.processes
        if len(tail) >= DONE.size:
            self._supervisor.is_working()
        while len(tail) - at >= DONE.size:
            header = DONE.unpack_from(tail, at)
            serial, ticket, start, stop, flags, elapsed_ns, inline, apart, *times = header
            if len(tail) - at < DONE.size + inline:
                break
            at += DONE.size + inline
            worker = processes.get(serial)
            if inline:
                self._finish(self._opened(header, tail[at - inline : at]))
            elif apart:
                if worker is not None:
                    worker.payloads.append((header, bytearray()))
                    self._by_channel[worker.channel.fileno()] = worker
                    self._poll.register(worker.channel.fileno(), select.POLLIN)
                    self._read_channel(worker)
            else:
                number = (worker.number if worker is not None else 0) or 0
                found = elapsed_ns / 1e9, bool(flags & CANCELLED), Times(*times)
                self._finish(Result.plain(number, ticket, start, stop, *found))
        self._tail = tail[at:]

    def _read_channel(self, worker: WorkerProcess) -> None:
        """Receive what has arrived of the payloads that this worker has announced."""
        while worker.payloads:
            header, payload = worker.payloads[0]
            try:
                data = worker.channel.recv(min(header[_APART] - len(payload), 1 << 20), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                break  # dead, as its sentinel shows, too
            payload += data
            if len(payload) == header[_APART]:
                worker.payloads.popleft()
                self._finish(self._opened(header, payload))
        if self._by_channel.pop(worker.channel.fileno(), None) is not None:
            self._poll.unregister(worker.channel.fileno())

    # -- spans of lost workers

    def _held_by(self, worker: WorkerProcess) -> tuple[PlacedTask | None, int, int]:
        """(task, start row, row being read) of the span in a worker's cell; None if that span has been reported."""
        ticket, start, row = int(worker.cell[0]), int(worker.cell[1]), int(worker.cell[ROW_AT])
        placed = self._placed.get(ticket)
        if placed is None or start not in placed.spans:
            return None, -1, -1
        return placed, start, row

    def _reap(self, worker: WorkerProcess) -> None:
        """A worker has died: read what it has sent, do its span again, and replace it."""
        self._read_done()
        self._read_channel(worker)
        if self._by_channel.pop(worker.channel.fileno(), None) is not None:
            self._poll.unregister(worker.channel.fileno())
        placed, start, row = self._held_by(worker)
        was_stopped = (int(worker.cell[0]), int(worker.cell[1])) == STOPPED
        exitcode = self._supervisor.reap(worker)
        if was_stopped or self._refusal is not None:
            return  # it is not to be replaced
        place = (placed.task.ticket, row) if placed is not None and row != -1 else None
        is_at_fault = self._strikes.add(place, exitcode)
        if placed is not None:
            self._redo(placed, start, row, worker.number or 0, exitcode, is_at_fault=is_at_fault)
        # Only now: a stream's spans must be in order again before another worker reads them.
        self._supervisor.replace(worker, exitcode, over_a_sample=row != -1)

    def _redo(
        self, placed: PlacedTask, start: int, row: int, number: int, exitcode: int | None, *, is_at_fault: bool
    ) -> None:
        """Do a span again that was lost with worker `number`, or give up the row that was being read."""
        stop, ticket = placed.spans[start], placed.task.ticket
        pieces: list[tuple[int, int]] = [(start, stop)]
        failures: list[Failure] = []
        if is_at_fault:
            strikes = self._strikes.counts[ticket, row]
            failures.append(failure_of_lost(self._job, placed.task, row, number, strikes, exitcode))
        if self._job.fetch == "each" and self._job.collate is None and self._job.batched and row >= 0:
            # In pieces: where workers are killed often, short spans still finish. Giving up a row costs no other row.
            del placed.spans[start]
            pieces = [piece for piece in ((start, row), (row, row + 1), (row + 1, stop)) if piece[0] < piece[1]]
            placed.spans.update(pieces)
            start, stop = row, row + 1
        if failures:
            pieces.remove((start, stop))
            self._finish(Result(number, ticket, start, stop, failures=failures))
        elif self._job.fetch != "stream" and self._strikes.is_last_chance((ticket, row), exitcode):
            self._later.append((time.monotonic() + LAST_CHANCE_AFTER_S, placed, (start, stop)))
            pieces.remove((start, stop))
        if self._job.fetch == "stream" and pieces:
            # Take back what waits in the lane, whose only reader is dead: a stream must be read in order.
            read, waiting = self._lanes[placed.lane][0], []
            while select.select([read], [], [], 0)[0]:
                waiting.append(os.read(read, SPAN.size))
            self._unsent[placed.lane].extendleft(reversed(waiting))
        self._send(placed, pieces, first=True)

    def _opened(self, header: tuple[int, ...], payload: bytes | bytearray) -> Result:
        try:
            result: Result = pickle.loads(payload)
        except Exception as error:  # a value of the user's that cannot be unpickled here
            if is_interrupt(error):
                raise
            _, ticket, start, stop, *_ = header
            placed = self._placed.get(ticket)
            keys = list(placed.task.keys[start:stop]) if placed and self._job.fetch != "stream" else None
            result = Result(0, ticket, start, stop, failures=[Failure.of(error, "receiving", None, keys)])
        return result
