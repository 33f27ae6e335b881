"""The events of a trace, while one is taken: who did what from when to when. `loaders.trace` writes them to a file."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

VALUE = -1


class TraceEvent(NamedTuple):
    """Something that took a while, or a value that holds from then on.

    Attributes:
        process: "consumer", "workers", "slots" or "device". `lane`: the group of lines below it; "" is the thread that
            says so, or for slots and copies any line that is free.
        ended_ns: VALUE for a value that holds from `began_ns` on.
        about: plain numbers and text.
    """

    process: str
    lane: str
    name: str
    began_ns: int
    ended_ns: int
    about: dict[str, Any]


# The traces that are being taken. Looked at before each `add`, so that nothing else is paid for where there are none.
traces: list[list[TraceEvent]] = []


def add(process: str, lane: str, name: str, began_ns: int, ended_ns: int, **about: Any) -> None:
    """Put an event into every trace that is being taken. Appending is atomic, so any thread may."""
    if process == "consumer":
        lane = threading.current_thread().name
    event = TraceEvent(process, lane, name, began_ns, ended_ns, about)
    for events in traces:
        events.append(event)
