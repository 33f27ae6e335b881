"""Datasets that crash, hang, raise or otherwise harm their worker. No torch here, so spawned workers start fast."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from loaders.randomness.streams import sample_rng


class Numbers:
    """Sample `i` is {"x": float32 (3,) full of i, "i": i}. Before a sample in `at` is read, `fault(i)` is called.

    Args:
        once: a folder in which each faulty sample leaves a file the first time; from then on it is good.
    """

    def __init__(
        self,
        length: int,
        fault: Callable[[int], Any] | None = None,
        at: Collection[int] = (),
        once: Path | None = None,
    ) -> None:
        self.length = length
        self.fault = fault
        self.at = frozenset(at)
        self.once = once

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.fault is not None and index in self.at and (self.once is None or is_first(self.once / str(index))):
            self.fault(index)
        return {"x": np.full(3, index, np.float32), "i": index}

    def describe(self, index: int) -> str:
        return f"numbers/{index}.png"


class ReadAtOnce(Numbers):
    """`Numbers`, read a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def is_first(mark: Path) -> bool:
    """True for the first caller, of all processes, with this mark."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# -- ways to end a process


def sigkill(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sigterm(index: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def sigstop(index: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def crash() -> None:
    faulthandler.disable()  # pytest's would print a long report
    ctypes.string_at(0)


def segfault(index: int) -> None:
    crash()


def abort(index: int) -> None:
    faulthandler.disable()
    os.abort()


def exit_quietly(index: int) -> None:
    os._exit(0)


def exit_with_status(index: int) -> None:
    os._exit(3)


def sys_exit(index: int) -> None:
    sys.exit(4)


class _ExitsWhenCollected:
    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        os._exit(9)


def exit_in_gc(index: int) -> None:
    _ExitsWhenCollected()
    gc.collect()


def close_descriptors(index: int) -> None:
    os.closerange(3, 256)


# -- exceptions


class Unlucky(Exception):
    """A user's exception."""


class TakesTwo(Exception):
    """Can be pickled but not rebuilt: the usual mistake."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(f"{what} ({code})")


class Unpicklable(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("this exception cannot be pickled")


class RebuiltOnlyAtHome(Exception):
    """Can be rebuilt in the worker, but raises when rebuilt in the consumer."""

    def __reduce__(self) -> Any:
        return _only_in, (os.getpid(),)


def _only_in(pid: int) -> Any:
    if os.getpid() != pid:
        raise RuntimeError("rebuilt in the wrong process")
    return RebuiltOnlyAtHome("bad luck")


def unlucky(index: int) -> None:
    raise Unlucky(f"bad luck with {index}")


def takes_two(index: int) -> None:
    raise TakesTwo(7, "bad luck")


def unpicklable(index: int) -> None:
    raise Unpicklable("bad luck")


def rebuilt_only_at_home(index: int) -> None:
    raise RebuiltOnlyAtHome("bad luck")


def memory_error(index: int) -> None:
    raise MemoryError("no room for sample")


def recursion_error(index: int) -> None:
    recursion_error(index)


def keyboard_interrupt(index: int) -> None:
    raise KeyboardInterrupt


def stop_iteration(index: int) -> None:
    raise StopIteration("out of samples")


def hang(index: int) -> None:
    threading.Event().wait()


# -- samples that are hard to send


class Carries(Numbers):
    """Sample `i` is {"i": i, "value": fault(i)}; the value is a plain string where the sample is not in `at`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.fault is not None
        return {"i": index, "value": self.fault(index) if index in self.at else f"plain {index}"}


class NotHere:
    """A value that raises when the consumer unpickles it."""

    def __reduce__(self) -> Any:
        return _only_in, (os.getpid(),)


def a_lambda(index: int) -> Any:
    return lambda: index


def not_here(index: int) -> Any:
    return NotHere()


def hundred_megabytes(index: int) -> bytes:
    return bytes([index]) * 100_000_000


def eight_megabytes(index: int) -> bytes:
    return bytes([index]) * 8_000_000


# -- harmless, but busy


def prints(index: int) -> None:
    print("x" * 10_000, file=sys.stderr)
    print("x" * 10_000)


def forks(index: int) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17


def runs_a_program(index: int) -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def leave_a_child() -> None:
    """Fork a child that holds all descriptors of the worker except the standard ones, and outlives it by far."""
    if os.fork() == 0:
        os.closerange(0, 3)
        signal.alarm(30)
        signal.pause()


