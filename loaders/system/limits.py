"""What this process may use: cores, by affinity and cgroup quota, and memory, by the machine and its cgroups."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loaders.system.interrupts import undisturbed


class Level(NamedTuple):
    """A control group, and whether it is of version 2."""

    folder: Path
    is_unified: bool


def cgroup_levels(controller: str, root: Path = Path("/")) -> Iterator[Level]:
    """The control groups that may limit this process, its own first; none where they cannot be read.

    Args:
        controller: such as "memory", for version 1; in version 2 one tree has all controllers.
        root: where `/proc` and `/sys` are found.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers != "" and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / path.lstrip("/")
        for level in (folder, *folder.parents):
            yield Level(level, controllers == "")
            if level == top:
                break


def affinity_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the tightest cgroup above this process allows; None without a limit.

    Args:
        root: where `/proc` and `/sys` are found.
    """
    quotas = []
    for folder, is_unified in cgroup_levels("cpu", root):
        names = ["cpu.max"] if is_unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(quotas, default=None)


def usable_cores() -> float:
    """The cores that both allow, possibly a fraction: 3.5 if that is the quota."""
    quota = quota_cores()
    return float(affinity_cores()) if quota is None else min(float(affinity_cores()), quota)


def whole_cores() -> int:
    """`usable_cores`, rounded down, at least 1."""
    return max(1, int(usable_cores()))


def available_nbytes() -> int:
    """Bytes this process may still take: the machine's available memory, or its cgroup's headroom if that is less."""
    with undisturbed():  # so that a signal handler that raises leaves no file open
        limits = [_meminfo_available(), *_cgroup_headrooms()]
    return max(0, min(limits))


def _meminfo_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    except (ValueError, OSError, AttributeError):
        return 1 << 34  # unknown platform: let the reservation itself fail


def _cgroup_headrooms(root: Path = Path("/")) -> list[int]:
    """`limit - usage` of each cgroup above this process; page cache that can be dropped is not counted as usage."""
    headrooms = []
    for folder, is_unified in cgroup_levels("memory", root):
        if is_unified:
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"  # without "total" it is that of the group alone; the usage includes subgroups
        try:
            ceiling = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            headrooms.append(ceiling - used + int(stat.get(cache, 0)))
        except (OSError, ValueError):
            pass  # "max", or a level without the controller
    return headrooms
