"""Turns off OpenCV's own threads in the workers of torch's stock DataLoader.

A stock worker offers no hook, so the first function of this package that runs there does it. Otherwise OpenCV opens one
thread per core in each worker, and they compete for the cores that the workers already use.
"""

from __future__ import annotations

import sys

_quiet = False


def quiet_opencv() -> None:
    """In a worker of a stock DataLoader, turn OpenCV's threads off; elsewhere do nothing.

    Imports nothing: where torch or OpenCV is not loaded there is nothing to do. Cheap enough to call per sample.
    """
    global _quiet  # noqa: PLW0603  once per process; set in workers only, so that no fork inherits it
    if _quiet:
        return
    torch_data, cv2 = sys.modules.get("torch.utils.data"), sys.modules.get("cv2")
    if torch_data is not None and cv2 is not None and torch_data.get_worker_info() is not None:
        cv2.setNumThreads(0)
        _quiet = True
