"""`loaders doctor`, as the command line calls it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from loaders.doctor.examine import examine_dataset, examine_machine
from loaders.doctor.finding import Finding, exit_status

_STYLES = {"fine": "green", "warning": "yellow", "problem": "bold red"}
_SIGNS = {"fine": "✓", "warning": "!", "problem": "✗"}


def run_doctor(
    console: Console, target: str | None, *, samples: int, batch_size: int, crop: int, spawn: bool, as_json: bool
) -> int:
    """Run the checks, print the findings, and return the exit status.

    Raises:
        DatasetError: the target is invalid.
    """
    made: Any = None
    if target is not None:
        from loaders.benchmark.target import load_target

        made = load_target(target, crop)  # before the machine checks, so that a mistyped target is reported at once
    parts = {"machine": examine_machine()}
    if target is not None:
        parts["dataset"] = examine_dataset(made, count=samples, batch_size=batch_size, spawn=spawn)
    everything = [finding for findings in parts.values() for finding in findings]
    if as_json:
        kept = {name: [asdict(finding) for finding in findings] for name, findings in parts.items()}
        console.out(json.dumps({**kept, "exit_status": exit_status(everything)}, indent=1), highlight=False)
        return exit_status(everything)
    for name, findings in parts.items():
        console.print(target if name == "dataset" else "This machine", style="bold")
        _show(console, findings)
        console.print()
    counts = {kind: sum(finding.severity == kind for finding in everything) for kind in ("problem", "warning")}
    console.print(
        ", ".join(f"{count or 'no'} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()) + "."
    )
    return exit_status(everything)


def _show(console: Console, findings: Sequence[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        sign = _SIGNS[finding.severity]
        console.print(f"  {sign} {finding.check:{width}}  {finding.what}", style=_STYLES[finding.severity])
        if finding.remedy:
            console.print(f"    {'':{width}}  → {finding.remedy}")
