"""The worker processes of an engine: started, kept at strength, reaped, sent home."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

import numpy as np

from loaders.errors import WorkerLostError
from loaders.memory.arena import Arena
from loaders.memory.blocks import Block
from loaders.workers.messages import Job
from loaders.workers.process_main import Setup, main
from loaders.workers.wire import CELL_NBYTES, SINCE_AT, Inherited

# Processes that end by themselves, or are killed, without any span being reported in between.
_FAILED_STARTS, _FRUITLESS_KILLS = 3, 200
# How long `close` waits for workers that are in the middle of a sample before it kills them.
_GRACE_S = 2.0
# How long to look for the exit code of a process that has ended.
_STATUS_S = 0.1
_KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)


@dataclass
class WorkerProcess:
    """One worker process as the consumer knows it.

    Attributes:
        serial: unique among all processes of the engine.
        channel: the consumer's end of the worker's own socket.
        sentinel: a descriptor that becomes readable when the process has ended.
        cell: the worker's own piece of shared memory, `cell_at` bytes into those of all.
        number: None for a spare, which is started and warm, but not yet a worker.
        payloads: announced and not received yet: their headers, and what is there of them.
    """

    serial: int
    process: Any
    channel: socket.socket
    sentinel: int
    cell: np.ndarray[Any, Any]
    cell_at: int
    number: int | None
    payloads: deque[tuple[tuple[int, ...], bytearray]] = field(default_factory=deque)

    def is_warm(self) -> bool:
        """Whether it has started, and only waits for its number or has it already."""
        return bool(self.cell[SINCE_AT] != -1)


class Supervisor:
    """Starts processes, keeps a spare one warm, and notices when they cannot be kept alive.

    Args:
        job, arena: what every worker is given.
        context: of multiprocessing.
        cells: the block in which every process has a cell.
        lanes: the descriptors that spans are read from; worker `number` reads from lane `number % len(lanes)`.
        done: the descriptor that results are written to.
        not_theirs: descriptors of the consumer that a forked worker must not keep open.
        poll: is told of every process's sentinel.
    """

    def __init__(
        self,
        job: Job,
        arena: Arena,
        context: BaseContext,
        cells: Block,
        lanes: Sequence[int],
        done: int,
        not_theirs: Sequence[int],
        poll: select.poll,
    ) -> None:
        self.processes: dict[int, WorkerProcess] = {}
        self.by_sentinel: dict[int, WorkerProcess] = {}
        self._job = job
        self._arena = arena
        self._context = context
        self._method = context.get_start_method()
        self._cells_at = cells.offset
        self._free_cells = list(range(0, cells.nbytes, CELL_NBYTES))
        self._lanes = lanes
        self._done = done
        self._not_theirs = not_theirs
        self._poll = poll
        self._serial = 0
        self._spares = 1  # wanted
        self._failed_starts = 0
        self._kills = 0

    def start(self, number: int | None) -> None:
        """Start a process: worker `number`, or a spare."""
        ours, theirs = socket.socketpair()
        serial, self._serial = self._serial, self._serial + 1
        cell_at = self._free_cells.pop()
        cell = np.ndarray(CELL_NBYTES // 8, np.int64, self._arena.buffer, self._cells_at + cell_at)
        cell[:] = -1
        channels = [worker.channel.fileno() for worker in self.processes.values()]
        setup = Setup(
            job=self._job,
            arena=self._arena,
            cell=self._cells_at + cell_at,
            serial=serial,
            spans=Inherited(self._lanes[(number or 0) % len(self._lanes)]),
            done=Inherited(self._done),
            channel=Inherited(theirs.fileno()),
            # A fork has these too; held there, they would keep the others from seeing that this process has died.
            not_mine=[ours.fileno(), *channels, *self._not_theirs] if self._method == "fork" else [],
            consumer=os.getpid(),
            is_parent=self._method != "forkserver",
        )
        name = f"loaders-{'spare' if number is None else number}"
        process = self._context.Process(target=main, args=(setup,), name=name, daemon=True)  # type: ignore[attr-defined]
        try:
            _start_unhurt_by_ctrl_c(process, self._method)
            # A socket object would close its descriptor in a forked child when it is collected there: not a `with`.
            theirs.close()
            if setup.pickled is not None:
                # Through the socket, not with the rest: multiprocessing would wait for ever for a process that was
                # killed before it had read everything.
                ours.sendall(len(setup.pickled).to_bytes(8, "little"))
                ours.sendall(setup.pickled)
        except BaseException as error:
            theirs.close()
            ours.close()
            self._free_cells.append(cell_at)
            if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise
            self._count(_exitcode_of(process) if process.pid is not None else -signal.SIGKILL)
            self.start(number)
            return
        worker = WorkerProcess(serial, process, ours, _sentinel_of(process), cell, cell_at, None)
        self.processes[serial] = self.by_sentinel[worker.sentinel] = worker
        self._poll.register(worker.sentinel, select.POLLIN)
        if number is not None:
            self._promote(worker, number)

    def reap(self, worker: WorkerProcess) -> int | None:
        """Forget a process that has ended. Returns its exit code, None where that went to somebody else."""
        exitcode = _exitcode_of(worker.process)
        del self.processes[worker.serial], self.by_sentinel[worker.sentinel]
        self._poll.unregister(worker.sentinel)
        self._release(worker)
        self._free_cells.append(worker.cell_at)
        return exitcode

    def replace(self, worker: WorkerProcess, exitcode: int | None, *, over_a_sample: bool) -> None:
        """Put another in the place of one that was reaped.

        Raises:
            WorkerLostError: this leads nowhere. Deaths over a sample do not count here: the sample is at fault.
        """
        if not over_a_sample:
            self._count(exitcode)
        spares = sorted(
            (each for each in self.processes.values() if each.number is None), key=WorkerProcess.is_warm, reverse=True
        )
        if worker.number is not None:
            if not (spares and spares[0].is_warm()):
                # They die faster than one can be started: more at once stand a better chance.
                self._spares = min(self._spares + 1, len(self._free_cells))
            if spares:
                self._promote(spares.pop(0), worker.number)
            else:
                self.start(worker.number)
        # With lanes a worker's stream is its own: a spare could not know in time which one to follow.
        if len(self._lanes) == 1:
            for _ in range(min(self._spares - len(spares), len(self._free_cells))):
                self.start(None)

    def is_working(self) -> None:
        """A span was reported: workers can be kept alive."""
        self._failed_starts = self._kills = 0
        self._spares = 1

    def close(self, push: Callable[[], None]) -> None:
        """Wait until all have ended, by themselves at first, then by force; `push` sends what they are to be told."""
        poll = select.poll()
        living = {worker.sentinel for worker in self.processes.values()}
        for worker in self.processes.values():
            poll.register(worker.sentinel, select.POLLIN)
            try:
                # Not only closed: a process that was forked from the consumer may hold a copy of this end.
                worker.channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
        deadline = time.monotonic() + _GRACE_S
        while living and time.monotonic() < deadline:
            push()
            for sentinel, _ in poll.poll(50):
                poll.unregister(sentinel)
                living.discard(sentinel)
        for worker in self.processes.values():
            if worker.sentinel in living:
                worker.process.kill()
            _exitcode_of(worker.process)
            self._release(worker)
        self.processes.clear()
        self.by_sentinel.clear()

    def _promote(self, worker: WorkerProcess, number: int) -> None:
        worker.number = number
        try:
            worker.channel.send(number.to_bytes(8, "little"))
        except (BrokenPipeError, ConnectionResetError):
            pass  # dead already: its sentinel will say so

    def _count(self, exitcode: int | None) -> None:
        if exitcode in _KILLED_FROM_OUTSIDE:
            self._kills += 1
        else:
            self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS or self._kills >= _FRUITLESS_KILLS:
            raise WorkerLostError(
                f"worker processes cannot be kept alive: the last one was lost {ended(exitcode)}.\n"
                "  Its own output says more. Under spawn and forkserver the dataset and the main module are imported "
                "anew: guard the main program with `if __name__ == '__main__':`."
            )

    def _release(self, worker: WorkerProcess) -> None:
        worker.channel.close()
        os.close(worker.sentinel)
        if worker.process.exitcode is not None:
            worker.process.close()


def ended(exitcode: int | None) -> str:
    """How a process came to its end."""
    if exitcode is None:
        return "nobody knows how"
    if exitcode >= 0:
        return f"by exit with status {exitcode}"
    try:
        return f"by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"by signal {-exitcode}"


def _exitcode_of(process: Any) -> int | None:
    """The exit code of a process that has ended, or is about to."""
    process.join()
    deadline = time.monotonic() + _STATUS_S
    # Another thread may have asked the system and not noted it down yet; with SIGCHLD ignored it is lost.
    while (exitcode := process.exitcode) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return exitcode  # type: ignore[no-any-return]


def _start_unhurt_by_ctrl_c(process: Any, method: str) -> None:
    """Start a process so that Ctrl-C neither interrupts that half-way nor makes the process chatter."""
    with _ctrl_c_waits():
        if method == "forkserver":
            process.start()  # its parent is the server, whose mask is its own affair
            return
        if method == "spawn":
            resource_tracker.ensure_running()  # else started below, for all processes to come, and undoes the mask
        # In the process it waits until the worker has said that it ignores it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    # In another thread it interrupts nothing; a handler that is none of Python's cannot be put back.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _sentinel_of(process: Any) -> int:
    """A descriptor that tells that the process has ended.

    multiprocessing's own is a pipe, which whatever the dataset has forked in that process may hold open.
    """
    try:
        return os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        return os.dup(process.sentinel)
