"""The scenarios on a CUDA device: each function runs in its own process and returns figures."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import trace
from benchmarks.feeds import FEEDS, Batches
from benchmarks.photos import JpegCrops, ReadyImages
from benchmarks.resnet import resnet50
from benchmarks.scenarios import meminfo_nbytes, smaps_nbytes

_COPIES = 4  # are timed together, so that the host's time to enqueue one counts for less
_ENDLESS = 1 << 20  # batches


class Training:
    """ResNet-50 in bfloat16 and channels last, with SGD.

    Args:
        size: side of the images, in pixels.
    """

    def __init__(self, device: torch.device, batch_size: int, size: int) -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.device = device
        self.batch_size = batch_size
        self.size = size
        self._net = resnet50().to(device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(
            self._net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda"
        )

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward, update, without waiting for the device."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = functional.cross_entropy(self._net(batch["image"]), batch["label"])
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def run(self, batches: Batches, steps: int) -> None:
        """Run this many steps; the device may not have finished them."""
        for _ in range(steps):
            self.step(next(batches))

    def feed(self, name: str, data: str, workers: int, files: str) -> Batches:
        """Batches from one of `feeds.FEEDS`, of ready arrays or of JPEG files."""
        count = _ENDLESS * self.batch_size
        dataset: Any = ReadyImages(count, self.size)
        if data == "jpeg":
            dataset = JpegCrops(sorted(map(str, Path(files).glob("*.jpg"))), count, self.size)
        return FEEDS[name](dataset, self.batch_size, workers, self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def warm_up(self, steps: int) -> None:
        """Run steps on a resident batch, so that algorithms are chosen and memory is allocated."""
        with closing(self.feed("resident", "ready", 0, "")) as batches:
            self.run(batches, steps)
            self.synchronize()


def train(
    variants: list[list[Any]], batch_size: int, size: int, workers: int, files: str, device: str = "cuda"
) -> dict[str, float]:
    """Steps per second of each variant, in this order.

    Args:
        variants: [feed, data, warm-up steps, counted steps].
    """
    training = Training(torch.device(device), batch_size, size)
    training.warm_up(5)
    figures = {}
    for feed, data, warm_up, steps in variants:
        with closing(training.feed(feed, data, workers, files)) as batches:
            training.run(batches, warm_up)
            training.synchronize()
            began = time.perf_counter()
            training.run(batches, steps)
            training.synchronize()
            figures[f"{feed}, {data}"] = steps / (time.perf_counter() - began)
    return figures


def overlap(
    feeds: list[str], batch_size: int, size: int, workers: int, steps: int, repeats: int
) -> dict[str, list[float]]:
    """The share of copying that is hidden behind computing, with ready arrays, `repeats` times for each feed."""
    training = Training(torch.device("cuda"), batch_size, size)
    training.warm_up(5)
    trace.record(lambda: training.warm_up(2))  # the profiler's first use takes longer
    figures = defaultdict(list)
    for feed in itertools.chain.from_iterable([feeds] * repeats):
        with closing(training.feed(feed, "ready", workers, "")) as batches:
            training.run(batches, 10)

            def work(batches: Batches = batches) -> None:
                training.run(batches, steps)
                training.synchronize()

            figures[feed].append(trace.hidden_share(trace.record(work), lead_in=0.25))
    return figures


def h2d(shapes: list[list[int]], rounds: int, runs: int) -> dict[str, list[dict[str, float]]]:
    """GB/s to the device from a slot, from memory pinned by torch and from pageable memory, by bytes copied."""
    return {str(int(np.prod(shape))): _h2d_of(shape, rounds, runs) for shape in shapes}


def _h2d_of(shape: list[int], rounds: int, runs: int) -> list[dict[str, float]]:
    from loaders import DataLoader, transfer_time

    loader: Any = DataLoader(ReadyImages(4 * shape[0], shape[1]), shape[0], num_workers=2, pin_memory=True)
    slot = next(iter(loader))["image"]
    if list(slot.shape) != shape or not slot.is_pinned() or not _lies_in_a_slot(slot):
        raise RuntimeError(f"{tuple(slot.shape)}: the batch is not in a page-locked slot.")
    sources = {
        "slot": slot,
        "pinned": torch.empty(shape, dtype=torch.uint8, pin_memory=True).copy_(slot),
        "pageable": slot.clone(),
    }
    target = torch.empty(shape, dtype=torch.uint8, device="cuda")

    def gb_per_s(source: torch.Tensor) -> float:
        def copy() -> None:
            for _ in range(_COPIES):
                target.copy_(source, non_blocking=True)

        return transfer_time(copy, device="cuda", runs=runs, nbytes=_COPIES * slot.nbytes).gb_per_s

    figures = []
    for number in range(rounds):
        names = list(sources) if number % 2 == 0 else list(reversed(sources))
        figures.append({name: gb_per_s(sources[name]) for name in names})
    return figures


def _lies_in_a_slot(tensor: torch.Tensor) -> bool:
    from loaders.memory.registry import lease_at

    return lease_at(tensor.data_ptr()) is not None


def memory(
    feed: str, data: str, batch_size: int, size: int, workers: int, steps: int, files: str, device: str = "cuda"
) -> dict[str, float]:
    """The peak memory while training, in bytes.

    Returns:
        pss_nbytes: of this process and its workers, shared pages divided among the processes that map them. Memory
            pinned by a driver itself is not included.
        machine_nbytes: by how much the machine's available memory fell since before the loader was created, whichever
            process took it.
        device_nbytes, device_reserved_nbytes: in use by, and reserved by, torch's allocator.
    """
    training = Training(torch.device(device), batch_size, size)
    training.warm_up(3)
    is_cuda = training.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    available, pss, least, over = meminfo_nbytes("MemAvailable"), 0, 1 << 62, threading.Event()

    def look() -> None:
        nonlocal pss, least
        pss, least = max(pss, smaps_nbytes("Pss")), min(least, meminfo_nbytes("MemAvailable"))

    watcher = threading.Thread(target=lambda: _repeat(look, over))
    with closing(training.feed(feed, data, workers, files)) as batches:
        training.run(batches, 1)  # starts the workers first: a process with threads should not be forked
        watcher.start()
        training.run(batches, steps)
        training.synchronize()
        look()
        over.set()
        watcher.join()
    return {
        "pss_nbytes": pss,
        "machine_nbytes": available - least,
        "device_nbytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
        "device_reserved_nbytes": torch.cuda.max_memory_reserved() if is_cuda else 0,
    }


def _repeat(look: Callable[[], None], over: threading.Event) -> None:
    while not over.wait(0.05):
        look()
