"""Tables of measurements, for a terminal or as plain lines, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loaders.benchmark.measurement import Measurement, Spread
from loaders.errors import MissingExtraError

if TYPE_CHECKING:
    from loaders.benchmark.comparison import Comparison

HEADER = ("", "samples/s", "GB/s", "first batch", "epoch turn", "cores", "memory")
_OURS, _OTHERS, _LINE = "#1f5fa8", "#9ca3af", "#c62828"


def rows(measurements: Sequence[Measurement], ratios: Mapping[str, Spread] | None = None) -> list[list[str]]:
    """The cells of the table, its header first; the ratios, by name, make a last column."""
    table = [[*HEADER, "torch's times"] if ratios else list(HEADER)]
    for each in measurements:
        turn, memory = each.turn_s, each.memory_nbytes
        cells = [
            each.name,
            _spread(each.samples_per_s, ",.0f"),
            f"{each.gb_per_s.median:.2f}",
            _seconds(each.first_batch.median),
            _seconds(turn.median) if turn is not None else "",
            f"{each.cpu_cores.median:.1f}",
            f"{memory / 1e6:,.0f} MB" if memory is not None else "",
        ]
        if ratios:
            cells.append(_spread(ratios[each.name], ".2f") if each.name in ratios else "")
        table.append(cells)
    return table


def plain_table(measurements: Sequence[Measurement], ratios: Mapping[str, Spread] | None = None) -> str:
    """Columns that line up, without a frame: for pipes and files."""
    cells = rows(measurements, ratios)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in cells)


def terminal_table(measurements: Sequence[Measurement], ratios: Mapping[str, Spread] | None = None) -> Any:
    """The same for a terminal, a `rich` table."""
    from rich.table import Table

    header, *lines = rows(measurements, ratios)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(header):
        # In two lines, so that the table fits into 80 columns.
        table.add_column(title.replace(" ", "\n"), justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def ceiling_lines(comparison: Comparison) -> list[str]:
    """One line for each ceiling, the lowest first."""
    return [f"{each.name} allows {each.how}" for each in comparison.ceilings]


def require_matplotlib() -> None:
    """Say that the plot needs it, before anything is measured.

    Raises:
        MissingExtraError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a plot needs matplotlib, which is not installed: pip install 'loaders[demo]'.")


def plot(comparison: Comparison, path: Path) -> None:
    """Bars of samples per second with their quartiles, and a line where the lowest ceiling is; PNG, SVG or PDF."""
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


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _spread(spread: Spread, form: str) -> str:
    """`5,421 ±2%`: half of what lies between the quartiles, or the one value where all are the same."""
    if spread.low == spread.high:
        return f"{spread.median:{form}}"
    return f"{spread.median:{form}} ±{(spread.high - spread.low) / 2 / spread.median:.0%}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"
