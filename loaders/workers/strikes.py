"""What caused the death of a worker: the sample that it was reading, or a kill from outside."""

from __future__ import annotations

import signal
from collections import Counter, deque

from loaders.errors import WorkerLostError
from loaders.workers.engine import describe_work
from loaders.workers.launching import ended
from loaders.workers.messages import Failure, Job, Task
from loaders.workers.worker import COLLATING

# A sample that was being read by this many dying workers is at fault.
STRIKES = 3
# The most strikes that a sample can need, while workers are also killed over other samples, or over none.
_MOST = 20
# How long a sample whose workers were killed waits before its last attempt: if other workers are killed meanwhile, the
# kills come from outside.
LAST_CHANCE_AFTER_S = 0.1
# Signals that are sent from outside; the process itself causes any other death.
KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)

Place = tuple[int, int]  # ticket, row


class Strikes:
    """Counts the deaths of workers by the row that each was reading.

    A sample that ends its worker does so every time. The more workers were recently killed over other rows, the more
    strikes a sample needs: it is less likely to be the cause.
    """

    def __init__(self) -> None:
        self.counts: Counter[Place] = Counter()
        self._killed: deque[Place | None] = deque(maxlen=_MOST)  # the latest; None: the worker was reading nothing

    def add(self, place: Place | None, exitcode: int | None) -> bool:
        """Record a death. Returns whether the sample at `place` is at fault."""
        is_kill = exitcode in KILLED_FROM_OUTSIDE
        if is_kill:
            self._killed.append(place)
        if place is None:
            return False
        self.counts[place] += 1
        if not is_kill:
            return self.counts[place] >= STRIKES
        # Kills over a row that has three strikes itself do not count: it may be at fault as well.
        others = sum(other is None or self.counts[other] < STRIKES for other in self._killed if other != place)
        return self.counts[place] >= min(STRIKES + others, _MOST)

    def is_last_chance(self, place: Place, exitcode: int | None) -> bool:
        """Whether the next death over this sample may put it at fault."""
        return exitcode in KILLED_FROM_OUTSIDE and self.counts[place] == STRIKES - 1


def failure_of_lost(job: Job, task: Task, row: int, number: int, strikes: int, exitcode: int | None) -> Failure:
    """The failure to report for a row that is given up; `number` is that of the last worker lost over it."""
    key, source, name = describe_work(job.dataset, job.fetch, task, row)
    if exitcode == -signal.SIGKILL:
        remedy = "Likely out of memory."
    else:
        what = "a crash in native code" if (exitcode or 0) < 0 else "something in the dataset ends the process"
        remedy = f"Likely {what}: read this in the main process, with num_workers=0."
    told = f"worker {number} was lost {strikes} times on {name}, the last time {ended(exitcode)}."
    is_sample = job.fetch == "each" and row >= 0
    error = WorkerLostError(f"{told}\n  {remedy}", index=key if isinstance(key, int) else None, source=source)
    doing = "collating" if row == COLLATING else "reading"
    return Failure(row if is_sample else None, key, source, doing, f"WorkerLostError: {told}", "", error)
