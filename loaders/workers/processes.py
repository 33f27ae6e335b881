"""Worker processes over shared memory, and their supervision.

No lock crosses processes and all state is here in the consumer, so workers may be killed at any instruction: what they
had is known from their cells, and is done again.
"""

from __future__ import annotations

import itertools
import os
import pickle
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext

from loaders.batch.packing import pack
from loaders.batch.spec import BatchSpec
from loaders.errors import BufferMemoryError, WorkerLostError
from loaders.memory.blocks import Block
from loaders.memory.slots import SlotPool
from loaders.timing.stages import Times
from loaders.workers.engine import Reading, describe_work
from loaders.workers.messages import Failure, Job, Result, Task
from loaders.workers.supervisor import Supervisor, WorkerProcess, ended
from loaders.workers.wire import (
    CANCELLED,
    CELL_NBYTES,
    DONE,
    ROW_AT,
    RUN,
    SINCE_AT,
    STOP,
    STOPPED,
    TASK_HEADER,
    as_keys,
    widen_pipe,
)
from loaders.workers.worker import COLLATING

# A sample that was being read by this many dying workers is at fault.
STRIKES = 3
_APART = 7  # in a DONE record: bytes of the payload that comes through the socket
_RECORDS_PER_WRITE = select.PIPE_BUF // RUN.size


@dataclass
class _Placed:
    """A task in the arena, and the runs of it that are not reported yet (start row → stop row)."""

    task: Task
    block: Block
    nbytes: int
    lane: int
    runs: dict[int, int]


