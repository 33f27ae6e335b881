"""Exceptions that come at random instructions, as from Ctrl-C or a time limit."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised by the handler. An `Exception`, so that code which takes it for a sample's own error is found out."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted


@contextmanager
def interruptible() -> Iterator[None]:
    """The alarm raises `Interrupted` inside."""
    before = signal.signal(signal.SIGALRM, _raise)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


INTERRUPTED, ENDED = object(), object()


def next_interrupted(iterator: Any, delay_s: float) -> Any:
    """The next batch, INTERRUPTED or ENDED: the alarm comes `delay_s` after the call has begun, if it lasts so long.

    The batch is put into a list in the step that takes it: between the return of `next` and an assignment Python itself
    lets a handler in, as it does for every iterator.
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
    """Moments, most of them early."""
    draw = random.Random(seed)
    while True:
        yield 1e-5 + draw.random() ** 2 * longest_s
