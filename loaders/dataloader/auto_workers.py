"""`num_workers="auto"`: finds the number of workers while the first batches are delivered."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from loaders.report.statistics import EpochStatistics
from loaders.system.limits import whole_cores
from loaders.workers.engine import Engine

# The number is final after this many batches.
SETTLED = 100
# A measurement covers at least this many batches and this much time.
_BATCHES, _LEAST_NS = 8, 20_000_000
# How many batches to wait for new workers to report something.
_PATIENCE = 25
_WAITS, _SATURATED = 0.03, 0.8
# A step up that raises the throughput by less than this factor is undone: the cores or a disk are the limit.
_GAIN = 1.05
_SPARE = 1.3  # workers to keep for each one needed
_FIRST_MOST = 8


def most_workers() -> int:
    """The most workers for this rank: its equal share of the cores that the machine's ranks may use, at least 1."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, whole_cores() // (int(ranks) if ranks.isdigit() and int(ranks) > 0 else 1))


def first_workers() -> int:
    """The initial number: half of `most_workers()`, at most 8, since the loop itself needs cores as well."""
    return min(_FIRST_MOST, max(1, most_workers() // 2))


class AutoWorkers(int):
    """The current number of workers where the argument was "auto"; passed to another loader, it means "auto" again."""


class Tuner:
    """Changes an engine's number of workers until the loop does not wait, or more workers would not help.

    Batches do not depend on the number.

    Args:
        most: the upper limit.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._least = 1
        self._in_vain = False  # the last measurement showed no gain from the last step up
        self._idle = 0  # consecutive measurements that found workers to spare
        self._batches = 0
        self._from: _Sums | None = None
        self._new: set[int] | None = None  # workers that had reported before the last step, while waiting for others
        self._since_step = 0
        self._before: tuple[int, float] | None = None  # workers and samples per second before the last step up

    @property
    def is_settled(self) -> bool:
        """Whether the number is final."""
        return self._batches >= SETTLED

    def look(self, statistics: EpochStatistics, engine: Engine) -> int:
        """Resize the engine if needed. Called for each batch handed out; returns the number of workers."""
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
        """The number of workers that a measurement calls for, with `workers` now."""
        before, self._before = self._before, None
        self._idle = 0 if seen.waiting_share > _WAITS else self._idle
        if seen.waiting_share > _WAITS:
            if before is not None and seen.samples_per_s < _GAIN * before[1]:
                if workers > before[0] and self._in_vain:
                    self.most = self._least = before[0]
                    return before[0]
                # Two consecutive measurements must agree before a step is undone.
                self._before, self._in_vain = before, True
                return workers
            if seen.busy_ns < _SATURATED * workers * seen.window_ns:
                return workers  # they are not the bottleneck
            wanted = min(self.most, max(workers + 1, min(2 * workers, math.ceil(seen.needed))))
            if wanted > workers:
                self._least = workers + 1  # fewer were too few
                self._before, self._in_vain = (workers, seen.samples_per_s), False
            return max(workers, wanted)
        enough = min(workers, max(self._least, math.ceil(_SPARE * seen.needed)))
        # Two consecutive measurements must agree: a single one may be an outlier.
        self._idle = self._idle + 1 if enough < workers else 0
        return enough if self._idle >= 2 else workers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_from": None}  # a copy has an engine of its own

    def _is_awaiting(self, statistics: EpochStatistics, engine: Engine) -> bool:
        """Whether newly started workers have not reported yet: a measurement would not include them."""
        if self._new is None:
            return False
        fresh = [n for n, each in statistics.workers.items() if each.samples and n not in self._new]
        if len(fresh) + len(self._new) < engine.num_workers and self._since_step < _PATIENCE:
            return True
        self._new = None
        return True  # the next measurement starts here


class Seen:
    """One measurement: what happened between two moments."""

    def __init__(
        self, batches: int, rows: int, window_ns: int, wait_ns: int, own_ns: int, busy_ns: int, samples: int
    ) -> None:
        self.batches = batches
        self.window_ns = window_ns
        self.busy_ns = busy_ns
        self.waiting_share = wait_ns / max(1, window_ns)
        self.samples_per_s = rows * 1e9 / max(1, window_ns)
        # How many workers, busy all the time, deliver as fast as the loop takes batches when it does not wait.
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
