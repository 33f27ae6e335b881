"""Exceptions raised at random instructions, as by Ctrl-C or a time limit."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised by the handler. An `Exception`, to expose code that mistakes it for a sample's own error."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the alarm raises `Interrupted`."""
    before = signal.signal(signal.SIGALRM, _raise)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


INTERRUPTED, ENDED = object(), object()


def next_interrupted(iterator: Any, delay_s: float) -> Any:
    """The next batch, INTERRUPTED or ENDED. The alarm goes off `delay_s` after the call begins, if it takes that long.

    One call takes the batch and puts it into a list: between the return of `next` and an assignment, Python may run a
    handler, and the batch of any iterator would be lost.
    """
    taken: list[Any] = []
    try:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        taken.extend(map(next, (iterator,)))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return taken[0] if taken else INTERRUPTED
    return taken[0] if taken else ENDED


def delays(seed: int, longest_s: float) -> Iterator[float]:
    """Random delays up to about `longest_s`, most of them short."""
    draw = random.Random(seed)
    while True:
        yield 1e-5 + draw.random() ** 2 * longest_s
