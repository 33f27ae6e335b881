"""CPU time and memory of this process and of all below it. Where there is no /proc: of this process alone, and none."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def descendants(root: int | None = None) -> list[int]:
    """The ids of all processes below this one, or below `root`, that run now."""
    found = [os.getpid() if root is None else root]
    for pid in found:  # grows while it is walked
        try:
            for task in (_PROC / str(pid) / "task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
        except OSError:
            pass  # gone in between, or a kernel that does not list children
    return found[1:]


def cpu_s() -> float:
    """Seconds of CPU that this process, its children that have ended and all that run below it have taken."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(_cpu_s_of(pid) for pid in descendants())


def pss_nbytes() -> int | None:
    """Memory of this process and all below it in bytes, each shared page counted once; None where that is not told.

    It is what `Pss` in /proc/PID/smaps_rollup adds up to. Bytes that wait in a file which nobody has mapped yet, as
    tensors on their way to torch's own loader do, belong to no process and are not in it.
    """
    total = 0
    for pid in (os.getpid(), *descendants()):
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            if pid == os.getpid():
                return None
    return total


def _cpu_s_of(pid: int) -> float:
    try:
        # The name in parentheses may hold anything; what follows the last one is numbers.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S  # utime, stime, and of its ended children
