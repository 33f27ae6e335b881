"""`loaders.trace`: what workers, slots, the loop and the device did, on one time line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loaders.timing import events
from loaders.timing.events import VALUE, TraceEvent

_PROCESSES = ("consumer", "workers", "slots", "device")


@contextmanager
def trace(path: str | os.PathLike[str]) -> Iterator[None]:
    """Record what every loader does inside the block, as Chrome trace events: `with loaders.trace("run.json"): …`.

    Open the file in ui.perfetto.dev or chrome://tracing. There is a line for each thread that iterates a loader (what
    it waits for, what it computes), each worker (runs of samples), each slot (a batch from the moment it is opened
    until it is handed out) and each copy to the device. A copy's end is when the host noticed it.

    The events are kept in memory until the end, a few hundred bytes each, a few for each batch and one for each run of
    ten milliseconds: trace minutes, not hours.

    Args:
        path: of the file, which is written at the end, also after an error.

    Raises:
        OSError: the file cannot be written; raised at once, not at the end.
    """
    place = Path(path)
    place.write_text("")
    taken: list[TraceEvent] = []
    events.traces.append(taken)
    try:
        yield
    finally:
        events.traces[:] = [each for each in events.traces if each is not taken]
        place.write_text(json.dumps({"traceEvents": trace_events(taken), "displayTimeUnit": "ms"}), encoding="utf-8")


def trace_events(events: Iterable[TraceEvent]) -> list[dict[str, Any]]:
    """Events in the Trace Event Format: times in microseconds, and on each line nested or one after the other."""
    # Parents before their children.
    ordered = sorted(events, key=lambda event: (event.began_ns, -event.ended_ns))
    start_ns = ordered[0].began_ns if ordered else 0
    found: list[dict[str, Any]] = []
    lines = _Lines()
    for event in ordered:
        entry = {
            "name": event.name,
            "ts": (event.began_ns - start_ns) / 1000,
            "pid": _pid(event.process),
        }
        if event.ended_ns == VALUE:
            found.append({**entry, "ph": "C", "tid": 0, "args": event.about})
        else:
            duration = (event.ended_ns - event.began_ns) / 1000
            found.append({**entry, "ph": "X", "tid": lines.line_of(event), "dur": duration, "args": event.about})
    return [*lines.names(), *found]


class _Lines:
    """The line that each event is drawn on: the first of its lane in which it overlaps no other event."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str, int], int] = {}
        self._open: dict[tuple[str, str], list[list[int]]] = {}  # for each line of a lane, the ends of its open events
        self._slots: dict[int, tuple[str, str, int]] = {}  # where the batch of a ticket is drawn

    def line_of(self, event: TraceEvent) -> int:
        """The number of the line, unique in its process."""
        if event.process == "slots" and (at := self._slots.get(event.about["ticket"])) is not None:
            return self._numbers[at]  # a part of the batch that is drawn there
        open_lines = self._open.setdefault((event.process, event.lane), [])
        for ends in open_lines:
            while ends and ends[-1] <= event.began_ns:
                ends.pop()
        fits = (
            number
            for number, ends in enumerate(open_lines)
            if not ends or (event.process in ("consumer", "workers") and ends[-1] >= event.ended_ns)
        )
        number = next(fits, len(open_lines))
        if number == len(open_lines):
            open_lines.append([])
        open_lines[number].append(event.ended_ns)
        at = (event.process, event.lane, number)
        if event.process == "slots":
            self._slots[event.about["ticket"]] = at
        return self._numbers.setdefault(at, len(self._numbers) + 1)

    def names(self) -> Iterator[dict[str, Any]]:
        """The names of the processes and the lines."""
        for process in _PROCESSES:
            yield _name("process_name", _pid(process), 0, process)
        for (process, lane, number), line in self._numbers.items():
            if process in ("slots", "device"):
                name = f"{'slot' if process == 'slots' else 'copy'} {number}"
            else:
                name = lane if number == 0 else f"{lane} ({number})"
            yield _name("thread_name", _pid(process), line, name)


def _pid(process: str) -> int:
    return _PROCESSES.index(process) + 1


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
