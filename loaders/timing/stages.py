"""Where the time of a sample goes: a clock that times stages, and the marks by which code delimits them.

The clock times just so many samples that this costs a few parts in a thousand: every one where samples take
milliseconds, one in hundreds where they take microseconds. While it is off, a mark does nothing. All times are of
`time.perf_counter_ns`, which the processes of a machine share.
"""

from __future__ import annotations

import threading
import time

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
from types import TracebackType
from typing import NamedTuple

# What a worker does for a sample; "sample" is everything in the code of the dataset that is not marked.
STAGES = ("read", "decode", "augment", "collate", "write", "sample")
_SAMPLE = STAGES.index("sample")

# To time a sample costs a few microseconds, about fifteen when the code for it has left the processor's caches: once in
# four milliseconds of a worker's time is well below one per cent.
_EVERY_NS = 4_000_000


class Times(NamedTuple):
    """What a span took; plain integers, so that they fit into the record that reports it.

    Attributes:
        began_ns: when it began.
        cpu_ns: the part of the span in which the thread computed, or would have with a core to itself; the rest it
            waited, for a disk or a lock. -1 where nothing was timed.
        looked_at: samples of the span that were timed. The stages, in the order of STAGES, are theirs alone.
        read_nbytes: bytes that these samples read from files.
        slowest_row: the row of the slowest of them in its batch; -1 where they were not timed one by one.
    """

    began_ns: int = 0
    cpu_ns: int = -1
    looked_at: int = 0
    read_ns: int = 0
    decode_ns: int = 0
    augment_ns: int = 0
    collate_ns: int = 0
    write_ns: int = 0
    sample_ns: int = 0
    read_nbytes: int = 0
    slowest_row: int = -1
    slowest_ns: int = 0

    @property
    def stages_ns(self) -> tuple[int, ...]:
        """In the order of STAGES."""
        return self[3:9]


NO_TIMES = Times()


class _Here(threading.local):
    """The clock that is timing this thread, if any."""

    clock: Clock | None = None


_here = _Here()


class Clock:
    """Measures the spans of one worker. One per thread."""

    def __init__(self) -> None:
        self._skip = 0  # rows before the next one to time
        self._stride = 16  # rows from one timed row to the next
        self._stages = [0] * len(STAGES)
        self._above: list[int] = []  # the stages around the current one
        self._stage = _SAMPLE
        self._since_ns = self._began_ns = self._sample_began_ns = 0
        self._cpu = (0, 0)
        self._slowest = (-1, 0)
        self._looked_at = self._nbytes = 0
        self._whole = False

    def begin_run(self, start: int, stop: int, *, whole: bool = False) -> int:
        """Begin a span. Returns the first row to time; `stop` or more if there is none in this span.

        Args:
            whole: time all of the span or nothing of it.
        """
        due = start + self._skip
        self._looked_at, self._whole = 0, whole
        self._began_ns = time.perf_counter_ns()
        if due < stop:
            self._stages = [0] * len(STAGES)
            self._nbytes, self._slowest = 0, (-1, 0)
            self._cpu = _cpu()
        return due

    def begin_sample(self) -> None:
        """Start timing."""
        _here.clock = self
        self._stage = _SAMPLE
        self._above.clear()
        self._since_ns = self._sample_began_ns = time.perf_counter_ns()

    def end_sample(self, row: int, rows: int = 1) -> int:
        """Stop timing, after `rows` samples: one in `row`, or several if that is -1. Returns the next row to time."""
        now = self._turn(_SAMPLE)
        _here.clock = None
        self._looked_at += rows
        took_ns = now - self._sample_began_ns
        if row >= 0 and took_ns > self._slowest[1]:
            self._slowest = row, took_ns
        return row + self._stride

    def enter(self, stage: int) -> None:
        """Begin `stage` inside the current one: its time does not count for that one."""
        self._above.append(self._stage)
        self._turn(stage)

    def leave(self) -> None:
        """End the stage that was entered last."""
        self._turn(self._above.pop() if self._above else _SAMPLE)

    def count_read(self, nbytes: int) -> None:
        """Count `nbytes` bytes as read."""
        self._nbytes += nbytes

    def end_run(self, start: int, stop: int) -> tuple[int, Times]:
        """End the span. Returns what it took in all, in nanoseconds, and in detail."""
        took_ns, rows = time.perf_counter_ns() - self._began_ns, stop - start
        if self._skip >= rows:  # nothing was timed
            self._skip -= rows
            return took_ns, Times(self._began_ns)
        if _here.clock is self:  # of a whole span, or of a sample that an error ended
            self.end_sample(-1)
        (cpu_ns, waits), (cpu_before_ns, waits_before) = _cpu(), self._cpu
        # A thread that never gave up its core of its own accord has not waited.
        cpu_ns = took_ns if waits == waits_before else min(took_ns, cpu_ns - cpu_before_ns)
        looked_at = rows if self._whole else self._looked_at
        detail = (self._began_ns, cpu_ns, looked_at, *self._stages, self._nbytes, *self._slowest)
        self._stride = max(1, _EVERY_NS * rows // max(1, took_ns))
        self._skip = (self._skip - rows) % (self._stride * rows if self._whole else self._stride)
        return took_ns, Times._make(detail)

    def _turn(self, stage: int) -> int:
        now = time.perf_counter_ns()
        self._stages[self._stage] += now - self._since_ns
        self._stage, self._since_ns = stage, now
        return now


class Stage:
    """A context whose time counts for this stage while a clock is on. Reusable, and by all threads."""

    __slots__ = ("_number",)

    def __init__(self, name: str) -> None:
        self._number = STAGES.index(name)

    def __enter__(self) -> None:
        clock = _here.clock
        if clock is not None:
            clock.enter(self._number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        clock = _here.clock
        if clock is not None:
            clock.leave()


READ, DECODE, AUGMENT, COLLATE, WRITE = (Stage(name) for name in STAGES[:-1])
_BY_NAME = dict(zip(STAGES, (READ, DECODE, AUGMENT, COLLATE, WRITE), strict=False))


def _cpu() -> tuple[int, int]:
    """(CPU time of this thread in nanoseconds, how often it has given up its core of its own accord)."""
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return time.thread_time_ns(), time.thread_time_ns()
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return int((usage.ru_utime + usage.ru_stime) * 1e9), usage.ru_nvcsw


def stage(name: str) -> Stage:
    """Mark a stage of your own dataset's work for `DataLoader.report()`: `with loaders.stage("decode"): …`.

    Stages may be nested; time counts for the innermost. Outside of a loader's worker this does nothing.

    Args:
        name: "read", "decode", "augment", "collate" or "write".

    Raises:
        ValueError: there is no such stage.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise ValueError(f"stage {name!r} is unknown; the stages are {', '.join(_BY_NAME)}.")
    return found


def is_looked_at() -> bool:
    """Whether a clock is timing this thread."""
    return _here.clock is not None


def count_read(nbytes: int) -> None:
    """Count `nbytes` bytes as read by the current sample."""
    clock = _here.clock
    if clock is not None:
        clock.count_read(nbytes)
