"""CPU time and memory of this process and its descendants. Without /proc: CPU time of this process, no memory."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def descendants(root: int | None = None) -> list[int]:
    """The ids of all running descendants of this process, or of `root`."""
    found = [os.getpid() if root is None else root]
    for pid in found:  # grows while it is walked
        try:
            for task in (_PROC / str(pid) / "task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
        except OSError:
            pass  # ended meanwhile, or the kernel does not list children
    return found[1:]


def cpu_s() -> float:
    """CPU seconds used by this process, its children that have ended and its running descendants."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(_cpu_s_of(pid) for pid in descendants())


def memory_nbytes() -> int | None:
    """Memory of this process and its descendants in bytes, each shared page counted once; None if not reported.

    It is the sum of `Pss` in /proc/PID/smaps_rollup, except for shared memory, which is taken from the whole machine:
    bytes in a file that no process has mapped, such as tensors on their way to torch's own loader, belong to none.
    So only differences are meaningful, and other programs that use shared memory disturb them.
    """
    total = _kilobytes(_PROC / "meminfo").get("Shmem", 0)
    for pid in (os.getpid(), *descendants()):
        try:
            sizes = _kilobytes(_PROC / str(pid) / "smaps_rollup")
            total += sizes["Pss"] - sizes["Pss_Shmem"]
        except (OSError, KeyError):
            if pid == os.getpid():
                return None
    return total * 1024


def _kilobytes(file: Path) -> dict[str, int]:
    """The values of lines like `Pss:  123 kB`."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _cpu_s_of(pid: int) -> float:
    try:
        # The name in parentheses may hold anything; after the last parenthesis there are only numbers.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S  # utime, stime, and of its ended children
