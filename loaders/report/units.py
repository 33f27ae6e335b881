"""Numbers formatted for people."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share, rounded."""
    return f"{100 * share:.0f} %"


def share(part: float, whole: float) -> str:
    """A share in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def seconds(value: float) -> str:
    """A time with its unit."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def nbytes(value: float) -> str:
    """Bytes with their unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:.0f} B"
