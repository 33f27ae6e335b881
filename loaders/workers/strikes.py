"""Who is to blame for the death of a worker: the sample that it was reading, or somebody who kills workers."""

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
# At most this many, while workers are killed over other samples, or over none, too.
_MOST = 20
# Before its last chance a sample whose workers were killed waits for so long: if others go on being killed meanwhile,
# somebody kills them at random.
LAST_CHANCE_AFTER_S = 0.1
# Signals that somebody else sends; any other death is the process's own doing.
KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)

Place = tuple[int, int]  # ticket, row


class Strikes:
    """Counts the deaths of workers by the row that each was reading.

    A sample that ends its worker does so every time. The more workers were killed over other rows of late, the more
    strikes a sample needs: it is less likely to be the reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[Place] = Counter()
        self._killed: deque[Place | None] = deque(maxlen=_MOST)  # the latest; None: the worker was reading nothing

    def add(self, place: Place | None, exitcode: int | None) -> bool:
        """Note a death. Returns whether the sample at `place` is at fault."""
        is_kill = exitcode in KILLED_FROM_OUTSIDE
        if is_kill:
            self._killed.append(place)
        if place is None:
            return False
        self.counts[place] += 1
        if not is_kill:
            return self.counts[place] >= STRIKES
        # A row that has three strikes itself says nothing of others: it may be at fault as well.
        others = sum(other is None or self.counts[other] < STRIKES for other in self._killed if other != place)
        return self.counts[place] >= min(STRIKES + others, _MOST)

    def is_last_chance(self, place: Place, exitcode: int | None) -> bool:
        """Whether the next death over this sample may be its last."""
        return exitcode in KILLED_FROM_OUTSIDE and self.counts[place] == STRIKES - 1


def failure_of_lost(job: Job, task: Task, row: int, number: int, strikes: int, exitcode: int | None) -> Failure:
    """What the consumer is told of a row that is given up; `number` is that of the last worker it has cost."""
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
