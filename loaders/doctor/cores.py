"""How many cores this process may use: those of the machine, of its affinity, and of its cgroup's quota."""

from __future__ import annotations

import os
from pathlib import Path


def affinity_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_cores(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the tightest cgroup above this process allows; None without a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    quotas = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup/cpu"
        else:
            continue
        folder = top / path.lstrip("/")
        for level in (folder, *folder.parents):
            quota = _quota_of(level)
            if quota is not None:
                quotas.append(quota)
            if level == top:
                break
    return min(quotas, default=None)


def usable_cores() -> int:
    """Whole cores that are worth a worker: of the affinity, and no more than the quota, at least one."""
    quota = quota_cores()
    return affinity_cores() if quota is None else max(1, min(affinity_cores(), int(quota)))


def _quota_of(level: Path) -> float | None:
    try:
        if (level / "cpu.max").exists():
            quota, period = (level / "cpu.max").read_text().split()
        else:
            quota = (level / "cpu.cfs_quota_us").read_text().strip()
            period = (level / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None  # "max", or a level without the controller
