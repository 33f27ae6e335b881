"""Exceptions that a signal handler raised into the code that was running, told apart from that code's own."""

from __future__ import annotations

import signal
from types import CodeType
from typing import Any


def is_interrupt(error: BaseException) -> bool:
    """Whether `error` came out of a signal handler of Python's, such as a time limit set with `signal.alarm`.

    It belongs to whoever set the handler, not to the sample or sampler that was at work when the signal came.
    """
    if not isinstance(error, Exception):
        return True  # KeyboardInterrupt, SystemExit: nothing that a sample fails with
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code)
        traceback = traceback.tb_next
    handlers = _handlers()
    return any(code in handlers for code in frames)


def _handlers() -> set[CodeType]:
    found = set()
    for number in signal.valid_signals():
        code = _code_of(signal.getsignal(number))
        if code is not None:
            found.add(code)
    return found


def _code_of(handler: Any) -> CodeType | None:
    for _ in range(8):  # partials of methods of callable objects
        if isinstance(code := getattr(handler, "__code__", None), CodeType):
            return code
        inner = getattr(handler, "__func__", None) or getattr(handler, "func", None)
        handler = inner if inner is not None else type(handler).__dict__.get("__call__")
    return None
