"""The control groups that this process is in, which may allow it less than the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Level(NamedTuple):
    """A control group, and whether it is of version 2."""

    folder: Path
    is_unified: bool


def levels(controller: str, root: Path = Path("/")) -> Iterator[Level]:
    """The groups above this process that may limit something, its own first; none where that cannot be read.

    Args:
        controller: such as "memory", for version 1; in version 2 one tree has them all.
        root: of the file system.
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
