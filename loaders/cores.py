"""How many cores this process may use: by its affinity, and by the quota of its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.cgroups import levels


def affinity_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the tightest cgroup above this process allows; None without a limit.

    Args:
        root: where `/proc` and `/sys` are found.
    """
    quotas = []
    for folder, is_unified in levels("cpu", root):
        names = ["cpu.max"] if is_unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(quotas, default=None)


def usable_cores() -> float:
    """What both allow: 3.5 if that is the quota."""
    quota = quota_cores()
    return float(affinity_cores()) if quota is None else min(float(affinity_cores()), quota)


def whole_cores() -> int:
    """Those of them that are worth a worker each, at least one."""
    return max(1, int(usable_cores()))
