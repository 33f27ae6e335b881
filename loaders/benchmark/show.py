"""What a comparison shows besides its table: ceilings and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loaders.benchmark.comparison import Comparison
from loaders.errors import MissingExtraError

_OURS, _OTHERS, _LINE = "#1f5fa8", "#9ca3af", "#c62828"


def ceiling_lines(comparison: Comparison) -> list[str]:
    """One line for each ceiling, lowest first."""
    return [f"{each.name} allows {each.how}" for each in comparison.ceilings]


def require_matplotlib() -> None:
    """Check before anything is measured that the plot can be drawn.

    Raises:
        MissingExtraError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a plot needs matplotlib, which is not installed: pip install 'loaders[demo]'.")


def plot(comparison: Comparison, path: Path) -> None:
    """Bars of samples per second with their quartiles, and a line at the lowest ceiling; PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    shown = comparison.measurements
    figure: Any = Figure(figsize=(9, 1.6 + 0.45 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots()
    rates = [each.samples_per_s for each in shown]
    away = [[rate.median - rate.low for rate in rates], [rate.high - rate.median for rate in rates]]
    colours = [_OTHERS if setup.whose == "torch" else _OURS for setup in comparison.setups]
    axes.barh([each.name for each in shown], [rate.median for rate in rates], xerr=away, color=colours, height=0.62)
    axes.invert_yaxis()
    if comparison.ceilings:
        lowest = comparison.ceilings[0]
        axes.axvline(lowest.samples_per_s.median, color=_LINE, linewidth=1.5)
        axes.set_title(f"line: what {lowest.name} allows", loc="right", fontsize=10, color=_LINE)
    axes.set_xlim(0)
    axes.set_xlabel(f"samples/s, batches of {comparison.batch_size}; median and quartiles")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
