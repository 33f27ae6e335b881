"""On a CUDA device: copies, their overlap with computing, and training. `python -m benchmarks.gpu [--quick]`.

Every part runs in fresh processes. A round runs all variants in turn in one process, the order alternates from round to
round, and ratios are taken within a round. Each result is saved at once in results/gpu-DEVICE.json. Parts that are not
run again keep their earlier results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, keep, run_fresh, spread, table, write_section

PARTS = ("h2d", "overlap", "train", "memory")
LOADERS = {"ours": "ours", "torch": "torch's loader, `pin_memory=True`", "timm": "timm's recipe"}
_MODULE = "benchmarks.gpu_scenarios"
_SIZE = 224


class Scale(NamedTuple):
    """How much is measured."""

    batch_size: int
    rounds: int
    photos: int
    steps: Mapping[str, tuple[int, int]]  # data → (warm-up steps, counted steps)
    traced_steps: int
    h2d_runs: int
    h2d_batches: tuple[int, ...]


FULL = Scale(256, 3, 1024, {"ready": (10, 60), "jpeg": (20, 40)}, 24, 20, (32, 256, 1024))
QUICK = Scale(64, 1, 64, {"ready": (3, 10), "jpeg": (3, 10)}, 12, 5, (32, 256))


class Ratio(NamedTuple):
    """The ratio of two figures in each round, and the least that its median should be."""

    what: str
    values: list[float]
    goal: float | None = None

    @property
    def is_met(self) -> bool | None:
        return None if self.goal is None else statistics.median(self.values) >= self.goal


class Section(NamedTuple):
    """A table of what was measured."""

    title: str
    header: list[str]
    rows: list[list[str]]


# -- measuring


def measure_h2d(scale: Scale, workers: int, files: str) -> Iterator[Any]:
    shapes = [[batch, _SIZE, _SIZE, 3] for batch in scale.h2d_batches]
    yield run_fresh(_MODULE, "h2d", shapes=shapes, rounds=max(scale.rounds, 3), runs=scale.h2d_runs)


def measure_overlap(scale: Scale, workers: int, files: str) -> Iterator[Any]:
    yield run_fresh(
        _MODULE,
        "overlap",
        feeds=list(LOADERS),
        batch_size=scale.batch_size,
        size=_SIZE,
        workers=workers,
        steps=scale.traced_steps,
        repeats=scale.rounds,
    )


def measure_train(scale: Scale, workers: int, files: str) -> Iterator[Any]:
    """Yields the rounds so far after each round."""
    variants = [["resident", "ready", *scale.steps["ready"]]]
    variants += [[feed, data, *scale.steps[data]] for data in ("ready", "jpeg") for feed in LOADERS]
    rounds = []
    for number in range(scale.rounds):
        ordered = variants if number % 2 == 0 else variants[::-1]
        arguments = {"batch_size": scale.batch_size, "size": _SIZE, "workers": workers, "files": files}
        rounds.append(run_fresh(_MODULE, "train", variants=ordered, **arguments))
        yield rounds


def measure_memory(scale: Scale, workers: int, files: str) -> Iterator[Any]:
    """Yields the figures so far after each variant."""
    figures = {}
    for data in ("ready", "jpeg"):
        for feed in ("resident", *LOADERS) if data == "ready" else LOADERS:
            arguments = {"batch_size": scale.batch_size, "size": _SIZE, "workers": workers, "files": files}
            steps = max(5, scale.steps[data][1] // 2)
            figures[f"{feed}, {data}"] = run_fresh(_MODULE, "memory", feed=feed, data=data, steps=steps, **arguments)
            yield figures


MEASURES: dict[str, Callable[[Scale, int, str], Iterator[Any]]] = {
    "h2d": measure_h2d,
    "overlap": measure_overlap,
    "train": measure_train,
    "memory": measure_memory,
}


# -- showing


def ratios(content: Mapping[str, Any]) -> list[Ratio]:
    """The measured ratios: those that have goals, and those between loaders."""
    found = []
    for nbytes, rounds in _figures(content, "h2d", {}).items():
        for base, goal in (("pinned", 0.97), ("pageable", None)):
            name = {"pinned": "memory that torch has pinned", "pageable": "pageable memory"}[base]
            values = [each["slot"] / each[base] for each in rounds]
            found.append(Ratio(f"H2D of {_mb(int(nbytes))}: slot : {name}", values, goal))
    for feed, values in _figures(content, "overlap", {}).items():
        goal = 0.98 if feed == "ours" else None
        found.append(Ratio(f"share of copying hidden behind computing: {LOADERS[feed]}", values, goal))
    rounds = _figures(content, "train", [])
    for data in ("ready", "jpeg") if rounds else ():
        name = {"ready": "ready arrays", "jpeg": "JPEG files"}[data]
        bases = [("resident, ready", "one resident batch", 0.99 if data == "ready" else None)]
        bases += [(f"{feed}, {data}", LOADERS[feed], None) for feed in LOADERS if feed != "ours"]
        for base, called, goal in bases:
            values = [each[f"ours, {data}"] / each[base] for each in rounds]
            found.append(Ratio(f"training from {name}: ours : {called}", values, goal))
    return found


def sections(content: Mapping[str, Any]) -> list[Section]:
    """The tables of the parts that were measured."""
    made = []
    if h2d := _figures(content, "h2d", {}):
        rows = [
            [_mb(int(nbytes)), *(spread([each[name] for each in rounds], 1) for name in ("slot", "pinned", "pageable"))]
            for nbytes, rounds in h2d.items()
        ]
        made.append(Section("To the device, GB/s", ["copied", "slot", "pinned by torch", "pageable"], rows))
    if rounds := _figures(content, "train", []):
        scale = content["train"]
        rows = [
            [
                name,
                spread(rates := [each[name] for each in rounds]),
                f"{statistics.median(rates) * scale['batch']:,.0f}",
            ]
            for name in rounds[0]
            if all(name in each for each in rounds)
        ]
        title = f"Training ResNet-50, bfloat16, batches of {scale['batch']}, {scale['workers']} workers"
        made.append(Section(title, ["fed by", "steps/s", "images/s"], sorted(rows)))
    if memory := _figures(content, "memory", {}):
        names = ["pss_nbytes", "machine_nbytes", "device_nbytes", "device_reserved_nbytes"]
        rows = [[feed, *(f"{each[name] / 1e9:.2f}" for name in names)] for feed, each in memory.items()]
        header = ["fed by", "PSS with workers", "taken of the machine since before the loader", "device", "kept there"]
        made.append(Section("Most memory while training, GB", header, rows))
    if compared := ratios(content):
        rows = [
            [each.what, spread(each.values, 3), "" if each.goal is None else f"≥ {each.goal}", _verdict(each.is_met)]
            for each in compared
        ]
        made.append(Section("Ratios and goals", ["what", "median (least to most)", "goal", "met"], rows))
    return made


def markdown(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    device, machine = content["device"], content["machine"]
    lines = [
        "## On a GPU",
        "",
        f"{device['name']}, driver {device['driver']}, {machine['cores']} cores of {machine['processor']}, torch "
        f"{machine['torch']}, Python {machine['python']}: median (least to most), rounds in fresh processes, ratios "
        "within a round. `python -m benchmarks.gpu`",
    ]
    if "train" in content:
        lines[-1] += f"\n\nJPEG files of 375 by 500 pixels, cut out of {content['train']['source']}."
    for section in sections(content):
        lines += ["", section.title, "", table(section.header, section.rows)]
    return "\n".join(lines)


def show(content: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{content['device']['name']}, driver {content['device']['driver']}", highlight=False)
    for section in sections(content):
        drawn = Table(*section.header, title=section.title, title_justify="left")
        for row in section.rows:
            drawn.add_row(*row)
        console.print(drawn)


def _figures(content: Mapping[str, Any], part: str, default: Any) -> Any:
    return content.get(part, {}).get("figures", default)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _verdict(is_met: bool | None) -> str:
    return "" if is_met is None else "yes" if is_met else "no"


# -- running


def device_of_this_machine() -> dict[str, Any]:
    """The device that is measured."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nbytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        found = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "unknown"