class ProcessEngine:
    """Worker processes that take runs from one pipe, whichever is free, and write rows into shared slots.

    Args:
        job: what to do.
        pool: slots in a shared arena.
        context: of multiprocessing: fork, forkserver or spawn.
        num_workers: how many to begin with, where that is not the job's number, which is the most there may be.
    """

    def __init__(self, job: Job, pool: SlotPool, context: BaseContext, num_workers: int | None = None) -> None:
        self.pool = pool
        self.num_workers = num_workers or job.num_workers
        self._job = job
        self._pid = os.getpid()
        # Blocks that are no batch: the workers' cells, then every spec.
        self._own = pool.acquire([CELL_NBYTES * (2 * job.num_workers + 4)], bounded=False)
        self._lanes = [os.pipe() for _ in range(job.num_workers if job.fetch == "stream" else 1)]
        self._done = os.pipe()
        for fd in (*(write for _, write in self._lanes), self._done[0]):
            os.set_blocking(fd, False)
        widen_pipe(self._done[1])
        self._unsent: list[deque[bytes]] = [deque() for _ in self._lanes]
        self._poll = select.poll()
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
        self._by_channel: dict[int, WorkerProcess] = {}
        self._placed: dict[int, _Placed] = {}
        self._spec_refs: dict[int, tuple[int, int, int]] = {}
        self._specs: list[BatchSpec] = []  # held, so that their ids stay theirs
        self._strikes: dict[tuple[int, int], int] = {}
        self._ready: list[Result] = []
        self._tail = b""
        self._closed = False
        self._workers = 0  # started and not sent home, not counting replacements

    # -- the engine protocol

    def submit(self, task: Task, runs: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Put the task into shared memory and its runs into the pipe."""
        placed = self._placed.get(task.ticket)
        if placed is None or placed.task is not task:
            try:
                placed = self._placed[task.ticket] = self._place(task, lane % len(self._lanes))
            except BufferMemoryError:
                raise
            except Exception as error:  # keys of the user's that cannot be pickled
                failure = Failure.of(error, "ordering", None, list(task.keys))
                self._ready += [Result(0, task.ticket, start, stop, failures=[failure]) for start, stop in runs]
                return
        placed.runs.update(runs)
        self._send(placed, runs)
        # Only now, so that the first worker has something to do while the next ones are started.
        while self._workers < self.num_workers and (number := self._free_number()) is not None:
            self._supervisor.start(number)
            self._workers += 1

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The results that are there, after looking after the workers."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._flush()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._ready:
                left = 0.0
            dead = []
            for fd, _ in self._poll.poll(None if left is None else left * 1000):
                if fd == self._done[0]:
                    self._read_done()
                elif fd in self._by_channel:
                    self._read_channel(self._by_channel[fd])
                elif fd in self._supervisor.by_sentinel:
                    dead.append(self._supervisor.by_sentinel[fd])
            for worker in dead:
                self._reap(worker)
            if self._ready or (deadline is not None and time.monotonic() >= deadline):
                ready, self._ready = self._ready, []
                return ready

    def wait(self, timeout_s: float | None) -> None:
        """Until a worker has reported or died."""
        if not self._ready:
            self._poll.poll(None if timeout_s is None else timeout_s * 1000)

    def cancel(self, task: Task) -> None:
        """Raise the task's flag in shared memory: workers look at it before every row."""
        task.cancelled = True
        placed = self._placed.get(task.ticket)
        if placed is not None:
            self.pool.arena.buffer[placed.block.offset] = 1

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
        """Start workers with the next task, or send home whichever are idle first."""
        self.num_workers = workers
        surplus = self._workers - workers
        if surplus > 0:
            self._workers = workers
            self._unsent[0].extend([STOP] * surplus)
            self._flush()

    def _free_number(self) -> int | None:
        """The lowest that no worker has; None while as many as there may be are on their way home."""
        taken = {worker.number for worker in self._supervisor.processes.values()}
        return next((number for number in range(self._job.num_workers) if number not in taken), None)

    def close(self, *, force: bool = False) -> None:
        """End all workers: those that are idle at once, those in the middle of a sample after a moment by force."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        for placed in self._placed.values():
            self.pool.arena.buffer[placed.block.offset] = 1
        for unsent in self._unsent:
            # Said, not only hung up: a process that was forked from this one may hold the pipes open.
            unsent.clear()
            unsent.extend([STOP] * len(self._supervisor.processes))
        self._supervisor.close(self._flush)
        for fd in itertools.chain(self._done, *self._lanes):
            os.close(fd)
        self.pool.discard([*(placed.block for placed in self._placed.values()), *self._own])
        self._placed.clear()

    # -- tasks and runs

    def _place(self, task: Task, lane: int) -> _Placed:
        content = pickle.dumps(
            (
                as_keys(task.keys),
                task.position,
                task.epoch,
                task.seed,
                self._spec_ref(task.spec),
                task.blocks,
                task.stride,
                task.attempt,
                task.raw,
                task.resume,
            ),
            protocol=5,
        )
        [block] = self.pool.acquire([TASK_HEADER + len(content)], bounded=False)
        buffer, at = self.pool.arena.buffer, block.offset
        buffer[at : at + TASK_HEADER] = bytes(TASK_HEADER)
        buffer[at + TASK_HEADER : at + TASK_HEADER + len(content)] = content
        return _Placed(task, block, len(content), lane, {})

    def _spec_ref(self, spec: BatchSpec | None) -> tuple[int, int, int] | None:
        if spec is None:
            return None
        if id(spec) not in self._spec_refs:
            content, _ = pack(spec)  # its containers may be namedtuples with a `__new__` of their own
            [block] = self.pool.acquire([len(content)], bounded=False)
            self.pool.arena.buffer[block.offset : block.offset + len(content)] = content
            self._own.append(block)
            self._specs.append(spec)
            self._spec_refs[id(spec)] = len(self._specs), block.offset, len(content)
        return self._spec_refs[id(spec)]

    def _send(self, placed: _Placed, runs: Sequence[tuple[int, int]], *, first: bool = False) -> None:
        ticket, at, nbytes = placed.task.ticket, placed.block.offset, placed.nbytes
        records = [RUN.pack(ticket, start, stop, at, nbytes, 0, 0, 0) for start, stop in runs]
        unsent = self._unsent[placed.lane]
        if first:
            unsent.extendleft(reversed(records))
        else:
            unsent.extend(records)
        self._flush()

    def _flush(self) -> None:
        for (_, write), unsent in zip(self._lanes, self._unsent, strict=True):
            while unsent:
                chunk = [unsent[i] for i in range(min(len(unsent), _RECORDS_PER_WRITE))]
                try:
                    os.write(write, b"".join(chunk))  # at most PIPE_BUF: all of it or nothing
                except BlockingIOError:
                    break
                for _ in chunk:
                    unsent.popleft()

    def _finish(self, result: Result) -> None:
        """Report a run once: a worker that died behind its own report has been heard already."""
        placed = self._placed.get(result.ticket)
        if placed is None or placed.runs.pop(result.start, None) is None:
            return
        self._ready.append(result)
        if not placed.runs:
            del self._placed[result.ticket]
            self.pool.discard([placed.block])

    # -- what workers say

    def _read_done(self) -> None:
        try:
            while len(data := os.read(self._done[0], 1 << 16)) > 0:
                self._tail += data
                if len(data) < 1 << 16:
                    break
        except BlockingIOError:
            pass
        at, tail = 0, self._tail
        while len(tail) - at >= DONE.size:
            header = DONE.unpack_from(tail, at)
            serial, ticket, start, stop, flags, elapsed_ns, inline, apart, *times = header
            if len(tail) - at < DONE.size + inline:
                break
            at += DONE.size + inline
            worker = self._supervisor.processes.get(serial)
            self._supervisor.is_working()
            if inline:
                self._finish(self._opened(header, tail[at - inline : at]))
            elif apart:
                if worker is not None:
                    worker.payloads.append((header, bytearray()))
                    self._by_channel[worker.channel.fileno()] = worker
                    self._poll.register(worker.channel.fileno(), select.POLLIN)
                    self._read_channel(worker)
            else:
                number = worker.number if worker is not None and worker.number is not None else 0
                result = Result(number, ticket, start, stop, elapsed_ns / 1e9, bool(flags & CANCELLED))
                result.times = Times._make(times)
                self._finish(result)
        self._tail = tail[at:]

    def _read_channel(self, worker: WorkerProcess) -> None:
        """Take what is there of the payloads this worker has announced."""
        while worker.payloads:
            header, payload = worker.payloads[0]
            try:
                data = worker.channel.recv(min(header[_APART] - len(payload), 1 << 20), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                break  # dead: its sentinel says so too
            payload += data
            if len(payload) == header[_APART]:
                worker.payloads.popleft()
                self._finish(self._opened(header, payload))
        if self._by_channel.pop(worker.channel.fileno(), None) is not None:
            self._poll.unregister(worker.channel.fileno())

    # -- what becomes of the runs of workers that were lost

    def _held_by(self, worker: WorkerProcess) -> tuple[_Placed | None, int, int]:
        """(task, start row, row being read) of the run in a worker's cell; None if that run has been reported."""
        ticket, start, row = int(worker.cell[0]), int(worker.cell[1]), int(worker.cell[ROW_AT])
        placed = self._placed.get(ticket)
        if placed is None or start not in placed.runs:
            return None, -1, -1
        return placed, start, row

    def _reap(self, worker: WorkerProcess) -> None:
        """A worker has died: hear its last words, do its run again, and put another in its place."""
        self._read_done()
        self._read_channel(worker)
        if self._by_channel.pop(worker.channel.fileno(), None) is not None:
            self._poll.unregister(worker.channel.fileno())
        placed, start, row = self._held_by(worker)
        was_stopped = (int(worker.cell[0]), int(worker.cell[1])) == STOPPED
        exitcode = self._supervisor.reap(worker)
        if was_stopped:
            return  # nobody is to take its place
        if placed is not None:
            self._redo(placed, start, row, worker, exitcode)
        # Only now: a stream's runs are in order again before somebody else follows them.
        self._supervisor.replace(worker, exitcode, over_a_sample=row != -1)

    def _redo(self, placed: _Placed, start: int, row: int, worker: WorkerProcess, exitcode: int | None) -> None:
        stop, ticket, number = placed.runs[start], placed.task.ticket, worker.number or 0
        pieces: list[tuple[int, int]] = [(start, stop)]
        if row != -1:
            strikes = self._strikes[ticket, row] = self._strikes.get((ticket, row), 0) + 1
            if strikes >= STRIKES:
                failure = self._lost(placed.task, row, number, exitcode)
                if self._job.fetch == "each" and self._job.collate is None and self._job.batched:
                    # This row is given up; its neighbours in the run are not.
                    del placed.runs[start]
                    pieces = [piece for piece in ((start, row), (row + 1, stop)) if piece[0] < piece[1]]
                    placed.runs.update({**dict(pieces), row: row + 1})
                    self._finish(Result(number, ticket, row, row + 1, failures=[failure]))
                else:
                    self._finish(Result(number, ticket, start, stop, failures=[failure]))
                    return
        if self._job.fetch == "stream":
            self._unsent[placed.lane].extendleft(reversed(list(self._drain(placed.lane))))
        self._send(placed, pieces, first=True)

    def _drain(self, lane: int) -> Iterator[bytes]:
        """Take back what waits in a lane whose only reader is dead: a stream is to be followed in order."""
        read = self._lanes[lane][0]
        while select.select([read], [], [], 0)[0]:
            yield os.read(read, RUN.size)

    def _lost(self, task: Task, row: int, number: int, exitcode: int | None) -> Failure:
        key, source, name = describe_work(self._job.dataset, self._job.fetch, task, row)
        if exitcode == -signal.SIGKILL:
            remedy = "Likely out of memory."
        else:
            what = "a crash in native code" if (exitcode or 0) < 0 else "something in the dataset ends the process"
            remedy = f"Likely {what}: read this in the main process, with num_workers=0."
        told = f"worker {number} was lost {STRIKES} times on {name}, the last time {ended(exitcode)}."
        is_sample = self._job.fetch == "each" and row >= 0
        error = WorkerLostError(f"{told}\n  {remedy}", index=key if isinstance(key, int) else None, source=source)
        doing = "collating" if row == COLLATING else "reading"
        return Failure(row if is_sample else None, key, source, doing, f"WorkerLostError: {told}", "", error)

    def _opened(self, header: tuple[int, ...], payload: bytes | bytearray) -> Result:
        try:
            result: Result = pickle.loads(payload)
        except Exception as error:  # a class of the user's that cannot be rebuilt here
            _, ticket, start, stop, *_ = header
            placed = self._placed.get(ticket)
            keys = list(placed.task.keys[start:stop]) if placed is not None and self._job.fetch != "stream" else None
            result = Result(0, ticket, start, stop, failures=[Failure.of(error, "receiving", None, keys)])
        return result
