"""The demo's picture: validation photographs with guesses, beside throughput, waiting and accuracy over time."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .record import Guess, Run, samples_per_s, waiting_share

COLUMNS = 5
RIGHT, WRONG = "#1a7f37", "#c62828"
LINE, TEXT, GRID = "#1f5fa8", "#374151", "#e5e7eb"


def draw(run: Run, path: Path) -> None:
    """Write the picture of `run` to `path`, a PNG file; its folder is created if it is missing."""
    # A figure without pyplot: no display is needed, and no global state changes.
    figure: Any = Figure(figsize=(14, 8), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.suptitle(
        f"{run.epochs[-1].accuracy:.1%} of the validation photographs recognised "
        f"after {len(run.epochs)} epochs in {run.seconds:.0f} s",
        fontsize=17,
        color=TEXT,
    )
    photos, curves = figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.03)
    _draw_guesses(photos, run.guesses)
    _draw_curves(curves, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_guesses(figure: Any, guesses: list[Guess]) -> None:
    grid = figure.subplots(math.ceil(len(guesses) / COLUMNS), COLUMNS, squeeze=False)
    for axes, guess in zip(grid.flat, guesses, strict=True):
        axes.axis("off")
        right = guess.guess == guess.label
        axes.imshow(guess.image, interpolation="bicubic")
        axes.set_title(
            f"✓ {guess.guess}\n{guess.confidence:.0%}"
            if right
            else f"✗ {guess.guess}\n{guess.confidence:.0%}, is {guess.label}",
            color=RIGHT if right else WRONG,
            fontsize=11,
        )


def _draw_curves(figure: Any, run: Run) -> None:
    windows = [window for epoch in run.epochs for window in epoch.windows]
    times_s = list(accumulate(window.seconds for window in windows))
    epoch_ends_s = list(accumulate(sum(window.seconds for window in epoch.windows) for epoch in run.epochs))
    rates = [samples_per_s([window]) for window in windows]
    waits = [100 * waiting_share([window]) for window in windows]
    scores = [100 * epoch.accuracy for epoch in run.epochs]

    throughput, waiting, accuracy = figure.subplots(3, 1, sharex=True)
    _curve(throughput, times_s, rates, f"Throughput: {samples_per_s(windows):,.0f} samples/s", "samples/s")
    throughput.set_ylim(0, 1.15 * max(rates))
    _curve(waiting, times_s, waits, f"Waiting for data: {waiting_share(windows):.1%} of the time", "% of the time")
    waiting.set_ylim(0, 100)
    _curve(accuracy, epoch_ends_s, scores, f"Validation accuracy: {scores[-1]:.1f}%", "% right", marker="o")
    accuracy.set_ylim(0, 105)
    accuracy.set_xlim(0, times_s[-1])
    accuracy.set_xlabel("training time (s)", fontsize=11, color=TEXT)


def _curve(axes: Any, times_s: list[float], values: list[float], title: str, unit: str, marker: str = "") -> None:
    axes.plot(times_s, values, color=LINE, linewidth=2, marker=marker, markersize=5, clip_on=False)
    axes.fill_between(times_s, values, color=LINE, alpha=0.12, linewidth=0)
    axes.set_title(title, loc="left", fontsize=13, color=TEXT)
    axes.set_ylabel(unit, fontsize=11, color=TEXT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
