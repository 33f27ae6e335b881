"""A program that consumes batches until it is killed or interrupted: `consumer.py METHOD …`, two loaders per method.

It prints the ids of all its workers, then those of its other descendants, and at last how it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from support.saboteurs import Carries, Numbers, eight_megabytes, hang


def descendants(pid: int) -> list[int]:
    """The living descendants of process `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(parent, []).append(int(entry.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def fork_bystander() -> int:
    """Fork a process that inherits everything from the consumer and outlives it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid > 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    else:
        os.closerange(0, 3)
        signal.alarm(60)
        signal.pause()
    return pid


def main(methods: list[str]) -> None:
    from loaders.dataloader.loader import DataLoader
    from loaders.workers import supervisor

    supervisor._GRACE_S = 0.5  # two workers never end by themselves
    iterators: list[Any] = []
    try:
        print("starting", flush=True)
        for method in methods:
            # Some workers are idle, one is in the middle of a sample, one in the middle of sending a large one.
            for dataset in (Carries(20, eight_megabytes, at=range(4, 20)), Numbers(20, hang, at={9})):
                loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method)
                iterators.append(iter(loader))
                next(iterators[-1])
        workers = {child.pid for child in multiprocessing.active_children()}
        servers = {*descendants(os.getpid())} - workers
        bystander = fork_bystander()
        print(*workers, flush=True)
        print(bystander, *servers, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    iterators.clear()
    print("ended", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
