"""The main function of a worker process. It imports neither torch nor CUDA; the user's dataset may."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from loaders.batch.packing import dumps
from loaders.batch.spec import BatchSpec
from loaders.datasets.wrapped import describe
from loaders.memory.arena import Arena
from loaders.memory.fork_holds import release_inherited
from loaders.workers.info import WorkerInfo, set_worker_info
from loaders.workers.messages import Failure, Job, Result, Task
from loaders.workers.wire import (
    CANCELLED,
    CELL_NBYTES,
    DONE,
    INLINE_NBYTES,
    NO_TICKET,
    ROW_AT,
    SINCE_AT,
    SPAN,
    TASK_HEADER,
    Inherited,
)
from loaders.workers.worker import Worker

# malloc.h: M_MMAP_THRESHOLD, at its maximum of 32 MiB; M_TRIM_THRESHOLD; M_TOP_PAD.
_MALLOC = {-3: 32 << 20, -1: 64 << 20, -2: 1 << 20}

_PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass
class WorkerSetup:
    """What a worker process is started with.

    Attributes:
        job: set in a forked process; others receive it through `channel`.
        pickled: the job as it is sent, pickled together with the rest: only then can locks and descriptors be pickled.
        cell: offset of this worker's cell in the arena.
        serial: unique among all processes of the engine; the worker's number arrives through `channel` when needed.
        consumer: the consumer's process id; `is_parent` is False where the fork server forked this process.
        dies_with_parent: True where the kernel is to kill the process when the thread that forked it ends.
        is_refused: True once the job could not be pickled.
    """

    job: Job | None
    arena: Arena
    cell: int
    serial: int
    spans: Inherited
    done: Inherited
    channel: Inherited
    not_mine: list[int]
    consumer: int
    is_parent: bool
    dies_with_parent: bool
    pickled: Any = None
    is_refused: bool = False

    def __getstate__(self) -> dict[str, Any]:
        self.is_refused = True
        self.pickled = ForkingPickler.dumps(self.job)
        self.is_refused = False
        return {**self.__dict__, "job": None, "pickled": None}


def main(setup: WorkerSetup) -> None:
    """Serve spans until the consumer closes the pipe or dies."""
    if setup.dies_with_parent:
        _die_with_parent()
    if not setup.is_parent:
        _do_not_hold_the_server()
    elif os.getppid() != setup.consumer:
        os._exit(1)  # it died before the kernel was asked to signal that
    # Ctrl-C reaches the whole process group; only the consumer handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in every Python process: writing raises instead
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGPIPE})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for fd in setup.not_mine:
        os.close(fd)
    release_inherited()  # the batches its dataset may hold are held by the consumer's dataset, too
    _one_opencv_thread()
    _keep_freed_memory()
    watch = {"consumer": setup.consumer, "is_parent": setup.is_parent}
    threading.Thread(target=_end_with, kwargs=watch, daemon=True).start()
    with socket.socket(fileno=setup.channel.fd) as channel:
        if setup.job is None:
            size = int.from_bytes(_receive(channel, 8), "little")
            pickled = _receive(channel, size)
            try:
                setup.job = pickle.loads(pickled)
            except Exception as error:  # the consumer raises it, once for all workers
                failure = Failure.of(error, "starting")
                _tell(setup, None, channel, Result(0, NO_TICKET, 0, 0, failures=[failure]), None)
                return
            del pickled
        _cell_of(setup)[SINCE_AT] = time.monotonic_ns()
        # Warm from here on, and idle until its number arrives.
        serve(setup, int.from_bytes(_receive(channel, 8), "little"), channel)


def serve(setup: WorkerSetup, number: int, channel: socket.socket) -> None:
    """Read spans, execute them, report the results."""
    job, arena = setup.job, setup.arena
    assert job is not None
    view = memoryview(arena.buffer)
    record = view[setup.cell : setup.cell + SPAN.size]
    cell = _cell_of(setup)
    worker: Worker | None = None
    failure: Failure | None = None
    tasks = _Tasks(arena)
    task: Task | None = None
    try:
        _one_torch_thread()
        set_worker_info(WorkerInfo(number, job.num_workers, job.seed + number, job.dataset), process=True)
        if job.init is not None:
            job.init(number)
        worker = Worker(job, number, arena.buffer, apart=True)  # after init, which may change the dataset
    except Exception as error:  # whatever worker_init_fn raises is delivered with every span
        failure = Failure.of(error, "starting")
    while True:
        cell[ROW_AT] = -1  # so that the cell never shows a row of the last span beside the next span
        if os.readv(setup.spans.fd, [record]) != SPAN.size:
            return
        ticket, start, stop, offset, nbytes, *_ = SPAN.unpack(record)
        if ticket < 0:
            return
        try:
            task, cancelled = tasks.get(ticket, offset, nbytes)
            if worker is None or failure is not None:
                result = Result(number, ticket, start, stop, failures=[failure] if failure else [])
            elif cancelled[0]:
                result = Result(number, ticket, start, stop, cancelled=True)
            else:
                result = worker.execute(task, start, stop, _marker(cell, cancelled))
        except Exception as error:  # a worker that ended without a report would hang the loader
            result = Result(number, ticket, start, stop, failures=[Failure.of(error, "working")])
        try:
            _tell(setup, job, channel, result, task)
        except (BrokenPipeError, ConnectionResetError):
            return  # the consumer has closed its end


def _receive(channel: socket.socket, nbytes: int) -> bytearray:
    """`nbytes` bytes; ends this process if the consumer has closed the channel."""
    received = bytearray()
    while len(received) < nbytes:
        data = channel.recv(min(nbytes - len(received), 1 << 20))
        if not data:
            sys.exit()
        received += data
    return received


def _cell_of(setup: WorkerSetup) -> memoryview:
    return memoryview(setup.arena.buffer)[setup.cell : setup.cell + CELL_NBYTES].cast("q")


def _marker(cell: memoryview, cancelled: memoryview) -> Callable[[int], bool]:
    def reading(row: int) -> bool:
        cell[ROW_AT] = row
        cell[SINCE_AT] = time.monotonic_ns()
        return not cancelled[0]

    return reading


def _tell(setup: WorkerSetup, job: Job | None, channel: socket.socket, result: Result, task: Task | None) -> None:
    payload = b"" if result.is_plain or result.cancelled else _pickled(job, result, task)
    inline = len(payload) <= INLINE_NBYTES
    header = DONE.pack(
        setup.serial,
        result.ticket,
        result.start,
        result.stop,
        CANCELLED if result.cancelled else 0,
        int(result.elapsed_s * 1e9),
        len(payload) if inline else 0,
        0 if inline else len(payload),
        *result.times,
    )
    os.write(setup.done.fd, header + payload if inline else header)
    if not inline:
        channel.sendall(payload)


def _pickled(job: Job | None, result: Result, task: Task | None) -> bytes:
    """The pickled result. A sample that cannot be pickled becomes a failure."""
    try:
        return dumps(result)
    except Exception as error:  # a value of the user's cannot be pickled: find its sample below
        assert job is not None
        unknown = Failure.of(error, "sending back", None, list(task.keys) if task and job.fetch != "stream" else None)
    overflow = result.overflow
    for row, value in [*overflow.samples, *itertools.chain.from_iterable(overflow.fields.values())]:
        try:
            dumps(value)
        except Exception as error:
            if task is not None and row < len(task.keys) and job.fetch != "stream":
                key = task.keys[row]
                result.failures.append(Failure.of(error, "sending back", row, key, describe(job.dataset, key)))
                overflow.drop(row)
    try:
        return dumps(result)
    except Exception:  # the cause is not one of the samples
        failed = Result(result.worker, result.ticket, result.start, result.stop, failures=[unknown])
        return dumps(failed)


class _Tasks:
    """What this worker has read from the arena: the last task, and every spec."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._specs: dict[int, BatchSpec] = {}
        self._last: tuple[int, Task, memoryview] | None = None

    def get(self, ticket: int, offset: int, nbytes: int) -> tuple[Task, memoryview]:
        """The task, and the int64 that is nonzero once it is cancelled."""
        if self._last is None or self._last[0] != ticket:
            keys, position, epoch, seed, spec_ref, *rest = pickle.loads(self._at(offset + TASK_HEADER, nbytes))
            if isinstance(keys, bytes):
                keys = np.frombuffer(keys, np.int64).tolist()
            task = Task(ticket, keys, position, epoch, seed, self._spec(spec_ref), *rest)
            self._last = ticket, task, self._at(offset, TASK_HEADER).cast("q")
        return self._last[1], self._last[2]

    def _spec(self, reference: tuple[int, int, int] | None) -> BatchSpec | None:
        if reference is None:
            return None
        number, offset, nbytes = reference
        if number not in self._specs:
            self._specs[number] = pickle.loads(self._at(offset, nbytes))
        return self._specs[number]

    def _at(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._arena.buffer)[offset : offset + nbytes]


