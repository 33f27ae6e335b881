"""What a batch costs the consumer's thread, by workers, batch size and fields. `python -m benchmarks.scale`.

Samples wait like those of a slow store, so any number of workers can be simulated on a few cores: what is measured is
the consumer's own CPU time, which does not depend on how many cores the workers have.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness import keep, machine, machine_line, run_fresh, table, write_section
from benchmarks.scenarios import loader_of
from benchmarks.waiting import Waits

WAIT_MS = 20
CASES = [
    *((workers, 64, 1) for workers in (1, 4, 16, 64, 128)),
    *((16, batch_size, 1) for batch_size in (16, 256)),
    *((16, 64, fields) for fields in (4, 16)),
]


class Fields(Waits):
    """The same with several fields."""

    def __init__(self, length: int, seconds: float, fields: int) -> None:
        super().__init__(length, seconds)
        self.fields = fields

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return {f"field {number}": np.full(16, index, np.int64) for number in range(self.fields)}


def consume(workers: int, batch_size: int, fields: int, seconds: float = 3.0) -> dict[str, float]:
    """Milliseconds of CPU time of the consumer's thread per batch, and how often it woke up for it."""
    rate = workers / (WAIT_MS / 1e3) / batch_size
    warm_up = 8 if rate < 4 else int(2 * rate)
    batches = warm_up + max(8, int(seconds * rate))
    dataset = Fields(batch_size * (batches + 8), WAIT_MS / 1e3, fields)
    loader = loader_of("ours", dataset, batch_size=batch_size, num_workers=workers)
    cpus, woken = [], []
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for number, _ in enumerate(loader, start=1):
        now = resource.getrusage(resource.RUSAGE_THREAD)
        if number > warm_up:
            cpus.append(now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime)
            woken.append(now.ru_nvcsw - before.ru_nvcsw)
        before = now
        if number == batches:
            break
    # Medians: once in a while Python collects garbage in all that torch has imported.
    return {"cpu_ms": statistics.median(cpus) * 1e3, "woken": statistics.median(woken)}


def main(count: int = 3) -> None:
    kept: dict[str, Any] = {}
    for _ in range(count):
        for workers, batch_size, fields in CASES:
            figures = run_fresh("benchmarks.scale", "consume", workers=workers, batch_size=batch_size, fields=fields)
            kept.setdefault(f"{workers} {batch_size} {fields}", []).append(figures)
    keep("scale", kept)
    text = section({"machine": machine(), **kept})
    write_section("scale", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    rows = []
    for workers, batch_size, fields in CASES:
        figures = content[f"{workers} {batch_size} {fields}"]
        cpu = statistics.median(each["cpu_ms"] for each in figures)
        woken = statistics.median(each["woken"] for each in figures)
        share = workers / (WAIT_MS / 1e3) / batch_size * cpu / 1e3
        rows.append([*map(str, (workers, batch_size, fields)), f"{cpu:.2f}", f"{woken:.0f}", f"{share:.1%}"])
    header = ["workers", "batch", "fields", "consumer's CPU per batch, ms", "times woken", "of one core"]
    return (
        f"## Scale\n\nWhat batches of samples that wait {WAIT_MS} ms cost the consumer's thread: medians of fresh "
        f"processes. `python -m benchmarks.scale`. {machine_line(content['machine'])}\n\n" + table(header, rows)
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
