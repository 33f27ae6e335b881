"""The events of a trace, while one is taken: who did what from when to when. `loaders.trace` writes them to a file."""

from __future__ import annotations

from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that took a while, or a value that holds from then on.

    Attributes:
        process: "consumer", "workers", "slots" or "device"; `lane` is a line below it.
        ended_ns: equal to `began_ns` for a value.
        about: plain numbers and text.
    """

    process: str
    lane: str
    name: str
    began_ns: int
    ended_ns: int
    about: dict[str, Any]


# The traces that are being taken. Looked at before each `add`, so that nothing else is paid for where there are none.
traces: list[list[Event]] = []


def add(process: str, lane: str, name: str, began_ns: int, ended_ns: int, **about: Any) -> None:
    """Put an event into every trace that is being taken. Appending is atomic, so any thread may."""
    event = Event(process, lane, name, began_ns, ended_ns, about)
    for events in traces:
        events.append(event)
