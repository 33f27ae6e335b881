"""Workers that fail to start: reported at once and briefly, without a hang or a leak."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path
from typing import Any

import pytest
from support import inside, saboteurs
from support.saboteurs import Numbers
from support.waiting import assert_no_workers

from loaders.dataloader.loader import DataLoader
from loaders.errors import WorkerLostError, WorkerTimeoutError
from loaders.workers import launching, supervisor

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert_no_workers()


def numbers_of(loader: Any) -> list[int]:
    return [int(i) for batch in loader for i in batch["i"]]


def run(script: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *script],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )


# -- a job that no worker can unpickle

NOTEBOOK = """
from support.saboteurs import Numbers
from loaders import DataLoader

class Mine(Numbers):
    pass

try:
    next(iter(DataLoader(Mine(8), batch_size=2, num_workers=4, multiprocessing_context={method!r})))
except Exception as error:
    print(type(error).__name__, error)
    print(type(error.__cause__).__name__)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_class_of_a_notebook_that_workers_cannot_import_is_reported_once_and_named(method: str) -> None:
    done = run(["-c", NOTEBOOK.format(method=method)])
    assert done.stdout.startswith("WorkerLostError worker processes cannot unpickle the dataset")
    assert "Can't get attribute 'Mine' on <module '__main__'" in done.stdout
    assert "`__main__.Mine` is defined there" in done.stdout
    assert "notebook" in done.stdout
    assert done.stdout.endswith("AttributeError\n")
    assert done.stderr == ""


SCRIPT = """
from support.saboteurs import Numbers
from loaders import DataLoader

if __name__ == "__main__":
    class Mine(Numbers):
        pass

    try:
        next(iter(DataLoader(Mine(8), batch_size=2, num_workers=1, multiprocessing_context="spawn")))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_class_inside_the_main_program_of_a_script_is_reported_with_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run([str(script)])
    assert "`__main__.Mine`" in done.stdout
    assert f"imports `__main__` ({script})" in done.stdout
    assert "define classes at module level" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("dataset", [saboteurs.ExitsAtUnpickle, saboteurs.CrashesAtUnpickle])
def test_a_worker_that_ends_before_it_has_read_its_dataset_is_not_started_again(
    dataset: type[Numbers], capfd: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(dataset(8), batch_size=2, num_workers=1, multiprocessing_context="forkserver")
    iterator = iter(loader)
    engine = inside.engine_of(iterator)
    with pytest.raises(WorkerLostError, match=rf"cannot be kept alive.*\n.*`support.saboteurs.{dataset.__name__}`"):
        next(iterator)
    assert engine._supervisor._serial == 1


# -- starts that fail


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_process_that_cannot_be_forked_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    counts = []
    for _ in range(3):
        loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, multiprocessing_context="fork")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", refuse)
            with pytest.raises(BlockingIOError):
                iter(loader)
        counts.append(descriptors())
        del loader
    assert len(set(counts)) == 1


@pytest.mark.parametrize("calls", range(6))
def test_a_start_without_descriptors_leaves_none(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its pipes cannot be opened."""
    left, real = [calls], os.pipe

    def pipe() -> tuple[int, int]:
        if left[0] == 0:
            raise OSError(24, "Too many open files")
        left[0] -= 1
        return real()

    counts = []
    for _ in range(2):
        loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, multiprocessing_context="fork")
        with monkeypatch.context() as patch:
            left[0] = calls
            patch.setattr(os, "pipe", pipe)
            try:
                iter(loader)
            except OSError:
                pass
        del loader
        assert_no_workers()
        counts.append(descriptors())
    assert len(set(counts)) == 1


def test_a_server_that_is_killed_while_it_forks_a_worker_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, killed = forkserver.connect_to_new_process, []

    def connect_and_kill(fds: Any) -> Any:
        if killed:
            return connect(fds)
        forkserver.ensure_running()
        killed.append(forkserver._forkserver._forkserver_pid)
        os.kill(killed[0], signal.SIGSTOP)  # so that it does not answer
        answer = connect(fds)
        os.kill(killed[0], signal.SIGKILL)
        return answer

    monkeypatch.setattr(popen_forkserver.forkserver, "connect_to_new_process", connect_and_kill)
    loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, multiprocessing_context="forkserver")
    assert numbers_of(loader) == list(range(8))
    assert killed


class RaisesEOF(Numbers):
    def __reduce__(self) -> Any:
        raise EOFError("of the user's file")


def test_an_eof_error_in_the_users_pickling_is_raised_as_it_is() -> None:
    loader = DataLoader(RaisesEOF(8), batch_size=2, num_workers=2, multiprocessing_context="spawn")
    with pytest.raises(EOFError, match="of the user's file"):
        iter(loader)


def test_a_worker_that_is_stopped_before_it_reads_its_dataset_runs_into_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launch_and_stop(process: Any, method: str) -> None:
        launching.launch(process, method)
        os.kill(process.pid, signal.SIGSTOP)

    monkeypatch.setattr(supervisor, "launch", launch_and_stop)
    dataset = Numbers(8)
    dataset.ballast = bytes(8_000_000)  # type: ignore[attr-defined]
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="spawn", timeout=0.5)
    with pytest.raises(WorkerTimeoutError):
        next(iter(loader))


def test_a_large_dataset_arrives_although_its_workers_read_in_pieces() -> None:
    dataset = Numbers(8)
    dataset.ballast = bytes(30_000_000)  # type: ignore[attr-defined]
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="forkserver")
    assert numbers_of(loader) == list(range(8))


# -- SIGPIPE

SIGPIPE = """
import os, signal
from support import inside
from support.saboteurs import Numbers
from support.waiting import is_gone, wait_until
from loaders import DataLoader
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
batches = iter(DataLoader(Numbers(400), batch_size=4, num_workers=2, multiprocessing_context="fork"))
seen = []
for batch in batches:
    seen += batch["i"].tolist()
    if len(seen) % 100 == 0:
        # One of them is the spare, which is promoted before its death is noticed.
        pids = [worker.process.pid for worker in inside.processes_of(batches)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, pids)), "all have died")
assert seen == list(range(400))
"""


def test_a_program_that_sigpipe_would_end_survives_the_death_of_workers_and_spares() -> None:
    done = run(["-c", SIGPIPE])
    assert (done.returncode, done.stderr) == (0, "")


def test_launching_leaves_the_signal_mask_and_pending_signals_as_they_were() -> None:
    context: Any = multiprocessing.get_context("fork")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        signal.raise_signal(signal.SIGPIPE)
        process = context.Process(target=int)
        launching.launch(process, "fork")
        process.join()
        assert signal.SIGPIPE in signal.sigpending()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGPIPE}
    finally:
        signal.sigwait({signal.SIGPIPE})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
