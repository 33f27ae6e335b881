"""Tables of measurements, for a terminal or as plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from loaders.benchmark.spread import Spread

HEADER = ("", "samples/s", "GB/s", "first batch", "epoch turn", "cores", "memory")


class Measured(Protocol):
    """What a row shows of a `Measurement`."""

    @property
    def name(self) -> str:
        """Of what was measured."""

    @property
    def samples_per_s(self) -> Spread:
        """Throughput after the first batch."""

    @property
    def gb_per_s(self) -> Spread:
        """The same in bytes of batches."""

    @property
    def first_batch(self) -> Spread:
        """Seconds to the first batch."""

    @property
    def turn_s(self) -> Spread | None:
        """Seconds from one epoch to the next; None if there was only one."""

    @property
    def cpu_cores(self) -> Spread:
        """Cores in use, of all processes."""

    @property
    def memory_nbytes(self) -> int | None:
        """Memory of all processes; None where it cannot be read."""


def rows(measurements: Sequence[Measured], ratios: Mapping[str, Spread] | None = None) -> list[list[str]]:
    """The cells of the table, header first; the ratios, by name, form a last column."""
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


def plain_table(measurements: Sequence[Measured], ratios: Mapping[str, Spread] | None = None) -> str:
    """Aligned columns without a frame: for pipes and files."""
    cells = rows(measurements, ratios)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in cells)


def terminal_table(measurements: Sequence[Measured], ratios: Mapping[str, Spread] | None = None) -> Any:
    """The same for a terminal, as a `rich` table."""
    from rich.table import Table

    header, *lines = rows(measurements, ratios)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(header):
        # On two lines, so that the table fits into 80 columns.
        table.add_column(title.replace(" ", "\n"), justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _spread(spread: Spread, form: str) -> str:
    """`5,421 ±2%`: half the interquartile range, or a single value if all are the same."""
    if spread.low == spread.high:
        return f"{spread.median:{form}}"
    return f"{spread.median:{form}} ±{(spread.high - spread.low) / 2 / spread.median:.0%}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"
