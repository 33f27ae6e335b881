"""How many workers there should be, found out while the first batches come: `num_workers="auto"`."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from loaders.report.statistics import EpochStatistics
from loaders.system.limits import whole_cores
from loaders.workers.engine import Engine

# After so many batches nothing is changed any more.
SETTLED = 100
# A look takes in so many batches, and at least so long.
_BATCHES, _LEAST_NS = 8, 20_000_000
# New workers that have reported nothing after so many batches are not waited for.
_PATIENCE = 25
_WAITS, _SATURATED = 0.03, 0.8
# A step up that gives less than this share more is taken back: the cores, or a disk, are what limits.
_GAIN = 1.05
_SPARE = 1.3  # workers beyond what is needed, before some are let go
_FIRST_MOST = 8


def most_workers() -> int:
    """As many as there are cores for, shared fairly with the other ranks of this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, whole_cores() // (int(ranks) if ranks.isdigit() and int(ranks) > 0 else 1))


def first_workers() -> int:
    """What to begin with: half of that, the loop has work for the other cores."""
    return min(_FIRST_MOST, max(1, most_workers() // 2))


class AutoWorkers(int):
    """The number of workers of the moment where the argument was "auto": whoever passes it on means "auto", too."""


class Tuner:
    """Changes the number of an engine's workers until the loop does not wait, or more would not help.

    No batch depends on it: what a run gives does not depend on who does it.

    Args:
        most: never more.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._least = 1
        self._in_vain = False  # the last look saw no gain from the last step up
        self._idle = 0  # looks in a row that found workers to spare
        self._batches = 0
        self._from: _Sums | None = None
        self._new: set[int] | None = None  # workers that had reported before the last step, while others are waited for
        self._since_step = 0
        self._before: tuple[int, float] | None = None  # workers and samples per second before the last step up

    @property
    def is_settled(self) -> bool:
        """Whether the number stays as it is."""
        return self._batches >= SETTLED

    def look(self, statistics: EpochStatistics, engine: Engine) -> int:
        """A batch was handed out. Returns how many workers there are to be from now on."""
        if self.is_settled:
            return engine.num_workers
        statistics.settle()
        now = _Sums(statistics)
        self._batches += 1
        self._since_step += 1
        if self._from is None or self._from.statistics is not statistics or self._is_awaiting(statistics, engine):
            self._from = now
            return engine.num_workers
        seen = now.since(self._from)
        if seen.batches < _BATCHES or seen.window_ns < _LEAST_NS:
            return engine.num_workers
        self._from = now
        workers = self.wanted(engine.num_workers, seen)
        if workers > engine.num_workers:
            self._new = {number for number, each in statistics.workers.items() if each.samples}
        if workers != engine.num_workers:
            self._since_step = 0
            engine.resize(workers)
        return engine.num_workers

    def wanted(self, workers: int, seen: Seen) -> int:
        """How many workers these numbers ask for, where there are `workers` now."""
        before, self._before = self._before, None
        self._idle = 0 if seen.waiting_share > _WAITS else self._idle
        if seen.waiting_share > _WAITS:
            if before is not None and seen.samples_per_s < _GAIN * before[1]:
                if workers > before[0] and self._in_vain:
                    self.most = self._least = before[0]
                    return before[0]
                # Two looks in a row must agree before a step is taken back.
                self._before, self._in_vain = before, True
                return workers
            if seen.busy_ns < _SATURATED * workers * seen.window_ns:
                return workers  # they do not limit
            wanted = min(self.most, max(workers + 1, min(2 * workers, math.ceil(seen.needed))))
            if wanted > workers:
                self._least = workers + 1  # fewer were too few
                self._before, self._in_vain = (workers, seen.samples_per_s), False
            return max(workers, wanted)
        enough = min(workers, max(self._least, math.ceil(_SPARE * seen.needed)))
        # Two looks in a row must agree: a single one may have fallen into a lucky moment.
        self._idle = self._idle + 1 if enough < workers else 0
        return enough if self._idle >= 2 else workers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_from": None}  # a copy has an engine of its own

    def _is_awaiting(self, statistics: EpochStatistics, engine: Engine) -> bool:
        """Whether workers that were started are not at work yet: until then nothing can be said about them."""
        if self._new is None:
            return False
        fresh = [n for n, each in statistics.workers.items() if each.samples and n not in self._new]
        if len(fresh) + len(self._new) < engine.num_workers and self._since_step < _PATIENCE:
            return True
        self._new = None
        return True  # from here on they are all at work


class Seen:
    """What happened between two looks."""

    def __init__(
        self, batches: int, rows: int, window_ns: int, wait_ns: int, own_ns: int, busy_ns: int, samples: int
    ) -> None:
        self.batches = batches
        self.window_ns = window_ns
        self.busy_ns = busy_ns
        self.waiting_share = wait_ns / max(1, window_ns)
        self.samples_per_s = rows * 1e9 / max(1, window_ns)
        # Workers at work all the time that give what the loop takes when it does not wait.
        self.needed = busy_ns / max(1, samples) * rows / max(1, own_ns)


class _Sums:
    """The statistics of an epoch at one moment."""

    def __init__(self, statistics: EpochStatistics) -> None:
        self.statistics = statistics
        self.now_ns = time.perf_counter_ns()
        self.batches, self.rows = statistics.batches, statistics.rows
        self.wait_ns = statistics.wait_ns + statistics.slot_ns
        self.own_ns = statistics.compute_ns + statistics.deliver_ns
        self.busy_ns, self.samples = statistics.busy_ns, statistics.samples

    def since(self, before: _Sums) -> Seen:
        return Seen(
            self.batches - before.batches,
            self.rows - before.rows,
            self.now_ns - before.now_ns,
            self.wait_ns - before.wait_ns,
            self.own_ns - before.own_ns,
            self.busy_ns - before.busy_ns,
            self.samples - before.samples,
        )
