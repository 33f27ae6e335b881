"""Who is to blame for the death of a worker: the sample that it was reading, or somebody who kills workers."""

from __future__ import annotations

import signal
from collections import Counter

# A sample that was being read by this many dying workers is at fault.
STRIKES = 3
# At most this many, while workers die over other samples, or over none, too: somebody kills them at random.
_MOST = 20
# Signals that somebody else sends; any other death is the process's own doing.
KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)

Place = tuple[int, int]  # ticket, row


class Strikes:
    """Counts the deaths of workers by the row that each was reading.

    A sample that ends its worker does so every time, while no other worker dies. Killed workers that were at other
    rows meanwhile make it more likely that the sample is innocent, so it needs more strikes.
    """

    def __init__(self) -> None:
        self.counts: Counter[Place] = Counter()
        self._killed: list[Place | None] = []  # in order; None: the worker was reading nothing

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
        since = self._killed[self._killed.index(place) :]
        # A row that has three strikes itself says nothing of others: it may be at fault as well.
        others = sum(other is None or self.counts[other] < STRIKES for other in since if other != place)
        return self.counts[place] >= min(STRIKES + others, _MOST)
