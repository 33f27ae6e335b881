"""The only place where tests access the private attributes of a loader."""

from __future__ import annotations

from typing import Any

from loaders.dataloader.dispatch import Dispatch
from loaders.dataloader.plan import Plan
from loaders.memory.slots import SlotPool


def pool_of(loader: Any) -> SlotPool | None:
    """The memory that the loader used last."""
    return loader._engines.pool


def pools_of(loader: Any) -> tuple[SlotPool, ...]:
    """All memory of the loader that is in use or kept for use."""
    return loader._engines._stock.pools


def kept_of(loader: Any) -> Dispatch | None:
    """The persistent workers, None where there are none."""
    return loader._engines.kept


def dispatch_of(iterator: Any) -> Dispatch:
    """The workers of an iterator."""
    return iterator._work.dispatches[-1]


def engine_of(iterator: Any) -> Any:
    """The engine of an iterator."""
    return dispatch_of(iterator).engine


def processes_of(iterator: Any) -> list[Any]:
    """The worker processes of an iterator, spares included."""
    return list(engine_of(iterator)._supervisor.processes.values())


def kept_processes_of(loader: Any) -> list[Any]:
    """The persistent worker processes of a loader, spares included."""
    return list(loader._engines.kept.engine._supervisor.processes.values())


def plan_of(loader: Any) -> Plan:
    """How the loader makes its batches."""
    return loader._plan


def page_locker_of(loader: Any) -> Any:
    """What page-locks the loader's memory; None where nothing does."""
    return loader._engines.page_locker


def tuner_of(loader: Any) -> Any:
    """What chooses the number of workers; None where it is fixed."""
    return loader._tuner


def tune_by(loader: Any, tuner: Any) -> None:
    """Let `tuner` choose the number of workers."""
    loader._tuner = tuner


def most_workers_of(loader: Any) -> int:
    """The most workers that "auto" may choose."""
    return loader._most_workers


class _RaisesOnRelease:
    """The lock of an iterator; raises once after it was released."""

    def __init__(self, turn: Any, error: BaseException) -> None:
        self._turn, self._errors = turn, [error]

    def __enter__(self) -> None:
        self._turn.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._turn.__exit__(*raised)
        if self._errors:
            raise self._errors.pop()


def raise_before_hand_out(iterator: Any, error: BaseException) -> None:
    """Let the next call raise after it has made its batch, as a signal handler may."""
    iterator._turn = _RaisesOnRelease(iterator._turn, error)