def file_name(device: str, quick: bool) -> str:
    """The name of the result file without ".json", such as `gpu-nvidia-h100-80gb-hbm3`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"gpu-{slug}{'-quick' if quick else ''}"


def measure(parts: Sequence[str], *, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """Run the parts. Returns (all results for this device, with earlier ones, and what failed)."""
    scale, device = QUICK if quick else FULL, device_of_this_machine()
    name = file_name(device["name"], quick)
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    content = {**{part: before[part] for part in PARTS if part in before}, "device": device}
    workers, failed = max(2, len(os.sched_getaffinity(0)) - 2), []
    with tempfile.TemporaryDirectory() as folder:
        about = {"workers": workers, "batch": scale.batch_size, "source": "nothing"}
        if {"train", "memory"} & set(parts):
            from benchmarks.photos import write_jpegs

            about["source"] = write_jpegs(Path(folder), scale.photos)
        for part in parts:
            content.pop(part, None)
            print(f"{part} …", file=sys.stderr, flush=True)
            try:
                for figures in MEASURES[part](scale, workers, folder):
                    content[part] = {**about, "torch": _torch_version(), "figures": figures}
                    keep(name, content)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed.append(f"{part}: {error}")
    return json.loads(keep(name, content).read_text()), failed


def _torch_version() -> str:
    import torch

    return torch.__version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures our loader on CUDA.")
    parser.add_argument("--quick", action="store_true", help="a trial of one minute; saved separately")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar=",".join(PARTS), help="only these parts")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a saved result and write it to README.md")
    options = parser.parse_args(arguments)
    if options.show is not None:
        content = json.loads(options.show.read_text())
        show(content)
        write_section("gpu", markdown(content))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"benchmarks.gpu needs a CUDA device, but torch {torch.__version__} finds none.", file=sys.stderr)
        return 1
    content, failed = measure(options.only, quick=options.quick)
    show(content)
    if not options.quick:
        write_section("gpu", markdown(content))
    for each in failed:
        print(f"failed: {each}", file=sys.stderr)
    return 1 if failed else 0


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}: choose {', '.join(PARTS)}.")
    return parts


if __name__ == "__main__":
    sys.exit(main())
