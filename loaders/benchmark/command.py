"""`loaders bench`, as the command line calls it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from loaders.benchmark import show, tables
from loaders.benchmark.comparison import compare
from loaders.benchmark.setups import Setup, setups
from loaders.errors import DatasetError
from loaders.system.limits import whole_cores


def run_bench(
    console: Console,
    target: str,
    *,
    workers: str,
    methods: str,
    vs: str,
    json_file: Path | None,
    plot_file: Path | None,
    **settings: Any,
) -> None:
    """Measure, print the table and the summary sentence, and write the requested files.

    Args:
        workers, methods, vs: as typed. Without workers, a target that is a loader is measured as it is.
        settings: passed to `compare`.

    Raises:
        DatasetError: an option or the target is invalid, or measuring failed.
        MissingExtraError: the plotting package is not installed.
    """
    counts = _numbers(workers)
    kinds = _methods(methods)
    if vs not in ("", "torch"):
        raise DatasetError(f'--vs {vs}: the one loader to compare with is "torch". Others are in benchmarks/.')
    if plot_file is not None:
        show.require_matplotlib()

    def chosen(is_loader: bool) -> Sequence[Setup]:
        wanted = counts if counts is not None else [] if is_loader and not vs else _up_to(whole_cores())
        return setups(wanted, kinds, vs == "torch", as_it_is=is_loader)

    def tell(line: str) -> None:
        if console.is_terminal:
            console.print(line, style="dim")

    found = compare(target, chosen, tell=tell, **settings)
    ratios = found.ratios()
    console.print()
    if console.is_terminal:
        console.print(tables.terminal_table(found.measurements, ratios))
    else:
        console.print(tables.plain_table(found.measurements, ratios))
    rounds = settings["rounds"]
    spread = ", ± half of what lies between the quartiles" if rounds > 1 else ""
    console.print(f"\nmedian of {rounds} process{'es' if rounds > 1 else ''}{spread}; batches of {found.batch_size}")
    for line in show.ceiling_lines(found):
        console.print(line)
    console.print(f"\n{found.sentence()}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        show.plot(found, plot_file)


def _numbers(text: str) -> list[int] | None:
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        counts = [-1]
    if any(count < 0 for count in counts):
        raise DatasetError(f"--workers {text}: expected numbers with commas between, such as 0,1,2,4.")
    return counts or None


def _methods(text: str) -> list[Literal["process", "thread"]]:
    known: dict[str, Literal["process", "thread"]] = {"process": "process", "thread": "thread"}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not set(parts) <= set(known):
        raise DatasetError(f"--methods {text}: expected process, thread, or process,thread.")
    return [known[part] for part in parts]


def _up_to(cores: int) -> list[int]:
    """0, 1, 2, 4 … and the number of cores."""
    counts, count = [0], 1
    while count < cores:
        counts.append(count)
        count *= 2
    return [*counts, cores]
