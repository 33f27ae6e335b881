"""The engine without workers: it works in the consumer's own thread, inside `collect`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from loaders.memory.slots import SlotPool
from loaders.workers.engine import Reading
from loaders.workers.messages import Job, Order, Outcome
from loaders.workers.worker import Worker


class InlineEngine:
    """Does the work inside `collect`, one run a call: `num_workers=0`."""

    num_workers = 1

    def __init__(self, job: Job, pool: SlotPool) -> None:
        self.pool = pool
        self._worker = Worker(job, 0, pool.arena.buffer, apart=False)
        self._queue: deque[tuple[Order, int, int]] = deque()

    def submit(self, order: Order, runs: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Queue runs."""
        self._queue.extend((order, start, stop) for start, stop in runs)

    def collect(self, timeout_s: float | None) -> list[Outcome]:
        """Execute the next run, unless no time is given."""
        if not self._queue or timeout_s == 0:
            return []
        order, start, stop = self._queue[0]
        outcome = self._worker.execute(order, start, stop, lambda row: not order.cancelled)
        self._queue.popleft()  # only now: what Ctrl-C has interrupted is done when it is asked for again
        return [outcome]

    def cancel(self, order: Order) -> None:
        """Skip what is queued of this order."""
        order.cancelled = True

    def reading(self) -> list[Reading]:
        """Nothing: the consumer itself is reading."""
        return []

    def resize(self, workers: int) -> None:
        """It stays one."""

    def close(self) -> None:
        """Nothing to stop."""
