"""What was measured in one epoch: plain sums, from which `loaders.report.report` makes a report."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from typing import Any

from loaders.timing import events
from loaders.timing.stages import STAGES, Times
from loaders.workers.messages import Result, Task

_SLOWEST = 8
_AT_ONCE = 64


@dataclass(frozen=True)
class SkippedSample:
    """A sample that `on_error` left out of an epoch.

    Attributes:
        index: what the dataset was asked for.
        source: what the dataset says the sample is, usually its path.
        error: one line: the exception's type and message.
    """

    index: Any
    source: str | None
    error: str


@dataclass
class WorkerSums:
    """The sums of one worker. `busy_ns` counts from the first batch; `seen_ns` and `cpu_ns` are of timed spans."""

    samples: int = 0
    busy_ns: int = 0
    seen_ns: int = 0
    cpu_ns: int = 0


@dataclass
class Transfer:
    """The sums of a `DevicePrefetcher` over the loader.

    Attributes:
        enqueue_ns: host time to start copies. `wait_ns`: host time until the device had read earlier batches.
        again_nbytes: the part of `nbytes` that was copied on the host first, since it was not page-locked or had gaps.
        copy_ns, compute_ns: device time of the `timed` batches, from the device's own events; 0 without.
    """

    batches: int = 0
    nbytes: int = 0
    again_nbytes: int = 0
    enqueue_ns: int = 0
    wait_ns: int = 0
    timed: int = 0
    copy_ns: int = 0
    compute_ns: int = 0


@dataclass
class EpochStatistics:
    """The sums of one epoch. All times are nanoseconds of `time.perf_counter_ns`.

    The time until the first batch is handed out, such as the start of workers, counts for `first_ns` alone.

    Attributes:
        asked_ns: when the consumer asked for the first batch. `given_ns`: when it got the latest; 0 before the first.
        first_ns: how long the first batch took.
        wait_ns: the consumer waited for data; `worked_ns`: the part of it in which every worker had work.
        slot_ns: it waited for memory. `deliver_ns`: it assembled batches from full slots.
        compute_ns: between getting one batch and asking for the next.
        ended_ns: when there were no more batches; 0 before.
        host_ns, host_end_ns: CPU time of the consumer's process at the first batch and at the end.
        short: batches that were opened late, since there was no memory for them.
        busy_ns: of all workers, in the whole epoch, for the `samples` that they have read.
        stages_ns: of the spans with timed samples, scaled up from the stages of those.
        slowest: (ns, serial, key) of the slowest of these samples. All sums of workers are as of the last `settle`.
        written_nbytes: written by workers into slots. `overflow_nbytes`: of values that no slot could hold.
    """

    epoch: int = 0
    asked_ns: int = 0
    given_ns: int = 0
    first_ns: int = 0
    ended_ns: int = 0
    wait_ns: int = 0
    worked_ns: int = 0
    slot_ns: int = 0
    deliver_ns: int = 0
    compute_ns: int = 0
    batches: int = 0
    rows: int = 0
    short: int = 0
    samples: int = 0
    busy_ns: int = 0
    looked_at: int = 0
    read_nbytes: int = 0
    stages_ns: list[int] = field(default_factory=lambda: [0] * len(STAGES))
    workers: dict[int, WorkerSums] = field(default_factory=dict)
    slowest: list[tuple[int, int, Any]] = field(default_factory=list)
    written_nbytes: int = 0
    overflow_nbytes: int = 0
    host_ns: int = 0
    host_end_ns: int = 0
    finished: bool = False
    transfer: Transfer | None = None
    _runs: list[tuple[int, int, float, Times, bool, Task]] = field(default_factory=list)
    _waited: int = 0
    _slot_before_ns: int = 0
    _begun_ns: int = 0

    # -- the consumer

    def ask(self) -> None:
        """The consumer asks for a batch."""
        now = self._begun_ns = time.perf_counter_ns()
        self._waited = self.wait_ns + self.slot_ns
        if self.given_ns:
            self.compute_ns += now - self.given_ns
            if events.traces:
                events.add("consumer", "", "compute", self.given_ns, now, batch=self.batches)
            self.given_ns = now  # where an error is raised instead of a batch, this is not counted twice
        else:
            self.asked_ns = now

    def give(self, rows: int, slot_waited_ns: int) -> None:
        """The consumer gets a batch of `rows` rows; its pool has waited for memory for `slot_waited_ns` in all."""
        now = time.perf_counter_ns()
        self.slot_ns = slot_waited_ns - self._slot_before_ns
        if not self.given_ns:
            self.first_ns, self.wait_ns, self.slot_ns = now - self._begun_ns, 0, 0
            self.worked_ns = 0
            self._slot_before_ns = slot_waited_ns
            self.host_ns = time.process_time_ns()
        else:
            self.deliver_ns += now - self._begun_ns - (self.wait_ns + self.slot_ns - self._waited)
            self.rows += rows
            self.batches += 1
        if events.traces:
            events.add("consumer", "", "next", self._begun_ns, now, batch=self.batches, rows=rows)
        self.given_ns = now

    def end(self) -> None:
        """There are no more batches."""
        self.finished = True
        self.leave()

    def leave(self) -> None:
        """No more batches will be asked for: the epoch has ended, or the loop has left it."""
        if self.ended_ns:
            return
        self.ended_ns, self.host_end_ns = time.perf_counter_ns(), time.process_time_ns()
        if self.given_ns and not self.finished:
            self.compute_ns += self.ended_ns - self.given_ns

    def waited(self, since_ns: int, *, all_had_work: bool) -> None:
        """The consumer has waited for data since `since_ns`; `all_had_work`: every worker had something to do."""
        now = time.perf_counter_ns()
        if all_had_work:
            self.worked_ns += now - since_ns
        self.wait_ns += now - since_ns
        if events.traces:
            events.add("consumer", "", "wait for data", since_ns, now)

    def window_ns(self, now_ns: int | None = None) -> int:
        """Time from the first batch until there were no more, or until now."""
        if not self.given_ns:
            return 0
        return (self.ended_ns or now_ns or time.perf_counter_ns()) - self.asked_ns - self.first_ns

    # -- the workers

    def take(self, result: Result, task: Task) -> None:
        """A span of this task was reported."""
        if result.cancelled:
            return
        # Summed up later, many at once: between two spans this code drops out of the processor's caches.
        runs, times = self._runs, result.times
        rows = result.stop - result.start if result.rows is None else result.rows
        runs.append((result.worker, rows, result.elapsed_s, times, result.spec is None, task))
        if len(runs) >= _AT_ONCE:
            self.settle()
        if events.traces:
            ended_ns = times.began_ns + int(result.elapsed_s * 1e9)
            about = {"ticket": task.ticket, "first row": result.start, "rows": rows}
            events.add("workers", f"worker {result.worker}", "run", times.began_ns, ended_ns, **about)

    def settle(self) -> None:
        """Bring the sums of the workers up to date."""
        runs, self._runs = self._runs, []
        for number, rows, elapsed_s, times, counts, task in runs:
            took_ns = int(elapsed_s * 1e9)
            worker = self.workers.get(number)
            if worker is None:
                worker = self.workers[number] = WorkerSums()
            worker.samples += rows
            if self.given_ns:
                ended_ns = times.began_ns + took_ns
                worker.busy_ns += min(took_ns, max(0, ended_ns - self.asked_ns - self.first_ns))
            if counts:  # the very first sample also pays for imports and page faults
                self.samples += rows
                self.busy_ns += took_ns
            if times.cpu_ns >= 0:
                worker.seen_ns += took_ns
                worker.cpu_ns += times.cpu_ns
                self.looked_at += times.looked_at
                self.read_nbytes += times.read_nbytes
                if counts:
                    self._add_stages(times.stages_ns, took_ns)
                    if times.slowest_row >= 0:
                        self._rank(times.slowest_ns, task.keys[times.slowest_row])

    def _add_stages(self, stages_ns: tuple[int, ...], took_ns: int) -> None:
        seen = sum(stages_ns)
        if seen:
            # Scaled up to the span: otherwise slow samples, each of which is timed, would count for more.
            scale, sums = took_ns / seen, self.stages_ns
            for number, ns in enumerate(stages_ns):
                sums[number] += int(ns * scale)

    def _rank(self, ns: int, key: Any) -> None:
        slowest = self.slowest
        if len(slowest) < _SLOWEST or ns > slowest[0][0]:
            entry = (ns, self.samples, key)  # the serial keeps keys from being compared
            if len(slowest) < _SLOWEST:
                heapq.heappush(slowest, entry)
            else:
                heapq.heapreplace(slowest, entry)
