"""The seam between the loader and whoever does the work."""

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
    """A row that a worker is busy with, or COLLATING."""

    worker: int
    ticket: int
    row: int
    since_s: float


class Engine(Protocol):
    """Executes spans of tasks and reports a result for each, in any task.

    Attributes:
        pool: the slots in the memory this engine's workers can write to.
        num_workers: how many spans are worked on at once.
    """

    pool: SlotPool
    num_workers: int

    def submit(self, task: Task, spans: Sequence[tuple[int, int]], lane: int = 0) -> None:
        """Queue spans (start row, stop row), first come first served. Streams go to their own worker by `lane`."""

    def collect(self, timeout_s: float | None) -> list[Result]:
        """The results that are there; waits for one, at most `timeout_s` (None: for ever, 0: not at all).

        Raises:
            WorkerLostError: a worker died again and again on one sample.
        """

    def wait(self, timeout_s: float | None) -> None:
        """Until there is something to collect, at most `timeout_s` (None: for ever). An engine without workers works.

        With workers nothing changes meanwhile: an exception of a signal handler may come at any instruction.
        """

    def cancel(self, task: Task) -> None:
        """Spend no more time on this task. Its spans are still reported, so that its slot can be taken back."""

    def reading(self) -> list[Reading]:
        """What is being read now, longest first."""

    def resize(self, workers: int) -> None:
        """Let so many work from now on, 1 to the `num_workers` of the job. Not for streams: each worker has one."""

    def close(self, *, force: bool = False) -> None:
        """Stop all workers; with `force` at once, in whatever state an exception has left this engine.

        Safe to call twice, and in a forked child, where it does nothing."""


def describe_work(dataset: Any, fetch: Fetch, task: Task, row: int) -> tuple[Any, str | None, str]:
    """(key, source, name for messages) of what a worker is busy with: a sample, where that can be told."""
    if fetch == "stream":
        return None, None, f"batch {task.keys[0]} of its stream"
    if fetch == "all" or row == COLLATING:
        doing = "collate_fn of " if row == COLLATING else ""
        return list(task.keys), None, doing + describe_samples(task.keys)
    key = task.keys[row]
    source = describe(dataset, key)
    return key, source, describe_sample(key, source)
