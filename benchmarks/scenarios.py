"""The scenarios: each function runs in its own process and returns figures."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import KINDS, Ready
from loaders.batch.spec import BatchSpec
from loaders.benchmark.processes import descendants
from loaders.workers.messages import Job, Task
from loaders.workers.worker import Worker

# Files that do not exist: asking for one marks a moment in a log of system calls.
MARKS = ("/begin of the count", "/end of the count")


def loader_of(peer: str, dataset: Any, **arguments: Any) -> Any:
    """The loader of a peer."""
    return importlib.import_module(f"benchmarks.peers.{peer}").make(dataset, **arguments)


def transport(peer: str, shape: list[int], dtype: str, batch_size: int, batches: int, workers: int) -> dict[str, float]:
    """GB/s of ready samples through the loader; the consumer copies each batch, as a device would read it."""
    torch.set_num_threads(1)
    loader = loader_of(peer, Ready(batch_size * batches, shape, dtype), batch_size=batch_size, num_workers=workers)
    began, first_s, out, counted = time.perf_counter(), 0.0, torch.empty(0), 0
    warm_up = batches // 5
    for number, batch in enumerate(loader):
        if number == 0:
            first_s = time.perf_counter() - began
            out = torch.empty_like(batch["image"])
        out.copy_(batch["image"])
        if number == warm_up:
            began = time.perf_counter()
        counted += number > warm_up
    elapsed_s = time.perf_counter() - began
    return {"gb_per_s": counted * out.nbytes / elapsed_s / 1e9, "first_s": first_s}


def ceiling(shape: list[int], dtype: str, batch_size: int, batches: int, workers: int) -> dict[str, float]:
    """GB/s of the same copies without a loader: forked loops write samples to reused memory, the consumer copies them.

    Three slots and as few messages as possible: the limit of the machine's memory and cores, for any loader.
    """
    torch.set_num_threads(1)
    ready = Ready(1, shape, dtype).arrays
    slots = np.ndarray((3, batch_size, *shape), dtype, mmap.mmap(-1, 3 * batch_size * ready[0].nbytes))
    tasks, done = os.pipe(), os.pipe()
    pieces = 8
    bounds = [batch_size * piece // pieces for piece in range(pieces + 1)]
    for _ in range(workers):
        if os.fork() == 0:
            os.close(tasks[1])
            while task := os.read(tasks[0], 2):
                slot, piece = slots[task[0]], task[1]
                for row in range(bounds[piece], bounds[piece + 1]):
                    slot[row] = ready[row % KINDS]
                os.write(done[1], task[:1])
            os._exit(0)
    out, finished = torch.empty(slots.shape[1:], dtype=getattr(torch, dtype)), [0] * len(slots)
    began, warm_up = 0.0, batches // 5
    for number in range(-len(slots), batches):
        if number >= 0:
            slot = number % len(slots)
            while finished[slot] < pieces:
                for each in os.read(done[0], 4096):
                    finished[each] += 1
            finished[slot] = 0
            out.copy_(torch.from_numpy(slots[slot]))
        if number == warm_up:
            began = time.perf_counter()
        if number < batches - len(slots):
            os.write(tasks[1], b"".join(bytes([(number + len(slots)) % len(slots), piece]) for piece in range(pieces)))
    elapsed_s = time.perf_counter() - began
    os.close(tasks[1])
    return {"gb_per_s": (batches - 1 - warm_up) * out.nbytes / elapsed_s / 1e9}


def row_cost(shape: list[int], dtype: str, batch_size: int, repeats: int = 100) -> dict[str, float]:
    """Microseconds per sample in one process, least of many: bare copies, with the dataset's code, and in a worker."""
    dataset, rows = Ready(1, shape, dtype), range(batch_size)
    spec = BatchSpec.from_sample(dataset[0])
    blocks, end = [], 0
    for nbytes in spec.sizes(batch_size):
        blocks.append((end, nbytes))
        end += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end)
    images = spec.fields[0].values(memory, blocks[0][0], batch_size)
    labels = spec.fields[1].values(memory, blocks[1][0], batch_size)
    job = Job(dataset, "each", None, True, {}, False, batch_size, False, 2, 0, None)
    task = Task(0, list(rows), 0, 0, 0, spec, tuple(blocks))
    worker = Worker(job, 0, memory, apart=True)

    def copy() -> None:
        for row in rows:
            images[row] = dataset.arrays[row % KINDS]

    def read() -> None:
        for row in rows:
            sample = dataset[row]
            images[row], labels[row] = sample["image"], sample["label"]

    works: dict[str, Callable[[], Any]] = {
        "copy_us": copy,
        "dataset_us": read,
        "worker_us": lambda: worker.execute(task, 0, batch_size, lambda row: True),
    }
    least = dict.fromkeys(works, math.inf)
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            least[name] = min(least[name], (time.perf_counter() - began) / batch_size * 1e6)
    return least


