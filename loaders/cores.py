"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.cgroups import levels


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that the process may run on, by its affinity and by the quota of its cgroups: 3.5 if that is its quota.

    Args:
        root: where `/proc` and `/sys` are found.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(count), *_quotas(root)])


def _quotas(root: Path) -> list[float]:
    """Of every cgroup above this process that has one, in cores."""
    quotas = []
    for folder, is_unified in levels("cpu", root):
        names = ["cpu.max"] if is_unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return quotas
