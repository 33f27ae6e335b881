"""Turns off OpenCV's own messages on stderr while a file is decoded: the error raised says what is wrong with it."""

from __future__ import annotations

import os
import threading
from typing import Any

import cv2

_levels: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # before OpenCV 5, and from then on
_SILENT, _WARNING = 0, 3


def log_level() -> int:
    """OpenCV's log level: 0 is silent, 3 warnings, higher more verbose."""
    level: int = _levels.getLogLevel()
    return level


class _NoMessages:
    """A context in which OpenCV writes no warning and no error. Several threads may be in it at once.

    OpenCV has one level for the whole process, so its calls in other threads are silenced meanwhile, too. A level above
    warnings, set by `OPENCV_LOG_LEVEL` or by a call, is left alone.
    """

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may decode, too
        # Ids, not a count: what an interrupt left behind is gone once its thread has used the context again.
        self._threads: set[int] = set()
        self._is_silent = False
        self._level = _WARNING  # the level to restore if so

    def _after_fork(self) -> None:  # the child has none of the threads that were inside
        if self._is_silent:
            _levels.setLogLevel(self._level)
        self._reset()

    def __enter__(self) -> None:
        with self._lock:
            is_first = not self._threads
            self._threads.add(threading.get_ident())
            if is_first and _SILENT < (level := log_level()) <= _WARNING:
                self._level, self._is_silent = level, True
                _levels.setLogLevel(_SILENT)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads.discard(threading.get_ident())
            if not self._threads and self._is_silent:
                _levels.setLogLevel(self._level)
                self._is_silent = False


no_messages = _NoMessages()
