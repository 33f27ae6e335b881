"""What a training loop waits for besides samples: slow stores, starting workers, epoch turns, loaders without workers.

`python -m benchmarks.waiting`. Each figure in a fresh process, our loader and torch's in alternating order.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import keep, machine, machine_line, ratios, rounds, run_fresh, spread, table, write_section
from benchmarks.scenarios import loader_of

PEERS = ["ours", "torch_loader"]
SLOW = {f"{workers} workers, samples of {ms} ms": (workers, ms) for workers, ms in ((16, 20), (64, 20), (16, 5))}
STARTS = ("fork", "forkserver", "spawn")
SIZES = (1, 64)


class Waits:
    """Samples of a few bytes that come `seconds` after they were asked for, as from a store that is far away."""

    def __init__(self, length: int, seconds: float) -> None:
        self.length = length
        self.seconds = seconds

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if self.seconds:
            time.sleep(self.seconds)
        return np.full(16, index, np.int64)


def slow(peer: str, workers: int, ms: float, seconds: float = 4.0, batch_size: int = 64) -> dict[str, float]:
    """The share of the rate of workers that do nothing but wait; the consumer's CPU time per batch."""
    per_second = workers / (ms / 1e3)
    # torch's workers make a batch each, all at about the same time: whole rounds of batches are measured.
    warm_up, counted = 2 * workers, workers * max(1, round(seconds * 1e3 / (ms * batch_size)))
    length = batch_size * (warm_up + counted + 2 * workers)
    loader = loader_of(peer, Waits(length, ms / 1e3), batch_size=batch_size, num_workers=workers)
    gc.freeze()  # else Python looks for garbage in all that torch has imported, once in a while
    began, elapsed, cpu = 0.0, 0.0, 0.0
    for number, _ in enumerate(loader, start=1):
        if number == warm_up:
            began, cpu = time.perf_counter(), time.process_time()
        if number == warm_up + counted:  # behind these are others: no worker runs out of work
            elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
            break  # which ends the workers
    return {"share": counted * batch_size / elapsed / per_second, "cpu_ms": cpu / counted * 1e3}


def start(peer: str, method: str, workers: int = 2) -> dict[str, float]:
    """Milliseconds from constructing a loader to its first batch of 64 x 1 ms; the first one of the process, and later.

    A forkserver is one process for the whole program: whoever comes first pays for what it imports.
    """
    times = []
    for _ in range(4):
        began = time.perf_counter()
        dataset = Waits(256, 0.001)
        loader = loader_of(peer, dataset, batch_size=64, num_workers=workers, multiprocessing_context=method)
        iterator = iter(loader)
        next(iterator)
        times.append((time.perf_counter() - began) * 1e3)
        del iterator, loader
    return {"first_ms": times[0], "later_ms": statistics.median(times[1:])}


def turn(peer: str, workers: int = 2, step_s: float = 0.05, epochs: int = 6) -> dict[str, float]:
    """Milliseconds that a loop of 50 ms a step waits from one epoch to the next, and from one batch to the next."""
    arguments: dict[str, Any] = {"seed": 1} if peer == "ours" else {}
    loader = loader_of(
        peer, Waits(256, 0.001), batch_size=16, shuffle=True, num_workers=workers, persistent_workers=True, **arguments
    )
    turns, waits = [], []
    for epoch in range(epochs):
        asked = time.perf_counter()
        for number, _ in enumerate(loader):
            waited = (time.perf_counter() - asked) * 1e3
            if number > 0:
                waits.append(waited)
            elif epoch > 0:
                turns.append(waited)
            time.sleep(step_s)
            asked = time.perf_counter()
    return {"turn_ms": statistics.median(turns), "wait_ms": statistics.median(waits)}


def inline(peer: str, batch_size: int, seconds: float = 2.0) -> dict[str, float]:
    """Microseconds per batch of a loader without workers, over tiny samples."""
    loader = loader_of(peer, Waits(batch_size * 2_000, 0.0), batch_size=batch_size)
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        for number, _ in enumerate(loader, start=1):
            if number == 400:
                break
        times.append((time.perf_counter() - began) / 400 * 1e6)
    return {"batch_us": min(times)}


def main(count: int = 3) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def of(function: str, **arguments: Any) -> dict[str, list[dict[str, float]]]:
        return rounds(PEERS, partial(_run, function, arguments), count)

    kept = {
        **{f"slow: {name}": of("slow", workers=workers, ms=ms) for name, (workers, ms) in SLOW.items()},
        **{f"start: {method}": of("start", method=method) for method in STARTS},
        "turn": of("turn"),
        **{f"inline: {size}": of("inline", batch_size=size) for size in SIZES},
    }
    keep("waiting", kept)
    text = section({"machine": machine(), **kept})
    write_section("waiting", text)
    print(text)


def _run(function: str, arguments: Mapping[str, Any], peer: str) -> dict[str, float]:
    return run_fresh("benchmarks.waiting", function, peer=peer, **arguments)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    rows = []
    for name in SLOW:
        rows.append(_row(f"{name}: share of the ideal rate", content[f"slow: {name}"], "share", 3))
        rows.append(_row(f"{name}: consumer's CPU per batch of 64, ms", content[f"slow: {name}"], "cpu_ms", 2))
    for method in STARTS:
        figures = content[f"start: {method}"]
        rows.append(_row(f"first batch, {method}: the first loader of a process, ms", figures, "first_ms", 0))
        rows.append(_row(f"first batch, {method}: later loaders, ms", figures, "later_ms", 0))
    rows.append(_row("from one epoch to the next, persistent workers, ms", content["turn"], "turn_ms", 2))
    rows.append(_row("from one batch to the next in that loop, ms", content["turn"], "wait_ms", 2))
    rows += [_row(f"no workers, batch of {size}: µs", content[f"inline: {size}"], "batch_us", 0) for size in SIZES]
    return (
        "## Waiting\n\nWhat a loop waits for besides samples: medians of fresh processes, ratios within rounds (least "
        f"to most). `python -m benchmarks.waiting`. {machine_line(content['machine'])}\n\n"
        + table(["what", "ours", "torch's loader", "ours : torch's"], rows)
    )


def _row(name: str, figures: Mapping[str, list[dict[str, float]]], figure: str, digits: int) -> list[str]:
    medians = [f"{statistics.median([each[figure] for each in figures[peer]]):.{digits}f}" for peer in PEERS]
    return [name, *medians, spread(ratios(figures, *PEERS, figure))]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
