"""A `jpegtran` for tests: it knows a few files, and what the real program would make of them.

OpenCV encodes the same picture to the same coefficients with and without restart markers, so such a pair stands for a
lossless transformation.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

SCRIPT = """#!{python} -S
import hashlib, pathlib, sys, time
data = sys.stdin.buffer.read()
arguments = sys.argv[1:]
assert arguments[:4] == ["-copy", "all", "-optimize", "-restart"] and arguments[4].endswith("B"), arguments
time.sleep({takes_s})
known = pathlib.Path({folder!r}, hashlib.sha256(data).hexdigest() + "-" + arguments[4])
if not known.exists():
    sys.exit("Corrupt JPEG data: 3 extraneous bytes")
sys.stdout.buffer.write(known.read_bytes())
"""


class FakeJpegtran:
    """The program in `folder`; `path` is the PATH with that folder first."""

    def __init__(self, folder: Path, takes_s: float = 0.0) -> None:
        self.folder = folder
        program = folder / "jpegtran"
        program.write_text(SCRIPT.format(python=sys.executable, folder=str(folder), takes_s=takes_s))
        program.chmod(0o755)
        self.path = f"{folder}{os.pathsep}{os.environ['PATH']}"

    def knows(self, before: bytes, interval: int, after: bytes) -> None:
        """Let it turn `before` into `after` when called with this interval."""
        (self.folder / f"{hashlib.sha256(before).hexdigest()}-{interval}B").write_bytes(after)
