"""The epochs of one loader: their numbers, their seed, and the position in the current one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from loaders.dataloader.checkpoint import Position
from loaders.dataloader.orders import order_at_rest, world_of
from loaders.randomness.ranks import drawing_rank
from loaders.report.statistics import EpochStatistics, SkippedSample


class EpochLog:
    """What one iteration has handed out. Its attributes are replaced, never mutated: each step is one assignment.

    Attributes:
        position: after the batch that was handed out last.
        inherited: how many failures came with a loaded state.
        statistics: what was measured.
        begun: whether its first batch was requested. Until then it may be an `iter()` that is never used.
        ended: whether there are no more batches.
    """

    def __init__(self, position: Position, statistics: EpochStatistics) -> None:
        self.position = position
        self.inherited = len(position.failed)
        self.statistics = statistics
        self.begun = False
        self.ended = False


class Epochs:
    """Numbers a loader's epochs and keeps its position.

    Attributes:
        seed: of the samples' randomness; None until it is drawn.
        overflow_count: values that no slot could hold.
        turns: how many epochs were begun or resumed, plus states loaded.
        statistics: of the epoch that was begun last; None before the first.
        told: warnings that the caller has received.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.told: set[str] = set()
        self.overflow_count = 0
        self.turns = 0
        self.statistics: EpochStatistics | None = None
        self._next = 0
        self._sampler_epoch: Any = 0  # the sampler's `epoch` when it was last read
        self._log: EpochLog | None = None  # of the epoch that was begun last
        self._logs: tuple[EpochLog, ...] = ()  # with failures
        self._loaded: Position | None = None  # where the next iteration starts
        self._is_over = False  # nothing is left of the loaded one
        self._left_out: tuple[SkippedSample, ...] = ()  # listed in a loaded state

    def number(self, sampler: Any) -> int:
        """The number of the next epoch. One that a user or a framework sets on the sampler is adopted."""
        epoch = getattr(sampler, "epoch", self._sampler_epoch)
        if isinstance(epoch, int) and epoch != self._sampler_epoch:
            self._sampler_epoch = self._next = epoch
            self._drop_loaded(epoch)
        return self._next

    def set(self, epoch: int, sampler: Any) -> None:
        """Number the next epoch."""
        self._next = epoch
        self._sampler_epoch = getattr(sampler, "epoch", 0)
        if self._loaded is not None and self._loaded.epoch != epoch:
            self._drop_loaded(epoch)

    def start(self, sampler: Any) -> Position:
        """Where the next iteration starts."""
        number = self.number(sampler)
        return self._loaded if self._loaded is not None else Position.start(number)

    def begin(self, log: EpochLog) -> None:
        """Note that the first batch of an iteration is requested."""
        if log.begun:
            return
        logs = tuple(each for each in (*self._logs, log) if each is log or each.position.failed[each.inherited :])
        following, turns = log.position.epoch + 1, self.turns + 1
        # Assignments alone from here on: no exception can come between them.
        self._logs = logs
        self._log = log
        self._loaded = None
        self._next = following
        self.statistics = log.statistics
        self.turns = turns
        log.begun = True

    def turn_over(self, log: EpochLog, position: Position) -> None:
        """Move an iteration to the next epoch: the one that it resumed had no batches left."""
        following = position.epoch + 1
        log.position = position
        self._next = following

    def position(self, sampler: Any, *, drawn: bool) -> tuple[Position, bool]:
        """(the loader's position, whether it is inside an epoch). `drawn`: see `order_at_rest`."""
        number = self.number(sampler)
        if self._loaded is not None:
            return self._loaded, True
        if self._log is not None and not self._log.ended:
            return self._log.position, True
        return Position(number, 0, 0, order_at_rest(sampler, drawn=drawn)), False

    def load(self, position: Position, seed: int | None, sampler: Any, *, is_over: bool) -> None:
        """Let the next iteration start at `position`. `is_over`: whether nothing of its epoch is left."""
        left_out = tuple(SkippedSample(*rest) for _, *rest in position.failed)
        sampler_epoch = getattr(sampler, "epoch", 0)
        self._left_out = left_out
        self._logs = ()
        self._log = None
        self._loaded = position
        self._is_over = is_over
        self._next = position.epoch
        self._sampler_epoch = sampler_epoch
        self.turns += 1
        if seed is not None:
            self.seed = seed

    def copied(self) -> Epochs:
        """A copy for a copied loader, which has no iterator."""
        clone = copy.copy(self)
        clone.statistics = None
        return clone

    @property
    def errors(self) -> list[SkippedSample]:
        """Samples that `on_error` left out since the loader was made or a state loaded, those of the state included."""
        failed = (entry for log in self._logs for entry in log.position.failed[log.inherited :])
        return [*self._left_out, *(SkippedSample(*rest) for _, *rest in failed)]

    def batch_key(self, sampler: Any, *, is_stream: bool) -> tuple[int, int, int] | None:
        """(seed, epoch, number unique over all ranks) of the batch handed out last; None outside an epoch."""
        log = self._log
        if log is None or log.ended or self.seed is None:
            return None
        rank, ranks = drawing_rank(*(world_of(sampler) if not is_stream else (0, 1)))
        # Map-style: the position of its first sample over all ranks, so that resuming on other ranks keeps it unique.
        number = log.position.batches - 1 if is_stream else log.position.first
        return self.seed, log.position.epoch, number * ranks + rank

    def _drop_loaded(self, epoch: int) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.batches and not self._is_over:
            warnings.warn(
                f"the loaded state, after batch {loaded.batches} of epoch {loaded.epoch}, is discarded: the "
                f"epoch was set to {epoch}. Load the state after set_epoch, or set the epoch to {loaded.epoch}.",
                stacklevel=4,
            )
