"""The engine of worker threads, for datasets that release the GIL most of the time."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from loaders.memory.slots import SlotPool
from loaders.randomness.transforms import with_own_transforms
from loaders.system.interrupts import undisturbed
from loaders.workers.engine import Reading
from loaders.workers.info import WorkerInfo, set_worker_info
from loaders.workers.messages import Failure, Job, Result, Task
from loaders.workers.worker import Worker

# How long `close` waits for threads that are in the middle of a sample. They cannot be killed; they end by themselves.
_GRACE_S = 1.0


class ThreadEngine:
    """Worker threads over ordinary memory. Each has its own copy of the dataset's stateful transforms."""

    def __init__(self, job: Job, pool: SlotPool, num_workers: int | None = None) -> None:
        self.pool = pool
        self.num_workers = num_workers or job.num_workers
        self._job = job
        self._pid = os.getpid()
        self._lanes: list[queue.SimpleQueue[tuple[Task, int, int] | None]] = [
            queue.SimpleQueue() for _ in range(job.num_workers if job.fetch == "stream" else 1)
        ]
        self._done: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._reading: list[Reading | None] = [None] * job.num_workers
        self._closed = False
        self._threads: list[threading.Thread] = []  # by number
        self._started = 0  # not counting those that were told to end
        self._ready: list[Result] = []

    def submit(self, task: Task, spans: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Queue spans for whichever thread is free."""
        self._start()
        for start, stop in spans:
            self._lanes[lane % len(self._lanes)].put((task, start, stop))

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The available results."""
        if timeout_s != 0:
            self.wait(timeout_s)
        try:
            while True:
                self._ready.extend(map(self._done.get, (False,)))
        except queue.Empty:
            pass
        results, self._ready = self._ready, []
        return results

    def wait(self, timeout_s: float | None) -> None:
        """Wait until a thread has reported."""
        if not self._ready:
            try:
                # Taken and stored in one call, so that a signal handler that raises loses nothing.
                self._ready.extend(map(self._done.get, (True,), (timeout_s,)))
            except queue.Empty:
                pass

    def cancel(self, task: Task) -> None:
        """Set the flag that threads check before every row."""
        task.cancelled = True

    def reading(self) -> list[Reading]:
        """What each thread is reading."""
        now = time.monotonic()
        busy = [replace(each, since_s=now - each.since_s) for each in self._reading if each is not None]
        return sorted(busy, key=lambda reading: -reading.since_s)

    def resize(self, workers: int) -> None:
        """Start more threads with the next task, or end those that are idle first."""
        self.num_workers = workers
        while self._started > workers:
            self._started -= 1
            self._lanes[0].put(None)

    def _start(self) -> None:
        """Start threads until there are `num_workers`, each under a number whose last thread has ended."""
        if self._started == self.num_workers:
            return
        for number in range(self._job.num_workers):
            if self._started == self.num_workers:
                return
            if number < len(self._threads) and self._threads[number].is_alive():
                continue
            name = f"loaders-{number}"
            thread = threading.Thread(target=self._work, args=(self._job, number), name=name, daemon=True)
            with undisturbed():
                self._threads[number : number + 1] = [thread]
                thread.start()
                self._started += 1

    def close(self, *, force: bool = False) -> None:
        """Tell every thread to end, and unless `force` is set wait a moment for those that are reading."""
        if self._pid != os.getpid() or (self._closed and not force):
            return
        self._closed = True
        for _ in self._threads:
            for lane in self._lanes:
                lane.put(None)
        deadline = time.monotonic() + (0.0 if force else _GRACE_S)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, job: Job, number: int) -> None:
        failure = b""
        worker: Worker | None = None
        try:
            dataset, collate, shared = with_own_transforms(job.dataset, job.collate)
            job = replace(job, dataset=dataset, collate=collate)
            set_worker_info(WorkerInfo(number, job.num_workers, job.seed + number, job.dataset), process=False)
            if job.init is not None:
                job.init(number)
            worker = Worker(  # after init, which may change the dataset
                job, number, self.pool.arena.buffer, apart=False, threaded=True, shared=shared
            )
        except Exception as error:  # whatever worker_init_fn raises is delivered with every span
            # A new copy for each span: the traceback of a raised error refers to the iterator, which ends this thread.
            failure = pickle.dumps(Failure.of(error, "starting"))
        lane = self._lanes[number % len(self._lanes)]
        while (item := lane.get()) is not None:
            task, start, stop = item
            if worker is None:
                self._done.put(Result(number, task.ticket, start, stop, failures=[pickle.loads(failure)]))
                continue

            def reading(row: int, task: Task = task) -> bool:
                self._reading[number] = Reading(number, task.ticket, row, time.monotonic())
                return not (task.cancelled or self._closed)

            try:
                result = worker.execute(task, start, stop, reading)
            except BaseException as error:  # a thread that ended without a report would hang the loader
                result = Result(number, task.ticket, start, stop, failures=[Failure.of(error, "working")])
            self._reading[number] = None
            self._done.put(result)
            # An error in it, once raised, refers to the iterator: kept here, it would keep this thread from ending.
            del result
