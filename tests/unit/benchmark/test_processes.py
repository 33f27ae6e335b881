"""CPU time and memory of a run count its children, those that run and those that have ended."""

import mmap
import os
import subprocess
import sys

import pytest

from loaders.benchmark import processes
from loaders.benchmark.processes import cpu_s, descendants, memory_nbytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Says so when it has worked, and ends with its input.
BUSY = "sum(range(8_000_000)); print('worked', flush=True); sys.stdin.read()"


@pytest.fixture
def child():
    """A process that has worked for a while, and has a child of its own that waits."""
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()']); {BUSY}"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "worked\n"
        yield running
        running.stdin.close()


def test_children_and_their_children_are_found(child):
    found = descendants()
    assert child.pid in found
    assert len(found) >= 2
    assert os.getpid() not in found


def test_the_time_of_running_children_counts_and_stays_when_they_have_ended(child):
    own = sum(os.times()[:4])
    running = cpu_s()
    assert running > own + 0.05
    child.stdin.close()
    child.wait()
    assert cpu_s() >= running - 0.1


def test_memory_counts_children_and_shared_pages_that_nobody_has_mapped(child):
    before = memory_nbytes()
    fd = os.memfd_create("test")
    try:
        os.posix_fallocate(fd, 0, 64 << 20)
        assert 48 << 20 < memory_nbytes() - before < 256 << 20
    finally:
        os.close(fd)
    private = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = memory_nbytes()
    for page in range(0, len(private), mmap.PAGESIZE):
        private[page] = 1
    assert 48 << 20 < memory_nbytes() - before < 256 << 20
    private.close()


def test_where_nothing_is_told_there_is_no_memory_and_no_child(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert memory_nbytes() is None
    assert descendants() == []
    assert cpu_s() > 0
