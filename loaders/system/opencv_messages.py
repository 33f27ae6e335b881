"""OpenCV's own messages on stderr are off while a file is decoded: what it says of the file, our error says."""

from __future__ import annotations

import os
import threading

import cv2


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
        self._lock = threading.Lock()
        self._inside = 0
        self._level = cv2.utils.logging.LOG_LEVEL_SILENT  # to go back to

    def _after_fork(self) -> None:  # the threads that were inside are not here
        if self._inside:
            cv2.utils.logging.setLogLevel(self._level)
        self._reset()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._level = cv2.utils.logging.getLogLevel()
                if self._level <= cv2.utils.logging.LOG_LEVEL_WARNING:
                    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                cv2.utils.logging.setLogLevel(self._level)


no_messages = _NoMessages()
