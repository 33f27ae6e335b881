"""The record of a run of the demo: numbers over time, and photographs with guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class WindowRecord:
    """A few training steps: how long they took, how much of that was waiting for data, the loss of the last one."""

    seconds: float
    waited_s: float
    samples: int
    loss: float


@dataclass(frozen=True)
class EpochRecord:
    """The windows of one pass over the training photographs, and the validation accuracy (0 … 1) after it."""

    windows: list[WindowRecord]
    accuracy: float


@dataclass(frozen=True)
class Guess:
    """A validation photograph as the network saw it (uint8 (H, W, 3), RGB), and the class it predicted."""

    image: np.ndarray[Any, np.dtype[np.uint8]]
    label: str
    guess: str
    confidence: float


@dataclass(frozen=True)
class Run:
    """A whole run. `seconds` counts training and validation, from the first batch asked for."""

    epochs: list[EpochRecord]
    guesses: list[Guess]
    seconds: float


def samples_per_s(windows: Sequence[WindowRecord]) -> float:
    """Training samples per second over all of `windows`."""
    return sum(window.samples for window in windows) / sum(window.seconds for window in windows)


def waiting_share(windows: Sequence[WindowRecord]) -> float:
    """The share (0 … 1) of the time of `windows` in which the training loop waited for data."""
    return sum(window.waited_s for window in windows) / sum(window.seconds for window in windows)