def first_batch(peer: str, batch_size: int, workers: int) -> dict[str, float]:
    """Seconds from constructing the loader to its first batch, in a process that has already iterated one."""
    torch.set_num_threads(1)
    dataset = Ready(batch_size * 8, [224, 224, 3], "uint8")
    times = []
    for _ in range(7):
        began = time.perf_counter()
        iterator = iter(loader_of(peer, dataset, batch_size=batch_size, num_workers=workers))
        next(iterator)
        times.append(time.perf_counter() - began)
        del iterator
    return {"first_s": sorted(times[1:])[3]}


def iterate(peer: str, batch_size: int, batches: int, workers: int) -> dict[str, float]:
    """Only iterates, for tools that observe the process from outside; marks the last three quarters but for the end."""
    torch.set_num_threads(1)
    # More than are marked, so that no worker stops before the second mark.
    dataset = Ready(batch_size * (batches + 20), [224, 224, 3], "uint8")
    out = torch.empty(batch_size, 224, 224, 3, dtype=torch.uint8)
    marks = dict(zip((batches // 4, batches), MARKS, strict=True))
    for number, batch in enumerate(loader_of(peer, dataset, batch_size=batch_size, num_workers=workers), start=1):
        out.copy_(batch["image"])
        if number in marks:
            os.path.exists(marks[number])
    return {}


def memory(peer: str, shape: list[int], batch_size: int, batches: int, workers: int) -> dict[str, float]:
    """The peak bytes while iterating: shared-memory pages of the machine, and anonymous memory of all processes.

    Shared pages are counted machine-wide, because no process maps queued files. The caller subtracts a floor.
    """
    torch.set_num_threads(1)
    dataset = Ready(batch_size * batches, shape, "uint8")
    shared_before = meminfo_nbytes("Shmem")
    most_shared, most_private, over = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal most_shared, most_private
        while not over.wait(0.02):
            most_shared = max(most_shared, meminfo_nbytes("Shmem") - shared_before)
            most_private = max(most_private, smaps_nbytes("Pss_Anon"))

    watcher = threading.Thread(target=watch)
    loader = loader_of(peer, dataset, batch_size=batch_size, num_workers=workers)
    out = torch.empty(batch_size, *shape, dtype=torch.uint8)
    for number, batch in enumerate(loader):
        if number == 1:  # the workers have started: a process with threads should not be forked
            watcher.start()
        out.copy_(batch["image"])
        time.sleep(0.02)  # stands for a model: the loader prefetches as much as it can
    over.set()
    watcher.join()
    return {"shared_nbytes": most_shared, "private_nbytes": most_private}


def meminfo_nbytes(name: str) -> int:
    """Bytes of a line of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def smaps_nbytes(name: str) -> int:
    """Bytes of a line of smaps_rollup, such as "Pss", summed over this process and its descendants."""
    total = 0
    for pid in (os.getpid(), *descendants()):
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            pass  # the process has ended
    return total
