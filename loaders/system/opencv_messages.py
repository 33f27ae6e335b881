"""OpenCV's own messages on stderr are off while a file is decoded: what it says of the file, our error says."""

from __future__ import annotations

import os
import threading
from typing import Any

import cv2

_levels: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # before OpenCV 5, and from then on
_SILENT, _WARNING = 0, 3


def log_level() -> int:
    """OpenCV's: 0 for silence, 3 for warnings, more for more."""
    level: int = _levels.getLogLevel()
    return level


class _NoMessages:
    """A context in which OpenCV writes no warning and no error. Threads may be in it together.

    OpenCV has one level for the whole process: what other threads ask of it meanwhile is as silent. A level that asks
    for more than warnings, by `OPENCV_LOG_LEVEL` or by a call, is left alone.
    """

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may decode, too
        # By number, not how many: what an interrupt left behind is gone when its thread has been here again.
        self._threads: set[int] = set()
        self._is_silent = False
        self._level = _WARNING  # to go back to, if so

    def _after_fork(self) -> None:  # the threads that were inside are not here
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
