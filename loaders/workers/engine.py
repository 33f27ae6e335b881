"""The interface between the loader and its workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loaders.datasets.wrapped import describe
from loaders.errors import describe_sample, describe_samples
from loaders.memory.slots import SlotPool
from loaders.workers.messages import Fetch, Result, Task
from loaders.workers.worker import COLLATING


@dataclass(frozen=True)
class Reading:
    """What a worker is reading: a row, or COLLATING."""

    worker: int
    ticket: int
    row: int
    since_s: float


class Engine(Protocol):
    """Executes spans of tasks and reports a result for each, in any order of tasks.

    Attributes:
        pool: the slots in the memory this engine's workers can write to.
        num_workers: how many spans are executed at once.
    """

    pool: SlotPool
    num_workers: int

    def submit(self, task: Task, spans: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Queue spans (start row, stop row), first come, first served. `lane` selects the worker of a stream."""

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The available results; waits for one, at most `timeout_s` (None: forever, 0: not at all).

        Raises:
            WorkerLostError: workers died repeatedly on one sample.
        """

    def wait(self, timeout_s: float | None) -> None:
        """Wait until there is something to collect, at most `timeout_s` (None: forever). Without workers, do the work.

        With workers it changes no state: a signal handler may raise at any instruction.
        """

    def cancel(self, task: Task) -> None:
        """Stop working on this task. Its spans are still reported, so that its slot can be reclaimed."""

    def reading(self) -> list[Reading]:
        """What each busy worker is reading, longest first."""

    def resize(self, workers: int) -> None:
        """Set the number of workers, 1 to the `num_workers` of the job. Not for streams: each worker has its own."""

    def close(self, *, force: bool = False) -> None:
        """Stop all workers; with `force` at once, whatever state an exception has left this engine in.

        Safe to call twice, and in a forked child, where it does nothing."""


def describe_work(dataset: Any, fetch: Fetch, task: Task, row: int) -> tuple[Any, str | None, str]:
    """(key, source, name for messages) of what a worker is reading: a single sample if that is known."""
    if fetch == "stream":
        return None, None, f"batch {task.keys[0]} of its stream"
    if fetch == "all" or row == COLLATING:
        doing = "collate_fn of " if row == COLLATING else ""
        return list(task.keys), None, doing + describe_samples(task.keys)
    key = task.keys[row]
    source = describe(dataset, key)
    return key, source, describe_sample(key, source)
