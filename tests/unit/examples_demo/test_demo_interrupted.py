"""Ctrl-C in the middle of the demo: everything stops, and the terminal is as it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find processes that were left")

# A session of its own, with the terminal that is its stdin as the one that Ctrl-C is typed on.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def demo(folder: Path, out: Path) -> list[str]:
    return ["-m", "examples.demo", "--data", str(folder), "--out", str(out), "--epochs", "10000", "--workers", "2"]


def members(group: int) -> list[int]:
    """The processes of a process group that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = entry.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


def assert_none_left(group: int) -> None:
    # The pipe's end says that all have closed it; the last may still be on the way out.
    deadline_s = time.monotonic() + 10
    while left := members(group):
        assert time.monotonic() < deadline_s, f"processes {left} still run"


def test_ctrl_c_ends_the_demo_and_its_workers(few_photos, tmp_path):
    command = [sys.executable, *demo(few_photos, tmp_path / "demo.png")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        while not process.stdout.readline().startswith("epoch"):
            assert process.poll() is None
        assert len(members(process.pid)) >= 3
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "Stopped."
    assert "Traceback" not in output
    assert_none_left(process.pid)
    assert not (tmp_path / "demo.png").exists()


def test_ctrl_c_typed_in_a_terminal_gives_the_cursor_back(few_photos, tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, *demo(few_photos, tmp_path / "demo.png")]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
    ) as process:
        os.close(theirs)
        output = b""
        while b"epoch     2/" not in output:
            output += os.read(ours, 65536)
        os.write(ours, b"\x03")
        try:
            while piece := os.read(ours, 65536):
                output += piece
        except OSError:  # Linux: nobody holds the other end any more
            pass
    os.close(ours)
    assert process.returncode == 130
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")
    assert b"Traceback" not in output
    assert_none_left(process.pid)
