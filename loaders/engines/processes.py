"""Worker processes over shared memory, and their supervision.

No lock crosses processes and all state is here in the consumer, so workers may be killed at any instruction: what they
had is known from their cells, and is done again.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np

from loaders.batching.arena import round_up
from loaders.batching.slots import Block, SlotPool
from loaders.engines.process_worker import Setup, main
from loaders.engines.protocol import Reading
from loaders.engines.wire import (
    CANCELLED,
    CELL_NBYTES,
    DONE,
    ORDER_HEADER,
    ROW_AT,
    RUN,
    SINCE_AT,
    Inherited,
    as_keys,
    widen_pipe,
)
from loaders.engines.work import Failure, Job, Order, Outcome
from loaders.errors import WorkerLostError, describe_sample
from loaders.spec import BatchSpec
from loaders.stateful import describe

# A sample that was being read by this many dying workers is at fault.
STRIKES = 3
# Processes that end by themselves while starting, or that are killed without any run between.
_FAILED_STARTS, _FRUITLESS_KILLS = 3, 200
# How long `close` waits for workers that are in the middle of a sample before it kills them.
_GRACE_S = 2.0
_RECORDS_PER_WRITE = select.PIPE_BUF // RUN.size


@dataclass
class _Process:
    """One worker process as the consumer knows it."""

    serial: int
    process: Any
    gate: socket.socket
    cell: np.ndarray[Any, Any]
    cell_at: int
    number: int | None = None  # None for a spare: started and warm, but not yet a worker
    ready: bool = False  # has reported a run
    payloads: deque[tuple[tuple[int, ...], bytearray]] = field(default_factory=deque)


@dataclass
class _Placed:
    """An order in the arena, and the runs of it that are not reported yet (start row → stop row)."""

    order: Order
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
    """

    def __init__(self, job: Job, pool: SlotPool, context: BaseContext) -> None:
        self.pool = pool
        self.num_workers = job.num_workers
        self._job = job
        self._context = context
        self._pid = os.getpid()
        self._lanes = [os.pipe() for _ in range(job.num_workers if job.fetch == "stream" else 1)]
        self._done = os.pipe()
        for fd in (*(write for _, write in self._lanes), self._done[0]):
            os.set_blocking(fd, False)
        widen_pipe(self._done[1])
        self._unsent: list[deque[bytes]] = [deque() for _ in self._lanes]
        self._poll = select.poll()
        self._poll.register(self._done[0], select.POLLIN)
        self._by_sentinel: dict[int, _Process] = {}
        self._by_gate: dict[int, _Process] = {}
        self._processes: dict[int, _Process] = {}
        self._placed: dict[int, _Placed] = {}
        self._spec_refs: dict[int, tuple[int, int, int]] = {}
        self._specs: list[BatchSpec] = []  # held, so that their ids stay theirs
        self._specs_at: list[tuple[int, int]] = []
        self._strikes: dict[tuple[int, int], int] = {}
        self._serial = 0
        self._failed_starts = 0
        self._kills = 0
        self._ready: list[Outcome] = []
        self._tail = b""
        self._closed = False
        self._cells_nbytes = round_up(CELL_NBYTES * (2 * job.num_workers + 4))
        self._cells_at = pool.arena.reserve(self._cells_nbytes)
        self._free_cells = list(range(0, self._cells_nbytes, CELL_NBYTES))
        try:
            for number in range(job.num_workers):
                self._promote(self._start(number), number)
        except BaseException:
            self.close()
            raise

    # -- the engine protocol

    def submit(self, order: Order, runs: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Put the order into shared memory and its runs into the pipe."""
        placed = self._placed.get(order.ticket)
        if placed is None or placed.order is not order:
            placed = self._placed[order.ticket] = self._place(order, lane % len(self._lanes))
        placed.runs.update(runs)
        self._send(placed, runs)

    def collect(self, timeout_s: float | None) -> list[Outcome]:
        """The outcomes that are there, after looking after the workers."""
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
                elif fd in self._by_gate:
                    self._read_gate(self._by_gate[fd])
                elif fd in self._by_sentinel:
                    dead.append(self._by_sentinel[fd])
            for process in dead:
                self._bury(process)
            if self._ready or (deadline is not None and time.monotonic() >= deadline):
                ready, self._ready = self._ready, []
                return ready

    def cancel(self, order: Order) -> None:
        """Raise the order's flag in shared memory: workers look at it before every row."""
        order.cancelled = True
        placed = self._placed.get(order.ticket)
        if placed is not None:
            self.pool.arena.buffer[placed.block.offset] = 1

    def reading(self) -> list[Reading]:
        """What each worker's cell says."""
        now = time.monotonic_ns()
        found = []
        for process in self._processes.values():
            placed, _, row = self._held_by(process)
            if placed is not None and row >= 0:
                since_s = (now - int(process.cell[SINCE_AT])) / 1e9
                found.append(Reading(process.number or 0, placed.order.ticket, row, since_s))
        return sorted(found, key=lambda reading: -reading.since_s)

    def close(self) -> None:
        """End all workers: those that are idle at once, those in the middle of a sample after a moment by force."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        for placed in self._placed.values():
            self.pool.arena.buffer[placed.block.offset] = 1
        for _, write in self._lanes:
            os.close(write)
        for process in self._processes.values():
            process.gate.close()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes.values():
            process.process.join(max(0.0, deadline - time.monotonic()))
            if process.process.is_alive():
                process.process.kill()
                process.process.join()
            process.process.close()
        for fd in (*(read for read, _ in self._lanes), *self._done):
            os.close(fd)
        self.pool.discard([placed.block for placed in self._placed.values()])
        for offset, nbytes in (*self._specs_at, (self._cells_at, self._cells_nbytes)):
            self.pool.arena.release(offset, nbytes)
        self._processes.clear()
        self._placed.clear()

    # -- orders and runs

    def _place(self, order: Order, lane: int) -> _Placed:
        content = pickle.dumps(
            (as_keys(order.keys), order.position, order.epoch, order.seed, self._spec_ref(order.spec), order.blocks, order.raw),
            protocol=5,
        )
        [block] = self.pool.acquire([ORDER_HEADER + len(content)])
        buffer, at = self.pool.arena.buffer, block.offset
        buffer[at : at + ORDER_HEADER] = bytes(ORDER_HEADER)
        buffer[at + ORDER_HEADER : at + ORDER_HEADER + len(content)] = content
        return _Placed(order, block, len(content), lane, {})

    def _spec_ref(self, spec: BatchSpec | None) -> tuple[int, int, int] | None:
        if spec is None:
            return None
        if id(spec) not in self._spec_refs:
            content = pickle.dumps(spec, protocol=5)
            room = round_up(len(content))
            at = self.pool.arena.reserve(room)
            self.pool.arena.buffer[at : at + len(content)] = content
            self._specs.append(spec)
            self._specs_at.append((at, room))
            self._spec_refs[id(spec)] = len(self._specs), at, len(content)
        return self._spec_refs[id(spec)]

    def _send(self, placed: _Placed, runs: Sequence[tuple[int, int]], *, first: bool = False) -> None:
        ticket, at, nbytes = placed.order.ticket, placed.block.offset, placed.nbytes
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

    def _finish(self, outcome: Outcome) -> None:
        """Report a run once: a worker that died behind its own report has been heard already."""
        placed = self._placed.get(outcome.ticket)
        if placed is None or placed.runs.pop(outcome.start, None) is None:
            return
        self._ready.append(outcome)
        if not placed.runs:
            del self._placed[outcome.ticket]
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
            serial, ticket, start, stop, flags, elapsed_ns, inline, apart = header
            if len(tail) - at < DONE.size + inline:
                break
            at += DONE.size + inline
            process = self._processes.get(serial)
            if process is not None:
                process.ready = True
                self._failed_starts = self._kills = 0
            if inline:
                self._finish(_opened(header, tail[at - inline : at]))
            elif apart:
                if process is not None:
                    process.payloads.append((header, bytearray()))
                    self._by_gate[process.gate.fileno()] = process
                    self._poll.register(process.gate.fileno(), select.POLLIN)
                    self._read_gate(process)
            else:
                number = process.number if process is not None and process.number is not None else 0
                outcome = Outcome(number, ticket, start, stop, elapsed_ns / 1e9, bool(flags & CANCELLED))
                self._finish(outcome)
        self._tail = tail[at:]

    def _read_gate(self, process: _Process) -> None:
        """Take what is there of the payloads this worker has announced."""
        while process.payloads:
            header, payload = process.payloads[0]
            try:
                data = process.gate.recv(min(header[-1] - len(payload), 1 << 20), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                break  # dead: its sentinel says so too
            payload += data
            if len(payload) == header[-1]:
                process.payloads.popleft()
                self._finish(_opened(header, payload))
        if self._by_gate.pop(process.gate.fileno(), None) is not None:
            self._poll.unregister(process.gate.fileno())

    # -- supervision

    def _start(self, number: int | None) -> _Process:
        ours, theirs = socket.socketpair()
        serial, self._serial = self._serial, self._serial + 1
        offset = self._cells_at + self._free_cells.pop()
        cell = np.ndarray(CELL_NBYTES // 8, np.int64, self.pool.arena.buffer, offset)
        cell[:] = -1
        forked = self._context.get_start_method() == "fork"
        others = [process.gate.fileno() for process in self._processes.values()]
        setup = Setup(
            job=self._job,
            arena=self.pool.arena,
            cell=offset,
            serial=serial,
            runs=Inherited(self._lanes[(number or 0) % len(self._lanes)][0]),
            done=Inherited(self._done[1]),
            gate=Inherited(theirs.fileno()),
            # A fork has these too; held there, they would keep the others from seeing that this process has died.
            not_mine=[ours.fileno(), self._done[0], *(write for _, write in self._lanes), *others] if forked else [],
            consumer=None if self._context.get_start_method() == "forkserver" else os.getpid(),
        )
        name = f"loaders-{'spare' if number is None else number}"
        process = self._context.Process(target=main, args=(setup,), name=name, daemon=True)  # type: ignore[attr-defined]
        try:
            process.start()
        except BaseException:
            ours.close()
            self._free_cells.append(offset - self._cells_at)
            raise
        finally:
            # A socket object would close its descriptor in a forked child when it is collected there.
            theirs.close()
        started = _Process(serial, process, ours, cell, offset - self._cells_at)
        self._processes[serial] = started
        self._by_sentinel[process.sentinel] = started
        self._poll.register(process.sentinel, select.POLLIN)
        return started

    def _promote(self, process: _Process, number: int) -> None:
        process.number = number
        try:
            process.gate.send(number.to_bytes(8, "little"))
        except (BrokenPipeError, ConnectionResetError):
            pass  # dead already: its sentinel will say so

    def _held_by(self, process: _Process) -> tuple[_Placed | None, int, int]:
        """(order, start row, row being read) of the run in a worker's cell; None if that run has been reported."""
        ticket, start, row = int(process.cell[0]), int(process.cell[1]), int(process.cell[ROW_AT])
        placed = self._placed.get(ticket)
        if placed is None or start not in placed.runs:
            return None, -1, -1
        return placed, start, row

    def _bury(self, process: _Process) -> None:
        """A worker has died: hear its last words, do its run again, and put another in its place."""
        self._read_done()
        self._read_gate(process)
        process.process.join()
        exitcode: int = process.process.exitcode
        placed, start, row = self._held_by(process)
        self._forget(process)
        if exitcode < 0:
            self._kills += 1
        elif not process.ready and placed is None:
            self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS or self._kills >= _FRUITLESS_KILLS:
            raise WorkerLostError(
                f"worker processes cannot be kept alive: the last one was lost {_ended(exitcode)}.\n"
                "  Its own output says more. Under spawn and forkserver the dataset and the main module are imported "
                "anew: guard the main program with `if __name__ == '__main__':`."
            )
        if process.number is not None:
            spare = next((each for each in self._processes.values() if each.number is None), None)
            self._promote(spare or self._start(process.number), process.number)
        # With lanes a worker's stream is its own: a spare could not know in time which one to follow.
        if len(self._lanes) == 1 and not any(each.number is None for each in self._processes.values()):
            self._start(None)
        if placed is not None:
            self._redo(placed, start, row, process, exitcode)

    def _forget(self, process: _Process) -> None:
        self._poll.unregister(process.process.sentinel)
        del self._by_sentinel[process.process.sentinel]
        if self._by_gate.pop(process.gate.fileno(), None) is not None:
            self._poll.unregister(process.gate.fileno())
        process.gate.close()
        process.process.close()
        self._free_cells.append(process.cell_at)
        del self._processes[process.serial]

    def _redo(self, placed: _Placed, start: int, row: int, process: _Process, exitcode: int) -> None:
        stop, ticket = placed.runs[start], placed.order.ticket
        pieces: list[tuple[int, int]] = [(start, stop)]
        if row >= 0:
            strikes = self._strikes[ticket, row] = self._strikes.get((ticket, row), 0) + 1
            if strikes >= STRIKES:
                failure = self._lost(placed.order, row, process, exitcode)
                if self._job.fetch == "each" and self._job.collate is None and self._job.batched:
                    # This row is given up; its neighbours in the run are not.
                    del placed.runs[start]
                    pieces = [piece for piece in ((start, row), (row + 1, stop)) if piece[0] < piece[1]]
                    placed.runs.update({**dict(pieces), row: row + 1})
                    self._finish(Outcome(process.number or 0, ticket, row, row + 1, failures=[failure]))
                else:
                    self._finish(Outcome(process.number or 0, ticket, start, stop, failures=[failure]))
                    return
        if len(self._lanes) > 1:
            self._unsent[placed.lane].extendleft(reversed(list(self._drain(placed.lane))))
        self._send(placed, pieces, first=True)

    def _drain(self, lane: int) -> Iterator[bytes]:
        """Take back what waits in a lane whose only reader is dead: a stream is to be followed in order."""
        read = self._lanes[lane][0]
        while select.select([read], [], [], 0)[0]:
            yield os.read(read, RUN.size)

    def _lost(self, order: Order, row: int, process: _Process, exitcode: int) -> Failure:
        key = order.keys[row] if self._job.fetch != "stream" else None
        source = describe(self._job.dataset, key) if key is not None else None
        name = describe_sample(key, source, row) if key is not None else f"batch {order.keys[0]} of its stream"
        error = WorkerLostError(
            f"worker {process.number} was lost {STRIKES} times on {name}, the last time {_ended(exitcode)}.\n"
            + ("  Likely out of memory." if exitcode == -signal.SIGKILL else "  Likely a crash in native code: ")
            + ("" if exitcode == -signal.SIGKILL else "read this sample in the main process, with num_workers=0."),
            index=key if isinstance(key, int) else None,
            source=source,
        )
        return Failure(row, key, source, "reading", type(error).__name__, "", error)


def _opened(header: tuple[int, ...], payload: bytes | bytearray) -> Outcome:
    try:
        outcome: Outcome = pickle.loads(payload)
    except Exception as error:  # a class of the user's that cannot be rebuilt here
        _, ticket, start, stop, *_ = header
        outcome = Outcome(0, ticket, start, stop, failures=[Failure.of(error, "receiving the result of")])
    return outcome


def _ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"by exit with status {exitcode}"
    try:
        return f"by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"by signal {-exitcode}"
