"""OpenCV's own threads are off in the workers of torch's stock DataLoader.

A stock worker offers no hook, so whatever of ours runs there first sees to it. OpenCV opens one thread per core in each
worker otherwise, and they fight each other: the workers are the parallelism.
"""

from __future__ import annotations

import sys

_quiet = False


def quiet_opencv() -> None:
    """In a worker of a stock DataLoader, set OpenCV's number of threads to one; elsewhere do nothing.

    Imports nothing: where torch or OpenCV is not loaded there is nothing to do. Cheap enough to call per sample.
    """
    global _quiet  # noqa: PLW0603  once per process; set in workers only, so that no fork inherits it
    if _quiet:
        return
    torch_data, cv2 = sys.modules.get("torch.utils.data"), sys.modules.get("cv2")
    if torch_data is not None and cv2 is not None and torch_data.get_worker_info() is not None:
        cv2.setNumThreads(0)
        _quiet = True
