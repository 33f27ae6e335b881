"""Renders a report: as plain text, as a page in the terminal, as a table in a notebook."""

from __future__ import annotations

import html
from typing import Any

from loaders.report.figures import Figures
from loaders.report.units import nbytes, percent, seconds, share

_SHOWN = 5  # at most so many of the slowest samples, and of the skipped ones
_MANY_WORKERS = 16

Row = tuple[str, str, str]
Section = tuple[str, list[Row]]


def heading(report: Figures) -> str:
    """The line that names the epoch, with its totals."""
    state = "done" if report.finished else "running"
    return (
        f"epoch {report.epoch}, {state}: {report.samples:,} samples in {report.batches:,} batches and "
        f"{seconds(report.window_s)}, {report.samples_per_s:,.0f} samples/s; "
        f"the first batch took {seconds(report.first_batch_s)}"
    )


def sections(report: Figures) -> list[Section]:
    """(title, rows of label, value, note)."""
    found = [("the loop", _loop(report)), ("the workers", _workers(report)), ("bytes", _bytes(report))]
    slow = [(f"sample {each.index}", seconds(each.seconds), each.source or "") for each in report.slowest[:_SHOWN]]
    skipped = [(f"sample {each.index}", "", f"{each.source or ''} {each.error}".strip()) for each in report.skipped]
    if slow:
        found.append(("slowest samples", slow))
    if skipped:
        found.append((f"skipped samples: {len(skipped):,}", skipped[:_SHOWN]))
    return [(title, rows) for title, rows in found if rows]


def _loop(report: Figures) -> list[Row]:
    whole, transfer = report.window_s, report.transfer
    parts = [("waits for data", report.wait_s), ("waits for a slot", report.slot_s)]
    parts.append(("makes batches", report.deliver_s))
    if transfer is not None:
        parts += [("starts copies", transfer.enqueue_s), ("waits for the device", transfer.wait_s)]
    parts.append(("computes", report.compute_s))
    rows = [(name, share(spent, whole), seconds(spent)) for name, spent in parts]
    if transfer is not None and transfer.copy_s is not None and transfer.compute_s is not None:
        rows.append(("device: copies a batch", seconds(transfer.copy_s), ""))
        rows.append(("device: works on it", seconds(transfer.compute_s), ""))
    return rows


def _workers(report: Figures) -> list[Row]:
    kind = {"process": "processes", "thread": "threads"}[report.worker_method]
    count = f"{report.num_workers} {kind}" if report.num_workers else "the loop's own thread"
    cpu = "" if report.cpu_share is None else f", of which computing {percent(report.cpu_share)}"
    rows = [
        (count, share(report.occupancy, 1), f"at work{cpu}"),
        ("a sample", seconds(report.service_s), "of one worker"),
    ]
    rows += [(f"  {name}", share(spent, report.service_s), seconds(spent)) for name, spent in report.stages_s.items()]
    if 1 < len(report.workers) <= _MANY_WORKERS:
        rows += [
            (f"worker {each.number}", share(each.busy_share, 1), f"{each.samples:,} samples") for each in report.workers
        ]
    rows.append(("cores", f"{report.cores_busy:.1f}", f"busy, of {report.cores:g}"))
    return rows


def _bytes(report: Figures) -> list[Row]:
    rows = [("read from files", nbytes(report.read_nbytes), "estimated")] if report.read_nbytes else []
    rows.append(("written into batches", nbytes(report.written_nbytes), "the one host write"))
    if report.overflow_nbytes:
        rows.append(("beside the slots", nbytes(report.overflow_nbytes), "copied again"))
    if (transfer := report.transfer) is not None:
        rows.append(("read by the device", nbytes(transfer.nbytes), ""))
        if transfer.again_nbytes:
            rows.append(("copied for the device", nbytes(transfer.again_nbytes), "again, on the host"))
    held = f"in {report.held_batches:,} batches; all may take {nbytes(report.ceiling_nbytes)}"
    rows.append(("held by the loop", nbytes(report.held_nbytes), held))
    if report.short:
        rows.append(("opened late", f"{report.short:,} batches", "there was no memory for them"))
    return rows


def plain_text(report: Figures, verdict: str) -> str:
    """Lines of text."""
    lines = [heading(report), verdict]
    for title, rows in sections(report):
        lines += ["", title, *(f"  {label:24}{value:>14}  {note}".rstrip() for label, value, note in rows)]
    return "\n".join(lines)


def rich_page(report: Figures, verdict: str) -> Any:
    """For `rich.print`."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for title, rows in sections(report):
        table.add_row(Text(title, style="bold"))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
    return Group(Panel(Text(verdict, style="bold")), Text(heading(report)), table)


def html_page(report: Figures, verdict: str) -> str:
    """For a notebook."""
    body = "".join(
        f'<tr><th colspan="3" style="text-align:left">{html.escape(title)}</th></tr>'
        + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        for title, rows in sections(report)
    )
    return f"<p><b>{html.escape(verdict)}</b></p><p>{html.escape(heading(report))}</p><table>{body}</table>"