def _one_opencv_thread() -> None:
    # The workers already use the cores. The variable is for datasets that import OpenCV later.
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"
    cv2: Any = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setNumThreads(0)


def _keep_freed_memory() -> None:
    # Each sample allocates what the one before freed. By default glibc returns that to the system, and to map and clear
    # its pages again takes a quarter of the time that a photo takes to decode.
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return  # the user has settings of their own
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    for parameter, nbytes in _MALLOC.items():
        mallopt(parameter, nbytes)


def _one_torch_thread() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


def _die_with_parent() -> None:
    # The thread of `_end_with` needs the GIL, which the dataset may hold, and does not run in a stopped process.
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        except (OSError, AttributeError):
            pass  # not available: the thread remains


def _do_not_hold_the_server() -> None:
    # The server, and its processes with it, end once no process has this pipe open, so this one must close it.
    server: Any = forkserver._forkserver  # there is no public way
    fd = getattr(server, "_forkserver_alive_fd", None)
    if fd is not None:
        os.close(fd)
        server._forkserver_alive_fd = None


def _end_with(consumer: int, *, is_parent: bool) -> None:
    """End this process when the consumer has died, however it died."""
    parent = multiprocessing.parent_process()
    watch = select.poll()
    try:
        watch.register(os.pidfd_open(consumer), select.POLLIN)
        wait_s = None
    except (AttributeError, OSError):
        wait_s = 1.0  # not available: poll
    # A process that was forked from the consumer may hold its end of multiprocessing's sentinel open, so the ids are
    # compared as well; after the descriptor is opened, because the consumer's id may have been reused before that.
    while (parent is None or parent.is_alive()) and not (is_parent and os.getppid() != consumer):
        if wait_s is None:
            watch.poll()
            break
        time.sleep(wait_s)
    os._exit(1)
