"""Starts, replaces, reaps and stops the worker processes of an engine."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

import numpy as np

from loaders.errors import WorkerLostError
from loaders.memory.arena import Arena
from loaders.memory.blocks import Block
from loaders.system.interrupts import undisturbed
from loaders.workers.launching import ended, exitcode_of, hint_for_start, launch, sentinel_of
from loaders.workers.messages import Failure, Job
from loaders.workers.preload import start_server
from loaders.workers.process_main import WorkerSetup, main
from loaders.workers.strikes import KILLED_FROM_OUTSIDE
from loaders.workers.wire import CELL_NBYTES, SEND_FLAGS, SINCE_AT, Inherited

# So many processes may end by themselves, or be killed, without a span being reported in between.
_FAILED_STARTS, _FRUITLESS_KILLS = 3, 200
# How long `close` waits for workers that are in the middle of a sample before it kills them.
_GRACE_S = 2.0
# How long `send_on` waits for a worker to read on.
_PAUSE_MS = 20


@dataclass
class WorkerProcess:
    """One worker process as the consumer knows it.

    Attributes:
        serial: unique among all processes of the engine.
        channel: the consumer's end of the worker's own socket.
        sentinel: a descriptor that becomes readable when the process has ended.
        cell: the worker's own cell in shared memory, `cell_at` bytes into the block of all cells.
        number: None for a spare, which is started but not yet a worker.
        outbox: what is still to be sent through the channel: the job, the number.
        payloads: announced, but not yet received in full: the header, and what has arrived.
    """

    serial: int
    process: Any
    channel: socket.socket
    sentinel: int
    cell: np.ndarray[Any, Any]
    cell_at: int
    number: int | None
    outbox: deque[memoryview] = field(default_factory=deque)
    payloads: deque[tuple[tuple[int, ...], bytearray]] = field(default_factory=deque)

    def is_warm(self) -> bool:
        """Whether it has finished starting: it waits for its number, or has it already."""
        return bool(self.cell[SINCE_AT] != -1)


class Supervisor:
    """Starts processes, keeps a warm spare, and raises when processes cannot be kept alive.

    Args:
        job, arena: what every worker is given.
        context: of multiprocessing.
        cells: the block in which every process has a cell.
        lanes: the descriptors that spans are read from; worker `number` reads from lane `number % len(lanes)`.
        done: the descriptor that results are written to.
        not_theirs: descriptors of the consumer that a forked worker must not keep open.
        poll: every process's sentinel is registered with it, and every channel that has something to send.
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
        self.by_outbox: dict[int, WorkerProcess] = {}  # by channel; only those that are not empty
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
        self._spares = 1  # how many are wanted
        self._failed_starts = 0
        self._kills = 0

    def start(self, number: int | None) -> None:
        """Start a process: worker `number`, or a spare if that is None."""
        while True:
            with undisturbed():
                if self._start(number):
                    return

    def _start(self, number: int | None) -> bool:
        """False if the fork server has died."""
        if self._method == "forkserver":
            start_server(self._job)
        ours, theirs = socket.socketpair()
        serial, self._serial = self._serial, self._serial + 1
        cell_at = self._free_cells.pop()
        cell = np.ndarray(CELL_NBYTES // 8, np.int64, self._arena.buffer, self._cells_at + cell_at)
        cell[:] = -1
        channels = [worker.channel.fileno() for worker in self.processes.values()]
        setup = WorkerSetup(
            job=self._job,
            arena=self._arena,
            cell=self._cells_at + cell_at,
            serial=serial,
            spans=Inherited(self._lanes[(number or 0) % len(self._lanes)]),
            done=Inherited(self._done),
            channel=Inherited(theirs.fileno()),
            # A fork inherits these; if it kept them open, the others could not detect that this process has died.
            not_mine=[ours.fileno(), *channels, *self._not_theirs] if self._method == "fork" else [],
            consumer=os.getpid(),
            is_parent=self._method != "forkserver",
            # The kernel signals the end of the thread that forked: the server's, or this one.
            dies_with_parent=self._method == "forkserver" or threading.get_native_id() == os.getpid(),
        )
        name = f"loaders-{'spare' if number is None else number}"
        process = self._context.Process(target=main, args=(setup,), name=name, daemon=True)  # type: ignore[attr-defined]
        try:
            launch(process, self._method)
            sentinel = sentinel_of(process)
        except BaseException as error:
            ours.close()
            self._free_cells.append(cell_at)
            if process.pid is not None:
                process.kill()
                exitcode_of(process, self._method)
            if setup.is_refused or not isinstance(error, (EOFError, ConnectionError)):
                raise
            self._count(-signal.SIGKILL)
            return False
        finally:
            # Not a `with`: a socket object would close its descriptor in a forked child when it is collected there.
            theirs.close()
        worker = WorkerProcess(serial, process, ours, sentinel, cell, cell_at, None)
        self.processes[serial] = self.by_sentinel[sentinel] = worker
        self._poll.register(sentinel, select.POLLIN)
        if setup.pickled is not None:
            # Through the socket, not with the rest: multiprocessing would wait forever for a process that was killed or
            # stopped before it had read everything.
            worker.outbox += [memoryview(len(setup.pickled).to_bytes(8, "little")), memoryview(setup.pickled)]
        if number is not None:
            self._promote(worker, number)
        else:
            self.send(worker)
        return True

    def send(self, worker: WorkerProcess, pause_ms: int = 0) -> None:
        """Send what the channel takes now, the rest once it is writable: the worker may be stopped, or starting."""
        while worker.outbox:
            try:
                sent = worker.channel.send(worker.outbox[0], SEND_FLAGS)
            except BlockingIOError:
                wait = select.poll()
                wait.register(worker.channel, select.POLLOUT)
                if wait.poll(pause_ms):
                    continue
                break
            except (BrokenPipeError, ConnectionResetError):
                worker.outbox.clear()  # dead already, as its sentinel will show
                break
            rest = worker.outbox[0][sent:]
            if len(rest) > 0:
                worker.outbox[0] = rest
            else:
                worker.outbox.popleft()
        if worker.outbox:
            self._poll.register(worker.channel, select.POLLOUT)
            self.by_outbox[worker.channel.fileno()] = worker
        elif self.by_outbox.pop(worker.channel.fileno(), None) is not None:
            self._poll.unregister(worker.channel)

    def send_on(self, worker: WorkerProcess) -> None:
        """Continue to send to a worker that has begun to read."""
        self.send(worker, _PAUSE_MS)

    def reap(self, worker: WorkerProcess) -> int | None:
        """Forget a process that has ended. Returns its exit code, None if that cannot be known."""
        exitcode = exitcode_of(worker.process, self._method)
        worker.outbox.clear()
        self.send(worker)
        del self.processes[worker.serial], self.by_sentinel[worker.sentinel]
        self._poll.unregister(worker.sentinel)
        self._release(worker)
        self._free_cells.append(worker.cell_at)
        return exitcode

    def replace(self, worker: WorkerProcess, exitcode: int | None, *, over_a_sample: bool) -> None:
        """Replace a process that was reaped.

        Raises:
            WorkerLostError: processes cannot be kept alive. Deaths over a sample do not count: `Strikes` counts them.
        """
        if not over_a_sample:
            if exitcode is not None and exitcode not in KILLED_FROM_OUTSIDE and not worker.is_warm():
                self._give_up(exitcode)  # the next one would end in the same way
            self._count(exitcode)
        spares = sorted(
            (each for each in self.processes.values() if each.number is None), key=WorkerProcess.is_warm, reverse=True
        )
        if worker.number is not None:
            if not (spares and spares[0].is_warm()):
                # Workers die faster than a spare can start, so keep more spares.
                self._spares = min(self._spares + 1, len(self._free_cells))
            if spares:
                self._promote(spares.pop(0), worker.number)
            else:
                self.start(worker.number)
        # Not with several lanes: a process is given its lane when it starts, and a spare has no number yet.
        if len(self._lanes) == 1:
            for _ in range(min(self._spares - len(spares), len(self._free_cells))):
                self.start(None)

    def is_working(self) -> None:
        """A span was reported, so workers can be kept alive: start counting again."""
        self._failed_starts = self._kills = 0
        self._spares = 1

    def refused(self, failure: Failure) -> NoReturn:
        """Raise what a worker reported that could not unpickle its job: no other worker can."""
        raise WorkerLostError(
            f"worker processes cannot unpickle the dataset, collate_fn or worker_init_fn: {failure.summary}\n"
            f"  {hint_for_start(self._job.dataset, self._method)}"
        ) from (failure.error or RuntimeError(failure.text))

    def close(self, push: Callable[[], None], *, force: bool) -> None:
        """Wait for all processes to end, then kill those that have not; `push` sends the records that stop them."""
        poll = select.poll()
        living = {worker.sentinel for worker in self.processes.values()}
        for worker in self.processes.values():
            poll.register(worker.sentinel, select.POLLIN)
            try:
                # Closing is not enough: a process that was forked from the consumer may hold a copy of this end.
                worker.channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
            if not worker.is_warm():
                worker.process.kill()  # it has read no span yet
        deadline = time.monotonic() + _GRACE_S
        while living and not force and time.monotonic() < deadline:
            push()
            for sentinel, _ in poll.poll(50):
                poll.unregister(sentinel)
                living.discard(sentinel)
        for worker in self.processes.values():
            if worker.sentinel in living:
                worker.process.kill()
        for worker in self.processes.values():
            exitcode_of(worker.process, self._method)
            self._release(worker)
        self.processes.clear()
        self.by_sentinel.clear()
        self.by_outbox.clear()

    def _promote(self, worker: WorkerProcess, number: int) -> None:
        worker.number = number
        worker.outbox.append(memoryview(number.to_bytes(8, "little")))
        self.send(worker)

    def _count(self, exitcode: int | None) -> None:
        if exitcode in KILLED_FROM_OUTSIDE:
            self._kills += 1
        else:
            self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS or self._kills >= _FRUITLESS_KILLS:
            self._give_up(exitcode)

    def _give_up(self, exitcode: int | None) -> NoReturn:
        raise WorkerLostError(
            f"worker processes cannot be kept alive: the last one was lost {ended(exitcode)}.\n"
            f"  {hint_for_start(self._job.dataset, self._method)}"
        )

    def _release(self, worker: WorkerProcess) -> None:
        worker.channel.close()
        os.close(worker.sentinel)
        if worker.process.exitcode is not None:
            worker.process.close()
