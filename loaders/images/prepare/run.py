"""`loaders prepare` in the terminal: a bar while it works, then what it has done."""

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
        The status to exit with: 1 if files are missing, or of an earlier run and without a source.

    Raises:
        DatasetError, MissingExtraError: nothing was done, and why.
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
        except OSError as error:  # of a folder; files that cannot be read or written are listed
            raise DatasetError(str(error)) from error
    for line in _lines(summary):
        console.print(line)
    return 1 if summary.failed or summary.stale else 0


def _lines(summary: Summary) -> list[str]:
    before, after = summary.nbytes
    earlier = f", {summary.as_before:,} of them by an earlier run" if summary.as_before else ""
    lines = [f"{summary.prepared:,} JPEGs have restart markers{earlier}."]
    if before:
        lines.append(f"Those of this run: {decimal(before)} before, {decimal(after)} now ({after / before - 1:+.1%}).")
    if summary.copied:
        earlier = f", {summary.copied_before:,} of them by an earlier run" if summary.copied_before else ""
        lines.append(f"{summary.copied:,} other files copied{earlier}.")
    for files, what in ((summary.left, "JPEGs copied as they are"), (summary.failed, "files are missing")):
        if files:
            lines.append(f"{len(files):,} {what}:")
            lines += [f"  {printable(name)}: {why}" for name, why in sorted(files)[:_NAMED]]
        if len(files) > _NAMED:
            lines.append(f"  and {len(files) - _NAMED:,} more")
    if summary.round_trips:
        lines.append(
            f"{len(summary.round_trips):,} links lead to a folder that they lie in, or to the prepared one, and are "
            f"left out: {_named(summary.round_trips)}"
        )
    if summary.stale:
        lines.append(
            f"{len(summary.stale):,} files of an earlier run have no source any more and would still be read: delete "
            f"them: {_named(summary.stale)}"
        )
    return lines


def _named(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
