"""How a worker process is started, and how its end is detected."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import forkserver, popen_fork, resource_tracker, util
from typing import Any

# How long to wait for the exit code of a process that has ended.
_STATUS_S = 0.1


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


class _Forked(popen_fork.Popen):
    """A forked process. multiprocessing's own class leaves four descriptors open if forking fails."""

    def _launch(self, process: Any) -> None:
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            self.pid = os.fork()
        except BaseException:
            _close(*pipes)
            raise
        ends_with_child, held_by_child, ends_with_parent, held_by_parent = pipes
        if self.pid == 0:
            status = 1
            try:
                os.close(ends_with_child)
                os.close(held_by_parent)
                status = process._bootstrap(parent_sentinel=ends_with_parent)
            finally:
                os._exit(status)
        os.close(held_by_child)
        os.close(ends_with_parent)
        self.sentinel = ends_with_child
        self.finalizer = util.Finalize(self, _close, (ends_with_child, held_by_parent))


def launch(process: Any, method: str) -> None:
    """Start a multiprocessing process, safe against Ctrl-C and a process that ends before it has read its setup.

    In the new process SIGINT and SIGPIPE are blocked until it unblocks them.

    Raises:
        EOFError, ConnectionError: the fork server has died.
    """
    # These serve all later processes, so they must not inherit the mask below.
    if method == "forkserver":
        forkserver.ensure_running()
    elif method == "spawn":
        resource_tracker.ensure_running()
    else:
        process._Popen = _Forked
    blocked = {signal.SIGINT, signal.SIGPIPE}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process.start()
    finally:
        if signal.SIGPIPE in signal.sigpending() and signal.SIGPIPE not in mask:
            # Its default action would end this program. The exception already reports the failure.
            signal.sigwait({signal.SIGPIPE})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def sentinel_of(process: Any) -> int:
    """A descriptor that becomes readable when the process has ended.

    multiprocessing's own is a pipe, which processes that the dataset forked in the worker may hold open.
    """
    try:
        return os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        return os.dup(process.sentinel)


def exitcode_of(process: Any, method: str) -> int | None:
    """The exit code of a process that has ended, or is about to. None if it cannot be known."""
    process.join()
    deadline = time.monotonic() + _STATUS_S
    # Another thread may have reaped it and not stored the code yet; with SIGCHLD ignored the code is lost.
    while (exitcode := process.exitcode) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if method == "forkserver" and exitcode == 255:
        return -signal.SIGKILL  # how multiprocessing reports that the server has died; its processes die with it
    return exitcode  # type: ignore[no-any-return]


def ended(exitcode: int | None) -> str:
    """How a process ended."""
    if exitcode is None:
        return "with an unknown exit status"
    if exitcode >= 0:
        return f"by exit with status {exitcode}"
    try:
        return f"by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"by signal {-exitcode}"


def hint_for_start(dataset: Any, method: str) -> str:
    """What may prevent a process from reading this dataset, and what to do."""
    kind = type(dataset)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if method == "fork":
        return f"The dataset is a `{name}`. The process's own output may say more."
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        is_here = f"`{name}` is defined there" if kind.__module__ == "__main__" else "Part of it may be defined there"
        return (
            f"The dataset is a `{name}`. Under {method} a worker process imports what it needs, but it cannot import "
            f"`__main__` of a notebook or an interactive session. {is_here}: move it into a module (a file), or "
            'use multiprocessing_context="fork" or worker_method="thread".'
        )
    return (
        f"The dataset is a `{name}`. Under {method} a worker process imports `__main__` ({script}) again, and whatever "
        "else the dataset needs: define classes at module level, and guard the main program with "
        "`if __name__ == '__main__':`. The process's own output may say more."
    )
