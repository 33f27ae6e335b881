"""The main function of a worker process. It imports neither torch nor CUDA; the user's dataset may."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.batching.arena import Arena
from loaders.engines.wire import (
    CANCELLED,
    CELL_NBYTES,
    DONE,
    INLINE_NBYTES,
    ORDER_HEADER,
    ROW_AT,
    RUN,
    SINCE_AT,
    Inherited,
)
from loaders.engines.work import Failure, Job, Order, Outcome, Worker
from loaders.spec import BatchSpec
from loaders.workers import WorkerInfo, set_worker_info


@dataclass
class Setup:
    """What a worker process is started with.

    Attributes:
        cell: offset of this worker's cell in the arena.
        serial: unique among all processes of the engine; `gate` brings the worker's number once it is needed.
        consumer: the consumer's process id, or None where it is not this process's parent (forkserver).
    """

    job: Job
    arena: Arena
    cell: int
    serial: int
    runs: Inherited
    done: Inherited
    gate: Inherited
    not_mine: list[int]
    consumer: int | None


def main(setup: Setup) -> None:
    """Serve runs until the consumer closes the pipe or dies."""
    # Ctrl-C reaches the whole process group: the consumer alone decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for fd in setup.not_mine:
        os.close(fd)
    _one_opencv_thread()
    threading.Thread(target=_end_with, args=(setup.consumer,), daemon=True).start()
    gate = socket.socket(fileno=setup.gate.fd)
    first = gate.recv(8)  # warm from here on, and idle until there is a number to take over
    if len(first) < 8:
        return
    serve(setup, int.from_bytes(first, "little"), gate)


def serve(setup: Setup, number: int, gate: socket.socket) -> None:
    """Read runs, do them, tell."""
    job, arena = setup.job, setup.arena
    view = memoryview(arena.buffer)
    record = view[setup.cell : setup.cell + RUN.size]
    cell = np.ndarray(CELL_NBYTES // 8, np.int64, arena.buffer, setup.cell)
    worker: Worker | None = None
    failure: Failure | None = None
    orders = _Orders(arena)
    try:
        _one_torch_thread()
        set_worker_info(WorkerInfo(number, job.num_workers, job.seed + number, job.dataset), process=True)
        worker = Worker(job, number, arena.buffer, apart=True)
        if job.init is not None:
            job.init(number)
    except Exception as error:  # whatever worker_init_fn raises is delivered with the first run
        failure = Failure.of(error, "starting")
    while True:
        cell[ROW_AT] = -1  # so that no row of the last run stands beside the next one
        if os.readv(setup.runs.fd, [record]) != RUN.size:
            return
        ticket, start, stop, offset, nbytes, *_ = RUN.unpack(record)
        try:
            order, cancelled = orders.get(ticket, offset, nbytes)
            if worker is None or failure is not None:
                outcome = Outcome(number, ticket, start, stop, failures=[failure] if failure else [])
            elif cancelled[0]:
                outcome = Outcome(number, ticket, start, stop, cancelled=True)
            else:
                outcome = worker.execute(order, start, stop, _marker(cell, cancelled))
        except Exception as error:  # a worker that ended in silence would be a hang
            outcome = Outcome(number, ticket, start, stop, failures=[Failure.of(error, "working")])
        _tell(setup, gate, outcome)


def _marker(cell: np.ndarray[Any, Any], cancelled: np.ndarray[Any, Any]) -> Callable[[int], bool]:
    def reading(row: int) -> bool:
        cell[ROW_AT] = row
        cell[SINCE_AT] = time.monotonic_ns()
        return not cancelled[0]

    return reading


def _tell(setup: Setup, gate: socket.socket, outcome: Outcome) -> None:
    payload = b""
    if not (outcome.is_plain or outcome.cancelled):
        try:
            payload = pickle.dumps(outcome, protocol=5)
        except Exception as error:  # a sample or result of the user's that cannot be pickled
            failed = Failure.of(error, "sending back the result of", None, None)
            payload = pickle.dumps(
                Outcome(outcome.worker, outcome.ticket, outcome.start, outcome.stop, failures=[failed]), protocol=5
            )
    inline = len(payload) <= INLINE_NBYTES
    header = DONE.pack(
        setup.serial,
        outcome.ticket,
        outcome.start,
        outcome.stop,
        CANCELLED if outcome.cancelled else 0,
        int(outcome.elapsed_s * 1e9),
        len(payload) if inline else 0,
        0 if inline else len(payload),
    )
    os.write(setup.done.fd, header + payload if inline else header)
    if not inline:
        gate.sendall(payload)


class _Orders:
    """Orders as this worker has read them from the arena: the last one, and every spec."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._specs: dict[int, BatchSpec] = {}
        self._last: tuple[int, Order, np.ndarray[Any, Any]] | None = None

    def get(self, ticket: int, offset: int, nbytes: int) -> tuple[Order, np.ndarray[Any, Any]]:
        """The order, and the int64 array of length 1 that tells whether it is cancelled."""
        if self._last is None or self._last[0] != ticket:
            keys, position, epoch, seed, spec_ref, blocks, raw = pickle.loads(self._at(offset + ORDER_HEADER, nbytes))
            if isinstance(keys, bytes):
                keys = np.frombuffer(keys, np.int64).tolist()
            order = Order(ticket, keys, position, epoch, seed, self._spec(spec_ref), blocks, raw=raw)
            self._last = ticket, order, np.ndarray(1, np.int64, self._arena.buffer, offset)
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
    # The workers are the parallelism. The variable serves datasets that import OpenCV late.
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"
    cv2: Any = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setNumThreads(0)


def _one_torch_thread() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


def _end_with(consumer: int | None) -> None:
    """End this process when the consumer has died, however it died."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        parent.join(1.0)
        # A sibling that was forked later may hold the other end of the sentinel open; the parent's id cannot lie.
        if not parent.is_alive() or (consumer is not None and os.getppid() != consumer):
            os._exit(1)
