"""The transport of batches from workers to the consumer: our loader against torch's. `python -m benchmarks.delivery`.

Throughput of ready samples, first batch, system calls (where strace is installed), memory.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    HERE,
    keep,
    machine,
    machine_line,
    ratios,
    rounds,
    run_fresh,
    spread,
    table,
    write_section,
)
from benchmarks.scenarios import MARKS

PEERS = ["ours", "torch_loader"]
TRANSPORT = {
    "224 x 224 x 3 uint8, batch 256": {"shape": [224, 224, 3], "dtype": "uint8", "batch_size": 256, "batches": 200},
    "512 x 512 x 3 float32, batch 32": {"shape": [512, 512, 3], "dtype": "float32", "batch_size": 32, "batches": 100},
}
CALLS = (64, 256)  # batch sizes whose system calls are counted
GOALS: dict[str | int, str] = {
    "224 x 224 x 3 uint8, batch 256": "≥ 8",
    "512 x 512 x 3 float32, batch 32": "≥ 6",
    "first": "≤ 0.5",
    64: "≤ 0.33",
    256: "≤ 0.5",
    "memory": "≤ 0.4",
}


def main(count: int = 5) -> None:
    kept: dict[str, Any] = {
        name: rounds([*PEERS, "ceiling"], partial(_transport, arguments), count)
        for name, arguments in TRANSPORT.items()
    }
    for name, about in TRANSPORT.items():
        of_one = {key: about[key] for key in ("shape", "dtype", "batch_size")}
        kept.setdefault("sample", {})[name] = run_fresh("benchmarks.scenarios", "row_cost", **of_one)
    kept["first batch"] = rounds(
        PEERS, lambda peer: run_fresh("benchmarks.scenarios", "first_batch", peer=peer, batch_size=64, workers=2), count
    )
    if shutil.which("strace"):
        for size in CALLS:
            kept[f"system calls, batch {size}"] = rounds(
                PEERS, lambda peer, size=size: {"calls": _system_calls(peer, size)}, 1
            )
    kept["memory"] = rounds(PEERS, lambda peer: {"nbytes": _memory(peer)}, min(count, 3))
    keep("delivery", kept)
    text = section({"machine": machine(), **kept})
    write_section("delivery", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    about = {name: (f"{name}: GB/s", "gb_per_s", GOALS[name], 2) for name in TRANSPORT}
    about["first batch"] = ("first batch of 64 after construction, fork: s", "first_s", GOALS["first"], 4)
    for size in CALLS:
        name = f"system calls per batch of {size}, two fields"
        about[f"system calls, batch {size}"] = (name, "calls", GOALS[size], 1)
    about["memory"] = ("memory of batches, 8 workers, 38 MB each: bytes", "nbytes", GOALS["memory"], 0)
    rows = [
        _row(name, content[key], figure, goal, digits)
        for key, (name, figure, goal, digits) in about.items()
        if key in content
    ]
    header = ["what", "ours", "torch's loader", "ours : torch's", "goal", "of what bare copies reach"]
    return (
        "## Delivery\n\nHow ready samples get from workers to the consumer: medians of fresh processes, ratios within "
        f"rounds (least to most). `python -m benchmarks.delivery`. {machine_line(content['machine'])}\n\n"
        + table(header, rows)
        + "\n\n"
        + _bounds(content["sample"])
    )


def _bounds(samples: Mapping[str, Mapping[str, float]]) -> str:
    """What lies between bare copies and ours."""
    rows = [
        [name, *(f"{found[each]:.1f}" for each in ("copy_us", "dataset_us", "worker_us"))]
        for name, found in samples.items()
    ]
    return (
        "Bare copies are loops without a dataset and without a loader. What ours takes longer is the dataset's own "
        "Python code, and the worker's: it marks the sample that it reads, keys its randomness, checks types, dtypes "
        "and shapes, and writes each field into its row. In microseconds per sample, in one process:\n\n"
        + table(["samples", "bare copy", "with the dataset's code", "in a worker"], rows)
    )


def _transport(arguments: dict[str, Any], peer: str) -> dict[str, float]:
    if peer == "ceiling":
        return run_fresh("benchmarks.scenarios", "ceiling", workers=2, **arguments)
    return run_fresh("benchmarks.scenarios", "transport", peer=peer, workers=2, **arguments)


def _row(name: str, figures: dict[str, list[dict[str, float]]], figure: str, goal: str, digits: int) -> list[str]:
    medians = [f"{statistics.median([each[figure] for each in figures[peer]]):.{digits}f}" for peer in PEERS]
    share = f"{statistics.median(ratios(figures, 'ours', 'ceiling', figure)):.0%}" if "ceiling" in figures else ""
    return [name, *medians, spread(ratios(figures, *PEERS, figure)), goal, share]


def _system_calls(peer: str, batch_size: int, batches: int = 200) -> float:
    """Calls of all processes per batch, between two marks that the loop sets with calls that nothing else makes."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls"
        arguments = json.dumps({"peer": peer, "batch_size": batch_size, "batches": batches, "workers": 2})
        command = ["strace", "-f", "-o", str(log), sys.executable, "-m", "benchmarks.harness"]
        subprocess.run(
            [*command, "benchmarks.scenarios", "iterate", arguments], cwd=HERE.parent, check=True, capture_output=True
        )
        lines = log.read_text(errors="replace").splitlines()
    return calls_between_marks(lines) / (batches * 3 // 4)


def calls_between_marks(lines: Sequence[str]) -> int:
    """System calls in a log of strace between the first and the second mark."""
    begin, end = (next(at for at, line in enumerate(lines) if mark in line) for mark in MARKS)
    # A call during which another process made one has two lines; signals and ends of processes are no calls.
    return sum(not re.search(r"resumed>|^\d+ (---|\+\+\+) ", line) for line in lines[begin + 1 : end])


def _memory(peer: str) -> float:
    """Bytes in addition to what the same loader takes for samples of one byte."""
    arguments = {"peer": peer, "batch_size": 256, "batches": 40, "workers": 8}
    floor = run_fresh("benchmarks.scenarios", "memory", shape=[1, 1, 1], **arguments)
    full = run_fresh("benchmarks.scenarios", "memory", shape=[224, 224, 3], **arguments)
    return sum(full.values()) - sum(floor.values())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
