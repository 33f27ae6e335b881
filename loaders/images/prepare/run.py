"""`loaders prepare` in the terminal: a progress bar, then a summary."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.prepare.folders import choose_method, prepare_folder
from loaders.images.prepare.outcome import Summary
from loaders.system.limits import whole_cores

_NAMED = 20  # files, at most


def run_prepare(
    console: Console, source: Path, target: Path, quality: int | None, max_side: int | None, workers: int | None
) -> int:
    """Prepare a folder and print what was done.

    Returns:
        The exit status: 1 if files are missing, or if files of an earlier run no longer have a source; else 0.

    Raises:
        DatasetError, MissingExtraError: the folder could not be prepared.
    """
    method = choose_method(quality, max_side)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Preparing", total=None)
        try:
            summary = prepare_folder(
                source,
                target,
                method,
                workers or whole_cores(),
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        except OSError as error:  # of a folder; files that cannot be read or written are in the summary
            raise DatasetError(str(error)) from error
    for line in _lines(summary):
        console.print(line)
    return 1 if summary.failed or summary.stale else 0


def _lines(summary: Summary) -> list[str]:
    before, after = summary.nbytes
    earlier = f", {summary.as_before:,} of them from an earlier run" if summary.as_before else ""
    lines = [f"{summary.prepared:,} JPEGs have restart markers{earlier}."]
    if before:
        lines.append(f"This run's JPEGs: {decimal(before)} before, {decimal(after)} now ({after / before - 1:+.1%}).")
    if summary.copied:
        earlier = f", {summary.copied_before:,} of them from an earlier run" if summary.copied_before else ""
        lines.append(f"{summary.copied:,} other files copied{earlier}.")
    for files, what in ((summary.left, "JPEGs copied unchanged"), (summary.failed, "files are missing")):
        if files:
            lines.append(f"{len(files):,} {what}:")
            lines += [f"  {printable(name)}: {why}" for name, why in sorted(files)[:_NAMED]]
        if len(files) > _NAMED:
            lines.append(f"  and {len(files) - _NAMED:,} more")
    if summary.round_trips:
        lines.append(
            f"{len(summary.round_trips):,} links lead to a folder that contains them, or to the target, and are "
            f"left out: {_named(summary.round_trips)}"
        )
    if summary.stale:
        lines.append(
            f"{len(summary.stale):,} files of an earlier run no longer have a source and would still be read: delete "
            f"them: {_named(summary.stale)}"
        )
    return lines


def _named(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
