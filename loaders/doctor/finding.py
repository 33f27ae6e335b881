"""What one check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fine", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked, in a few words.
        severity: "fine"; "warning": it works, but costs speed or memory; "problem": it fails, or gives wrong data.
        what: what was found, with its numbers.
        remedy: what to do; empty if nothing needs to be done.
    """

    check: str
    severity: Severity
    what: str
    remedy: str = ""


def exit_status(findings: Iterable[Finding]) -> int:
    """For scripts: 1 if there is a problem, else 0, even with warnings."""
    return int(any(finding.severity == "problem" for finding in findings))
