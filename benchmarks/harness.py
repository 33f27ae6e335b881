"""Runs scenarios: a fresh process per run, peers interleaved in each round, ratios within a round, results in JSON.

Benchmark machines are noisy: the ratio of two consecutive runs is meaningful, their absolute times are not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def run_fresh(
    module: str, function: str, *, python: str = sys.executable, timeout_s: float = 900, **arguments: Any
) -> dict[str, Any]:
    """Call `module.function(**arguments)` in a new process of `python`, and return its dict of figures."""
    command = [python, "-m", "benchmarks.harness", module, function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module}.{function}({arguments}) failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def rounds(
    peers: Sequence[str], run: Callable[[str], dict[str, float]], count: int
) -> dict[str, list[dict[str, float]]]:
    """`run(peer)` for every peer, `count` times, in alternating order."""
    figures: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for number in range(count):
        for peer in peers if number % 2 == 0 else reversed(peers):
            figures[peer].append(run(peer))
    return figures


def ratios(figures: Mapping[str, Sequence[Mapping[str, float]]], peer: str, base: str, figure: str) -> list[float]:
    """`peer` over `base` in every round."""
    return [ours[figure] / theirs[figure] for ours, theirs in zip(figures[peer], figures[base], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`3.14 (2.9 to 3.5)`: median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import numpy
    import torch

    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def machine_line(about: Mapping[str, Any]) -> str:
    """The machine in one sentence."""
    memory = f", {about['memory_nbytes'] / 1e9:.0f} GB" if "memory_nbytes" in about else ""
    return (
        f"Measured on: {about['processor']}, {about['cores']} cores{memory}; Python {about['python']}, "
        f"torch {about['torch']}, NumPy {about['numpy']}."
    )


def keep(name: str, content: Mapping[str, Any]) -> Path:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_section(name: str, text: str) -> None:
    """Put `text` between the markers of section `name` in benchmarks/README.md, adding them at the end if missing."""
    path = HERE / "README.md"
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    content = path.read_text() if path.exists() else "# Benchmarks\n"
    if start not in content:
        content += f"\n{start}\n{end}\n"
    before, rest = content.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


if __name__ == "__main__":
    import importlib

    module_name, function_name, text = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module_name), function_name)(**json.loads(text))))
