"""A shuffled epoch's indices: `ShardedSampler`, `torch.randperm(n).tolist()` and torch's `DistributedSampler`.

`python -m benchmarks.sampler`. First index, whole epoch, memory; what does not fit into memory is reported as not run.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.harness import keep, machine, machine_line, rounds, run_fresh, spread, table, write_section

SIZES = [1_300_000, 1_000_000_000]
# (ranks, ours, torch's); the share of rank 0 is measured.
PAIRS = [(1, "ShardedSampler", "randperm"), (8, "ShardedSampler", "DistributedSampler")]
# Of a longer share only a slice of this many indices is timed.
SLICE = 10_000_000
# torch's samplers hold an int64 tensor, and a list of Python ints: a pointer and an object of 32 bytes each.
TORCH_NBYTES_PER_SAMPLE = 8 + 8 + 32


def indices(peer: str, n: int, ranks: int, epoch: int) -> Iterable[int]:
    import torch
    from torch.utils.data.distributed import DistributedSampler

    from loaders import ShardedSampler

    if peer == "randperm":
        return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()
    if peer == "DistributedSampler":
        sampler = DistributedSampler(range(n), num_replicas=ranks, rank=0)
    else:
        sampler = ShardedSampler(n, rank=0, num_replicas=ranks)
    sampler.set_epoch(epoch)
    return sampler


def epoch(peer: str, n: int, ranks: int) -> dict[str, float]:
    """Seconds to the first index and for all (or a slice) of a share, and the peak memory."""
    deque(indices(peer, 10_000, ranks, epoch=1), maxlen=0)  # so that imports and first calls are not timed
    before = _memory_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    begun = time.perf_counter()
    running = iter(indices(peer, n, ranks, epoch=2))
    next(running)
    first = time.perf_counter()
    count = min(n // ranks, SLICE)
    deque(islice(running, count - 1), maxlen=0)
    return {
        "first_s": first - begun,
        "slice_s": time.perf_counter() - begun,
        "slice": count,
        "epoch_s": (first - begun) + (time.perf_counter() - first) * (n // ranks) / count,
        "memory_nbytes": _memory_nbytes("VmHWM") - before,
    }


def _memory_nbytes(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def main(count: int = 5) -> None:
    from loaders.system.limits import available_nbytes

    available, kept = available_nbytes(), {}
    for n in SIZES:
        fits = n * TORCH_NBYTES_PER_SAMPLE < available
        for ranks, ours, theirs in PAIRS:
            figures = rounds(
                [ours, theirs] if fits else [ours],
                lambda peer, n=n, r=ranks: run_fresh("benchmarks.sampler", "epoch", peer=peer, n=n, ranks=r),
                count,
            )
            kept[f"{n} samples, {ranks} ranks"] = figures if fits else {**figures, theirs: []}
    keep("sampler", kept)
    text = section({"machine": machine(), **kept})
    write_section("sampler", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    rows, count = [], 0
    for n in SIZES:
        for ranks, *peers in PAIRS:
            for peer in peers:
                runs = content[f"{n} samples, {ranks} ranks"][peer]
                count = max(count, len(runs))
                rows.append([f"{n:,}", str(ranks), peer, *_cells(n, ranks, runs)])
    header = ["samples", "ranks", "sampler", "first index, ms", "whole share, s", "ns per index", "memory, MB"]
    return (
        "## Samplers\n\nThe shuffled indices of one rank, as Python ints: median (least to most) of "
        f"{count} fresh processes. Of shares longer than {SLICE:,} that many indices were timed, and the whole is "
        f"extrapolated from them. `python -m benchmarks.sampler`. {machine_line(content['machine'])}\n\n"
        + table(header, rows)
    )


def _cells(n: int, ranks: int, runs: Sequence[Mapping[str, float]]) -> list[str]:
    if not runs:
        needed = f"not run: needs {n * TORCH_NBYTES_PER_SAMPLE / 1e9:.0f} GB, more than was free"
        return [needed, "", "", ""]
    seen = {name: [run[name] for run in runs] for name in runs[0]}
    return [
        spread([s * 1e3 for s in seen["first_s"]]),
        spread(seen["epoch_s"], 3) + ("" if n // ranks <= SLICE else ", extrapolated"),
        spread([s * 1e9 / c for s, c in zip(seen["slice_s"], seen["slice"], strict=True)], 0),
        spread([nbytes / 1e6 for nbytes in seen["memory_nbytes"]], 1),
    ]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
