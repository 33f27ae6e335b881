"""Waits for other processes, always with a deadline, and checks for what a loader has left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from support import inside

from loaders.workers.processes import ProcessEngine


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """The first true value of `condition`; fails if it stays false."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(0.005)
    return value


def is_gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has reaped it yet."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def worker_pids() -> list[int]:
    """The worker processes of all loaders of this process."""
    return [child.pid for child in multiprocessing.active_children() if child.name.startswith("loaders-") and child.pid]


def worker_threads() -> list[threading.Thread]:
    """The worker threads of all loaders."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("loaders-")]


def assert_nothing_is_held(loader: Any) -> None:
    """No block of the loader's slots is leased or in use, except those of persistent workers; no ticket is left."""
    gc.collect()
    kept = inside.kept_of(loader)
    if kept is not None and not kept._closed:
        kept.drop_ahead()
    engine = kept.engine if kept is not None else None
    own = len(engine._own) if isinstance(engine, ProcessEngine) and not engine._closed else 0

    def is_free() -> bool:
        if kept is not None and not kept._closed:
            kept.collect()  # abandoned tasks are reported late
        pools = inside.pools_of(loader)
        for pool in pools:
            pool.reclaim()
        held = sum(pool.leased_count for pool in pools), sum(sum(pool._in_use.values()) for pool in pools)
        return (*held, len(kept._open) if kept is not None else 0) == (0, own, 0)

    wait_until(is_free, f"every block and ticket is free; held: {loader.holders()}", timeout_s=10.0)


def assert_no_workers() -> None:
    """No process and no thread of any loader is left."""

    def none_of(workers: Callable[[], list[Any]]) -> bool:
        # Collected each time: a thread that is still about to report an error holds what the error refers to.
        gc.collect()
        return not workers()

    wait_until(lambda: none_of(worker_pids), "no worker process is left", timeout_s=10.0)
    try:
        wait_until(lambda: none_of(worker_threads), "no worker thread is left", timeout_s=10.0)
    except AssertionError as error:
        frames = sys._current_frames()
        stacks = ["".join(traceback.format_stack(frames.get(thread.ident or 0))) for thread in worker_threads()]
        raise AssertionError("\n".join([str(error), *stacks])) from None


def batches_and_errors(loader: Any) -> list[Any]:
    """The batches of an epoch, and the exceptions raised in place of some, in order."""
    found: list[Any] = []
    iterator = iter(loader)
    while True:
        try:
            found.append(next(iterator))
        except StopIteration:
            return found
        except Exception as error:
            found.append(error.with_traceback(None))


def run_in_child(look: Callable[[], Any]) -> bool:
    """Whether `look()` is true in a forked child. An exception there is printed and counts as false."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if look() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


class Killer(threading.Thread):
    """Kills random worker processes of an iterator, spares included, until it is stopped.

    Args:
        iterator: whose workers.
        rng: chooses the moments and the victims.
        mean_s: the mean time between two kills.
        at_most: how many to kill; None for no limit.
    """

    def __init__(self, iterator: Any, rng: random.Random, mean_s: float, at_most: int | None = None) -> None:
        super().__init__(name="killer", daemon=True)
        self.killed = 0
        self._processes = inside.engine_of(iterator)._supervisor.processes
        self._rng = rng
        self._mean_s = mean_s
        self._at_most = at_most
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._rng.uniform(0.2, 1.8) * self._mean_s):
            workers = list(self._processes.values())
            if workers and self._kill(self._rng.choice(workers).process):
                self.killed += 1
                if self.killed == self._at_most:
                    return

    @staticmethod
    def _kill(process: Any) -> bool:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except (ValueError, ProcessLookupError):  # it is being reaped right now
            return False
        return True

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self.join()
