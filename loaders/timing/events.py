"""The events of a trace while it is recorded. `loaders.trace` writes them to a file."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

VALUE = -1


class TraceEvent(NamedTuple):
    """A period of time, or a value that holds from a moment on.

    Attributes:
        process: "consumer", "workers", "slots" or "device". `lane`: the group of lines below it, a thread or a worker;
            "" for slots and copies, which are drawn on any free line.
        ended_ns: VALUE for a value that holds from `began_ns` on.
        about: plain numbers and text.
    """

    process: str
    lane: str
    name: str
    began_ns: int
    ended_ns: int
    about: dict[str, Any]


# The traces that are being recorded. Checked before each `add`, so that without a trace nothing else is paid for.
traces: list[list[TraceEvent]] = []


def add(process: str, lane: str, name: str, began_ns: int, ended_ns: int, **about: Any) -> None:
    """Put an event into every trace that is being recorded. Appending is atomic, so any thread may."""
    if process == "consumer":
        lane = threading.current_thread().name
    event = TraceEvent(process, lane, name, began_ns, ended_ns, about)
    for events in traces:
        events.append(event)
