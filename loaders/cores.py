"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


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
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        folder = top / path.lstrip("/")
        for level in (folder, *folder.parents):
            try:
                quota, period = " ".join((level / name).read_text(encoding="ascii") for name in names).split()
                if int(quota) > 0:
                    quotas.append(int(quota) / int(period))
            except (OSError, ValueError):  # no such file, or "max"
                pass
            if level == top:
                break
    return quotas
