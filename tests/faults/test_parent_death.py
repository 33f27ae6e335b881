"""No worker outlives its consumer, whatever the dataset is doing; but workers outlive the thread that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.saboteurs import Numbers
from support.waiting import assert_no_workers, is_gone, wait_until, worker_pids

from loaders.dataloader.loader import DataLoader

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")

# The consumer waits for batches forever. Its worker prints its id, then does what stops all of its Python threads.
CONSUMER = """
import ctypes, os, signal, sys
from support.saboteurs import Numbers

def hold_the_gil(index):
    tell()
    ctypes.PyDLL(None).sleep(1000)

def stop(index):
    tell()
    os.kill(os.getpid(), signal.SIGSTOP)

def tell():
    os.write(1, f"{os.getpid()}\\n".encode())

if __name__ == "__main__":
    from loaders import DataLoader
    fault = {"holds the GIL": hold_the_gil, "is stopped": stop}[sys.argv[2]]
    loader = DataLoader(Numbers(2, fault, at={0}), num_workers=1, multiprocessing_context=sys.argv[1])
    next(iter(loader))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("worker", ["holds the GIL", "is stopped"])
def test_a_worker_dies_with_its_consumer_even_if_it(worker: str, method: str, tmp_path: Path) -> None:
    script = tmp_path / "consumer.py"
    script.write_text(CONSUMER)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), method, worker],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        try:
            wait_until(lambda: is_gone(pid), "the worker is gone", timeout_s=10.0)
        finally:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert_no_workers()


def test_workers_outlive_the_thread_that_started_them() -> None:
    loader = DataLoader(
        Numbers(8), batch_size=2, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    seen: list[int] = []

    def epoch() -> None:
        seen.extend(int(i) for batch in loader for i in batch["i"])

    thread = threading.Thread(target=epoch)
    thread.start()
    thread.join()
    pids = set(worker_pids())
    epoch()
    assert seen == [*range(8), *range(8)]
    assert pids <= set(worker_pids())