def leaves_a_child_and_dies(index: int) -> None:
    leave_a_child()
    os.kill(os.getpid(), signal.SIGKILL)


# -- datasets that fail before the first sample


class ExitsAtUnpickle(Numbers):
    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(7)


class CrashesAtUnpickle(Numbers):
    def __setstate__(self, state: dict[str, Any]) -> None:
        crash()


class RaisesAtPickle(Numbers):
    def __getstate__(self) -> Any:
        raise Unlucky("bad luck at pickle")


def init_raises(worker: int) -> None:
    raise Unlucky(f"bad luck in worker_init_fn of {worker}")


def init_exits(worker: int) -> None:
    sys.exit(5)


def init_crashes(worker: int) -> None:
    crash()


# -- collate functions


def collate_to_dict(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A custom collate_fn, NumPy only."""
    return {"x": np.stack([sample["x"] for sample in samples]), "i": np.array([sample["i"] for sample in samples])}


def collate_dies(samples: list[dict[str, Any]]) -> Any:
    if any(sample["i"] == 5 for sample in samples):
        crash()
    return collate_to_dict(samples)


def collate_hangs(samples: list[dict[str, Any]]) -> Any:
    if any(sample["i"] == 5 for sample in samples):
        hang(5)
    return collate_to_dict(samples)


# -- datasets for comparing every byte, and for kills at chosen moments


class Drawn:
    """Sample `i` has random numbers, a string, and arrays of varying length; reading takes about `work_s` seconds."""

    def __init__(self, length: int, work_s: float = 0.0) -> None:
        self.length = length
        self.work_s = work_s

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = sample_rng()
        until = time.perf_counter() + self.work_s
        while time.perf_counter() < until:
            pass
        return {
            "noise": rng.random(64),
            "boxes": rng.random((index % 7, 4), dtype=np.float32),
            "name": f"sample {index}",
            "index": index,
        }


class Blocks(Numbers):
    """A faulty sample leaves a file named after itself and its process in the folder, and waits to be killed."""

    def __init__(self, length: int, at: Collection[int], folder: Path) -> None:
        super().__init__(length, self._block, at)
        self.folder = folder

    def _block(self, index: int) -> None:
        (self.folder / f"{index} {os.getpid()}").touch()
        threading.Event().wait()

    def victim(self, index: int) -> int | None:
        """The process that is reading this sample, returned once; None if there is none."""
        for mark in self.folder.glob(f"{index} *"):
            mark.unlink()
            return int(mark.name.split()[1])
        return None


def collate_arrays(samples: list[dict[str, Any]]) -> list[Any]:
    """A custom collate_fn that returns arrays and strings."""
    return [np.stack([sample["noise"] for sample in samples]), [sample["name"] for sample in samples]]


class WaitsInInit:
    """A worker_init_fn in which the first `patient` processes wait to be killed."""

    def __init__(self, folder: Path, patient: int) -> None:
        self.folder = folder
        self.patient = patient

    def __call__(self, worker: int) -> None:
        for number in range(self.patient):
            if is_first(self.folder / str(number)):
                (self.folder / f"{number} tmp").write_text(str(os.getpid()))
                (self.folder / f"{number} tmp").rename(self.folder / f"in init {number}")
                threading.Event().wait()


class Shaped(Numbers):
    """Samples with a field of every kind."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["boxes"] = np.arange(index % 4 * 2, dtype=np.float32).reshape(-1, 2) + index
        sample["points"] = np.full((index % 3, 2), index, np.int64)
        sample["name"] = f"number {index}"
        sample["half"] = (index / 2, np.int16(index))
        return sample


class ShapedAtOnce(Shaped, ReadAtOnce):
    """`Shaped`, read a batch at a time."""


class KillsReaders:
    """A key that kills the first `times` processes that unpickle it, and becomes `key` in later ones."""

    def __init__(self, folder: Path, times: int, key: int) -> None:
        self.folder, self.times, self.key = folder, times, key

    def __reduce__(self) -> Any:
        return _kill_reader, (self.folder, self.times, self.key)


def _kill_reader(folder: Path, times: int, key: int) -> int:
    for number in range(times):
        if is_first(folder / str(number)):
            sigkill(key)
    return key


def eight_megabytes_and_a_child(index: int) -> bytes:
    leave_a_child()
    return eight_megabytes(index)
