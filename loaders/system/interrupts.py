"""Signal handlers that raise: how to recognise their exceptions, and how to defer them where they must not run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any

Handlers = dict[int, Callable[[int, FrameType | None], Any]]


def is_interrupt(error: BaseException) -> bool:
    """Whether `error` was raised by a Python signal handler, such as that of a time limit set with `signal.alarm`.

    It concerns whoever set the handler, not the sample or sampler that was running when the signal arrived.
    """
    if not isinstance(error, Exception):
        return True  # KeyboardInterrupt, SystemExit: never the failure of a sample
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


class undisturbed:  # noqa: N801  # used as `with undisturbed():`
    """Defers signals that arrive inside the block until its end, because their handlers may raise.

    Python runs handlers in the main thread, so in other threads nothing is deferred. A process that is forked inside
    the block has the original handlers.
    """

    def __init__(self) -> None:
        self._handlers: Handlers = {}
        self._came: set[int] = set()

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # A handler that was not set from Python could not be restored; nor does it raise.
        self._handlers = {n: handler for n in _SIGNALS if callable(handler := signal.getsignal(n))}
        _open.append(self)
        try:
            _install(dict.fromkeys(self._handlers, self._note))
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers:
            self._end()
            _send(self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.add(number)

    def _end(self) -> None:
        try:
            _install(self._handlers)
        except BaseException:  # from a handler that is restored already
            _install(self._handlers)
            raise
        finally:
            if self in _open:
                _open.remove(self)


# SIGKILL and SIGSTOP have no handlers.
_SIGNALS = sorted(set(map(int, signal.valid_signals())) - {signal.SIGKILL, signal.SIGSTOP})
_open: list[undisturbed] = []  # in this process; the innermost last


def _install(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _send(numbers: set[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers.pop())
        finally:
            _send(numbers)


def _after_fork_in_child() -> None:
    while _open:
        _install(_open.pop()._handlers)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
