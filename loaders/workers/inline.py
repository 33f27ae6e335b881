"""The engine without workers: it executes spans in the consumer's own thread, inside `collect`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from loaders.memory.slots import SlotPool
from loaders.workers.engine import Reading
from loaders.workers.messages import Job, Result, Task
from loaders.workers.worker import Worker


class InlineEngine:
    """Executes spans inside `collect` and `wait`, one per call: `num_workers=0`."""

    num_workers = 1

    def __init__(self, job: Job, pool: SlotPool) -> None:
        self.pool = pool
        self._worker = Worker(job, 0, pool.arena.buffer, apart=False)
        self._results: list[Result] = []
        self._queue: deque[tuple[Task, int, int]] = deque()

    def submit(self, task: Task, spans: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Queue spans."""
        self._queue.extend((task, start, stop) for start, stop in spans)

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The results of executed spans; if there are none, execute the next span, unless the timeout is 0."""
        if not self._results and timeout_s != 0:
            self.wait(timeout_s)
        results, self._results = self._results, []
        return results

    def wait(self, timeout_s: float | None) -> None:
        """Execute the next span."""
        if self._queue:
            task, start, stop = self._queue[0]
            self._results.append(self._worker.execute(task, start, stop, lambda row: not task.cancelled))
            self._queue.popleft()  # only now: a span interrupted by Ctrl-C is executed on the next call

    def cancel(self, task: Task) -> None:
        """Skip the queued spans of this task."""
        task.cancelled = True

    def reading(self) -> list[Reading]:
        """Always empty: the consumer itself reads."""
        return []

    def resize(self, workers: int) -> None:
        """Do nothing: there are no workers."""

    def close(self, *, force: bool = False) -> None:
        """Nothing to stop."""
