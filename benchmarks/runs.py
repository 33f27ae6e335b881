"""The workloads and figures of the comparison, and `run`, which measures a peer in a process of its own environment."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import workloads
from benchmarks.workloads import Photos, image_of

MANY = 1 << 20


class Run(NamedTuple):
    """One workload.

    Attributes:
        of: what the peer must provide: "samples" or "photos".
        batch_size, workers: 0 workers means one per core.
        arguments: of the dataset, or of `photos`.
        pause_s: stands for a model's time per batch, in which loaders prefetch as much as they can.
    """

    of: str
    batch_size: int
    arguments: dict[str, Any]
    workers: int = 0
    pause_s: float = 0


def _ready(kind: str, count: int, shape: list[int], dtype: str = "uint8") -> dict[str, Any]:
    return {"kind": kind, "count": count, "shape": shape, "dtype": dtype}


RUNS = {
    "large uint8": Run("samples", 256, _ready("Ready", MANY, [224, 224, 3])),
    "large float32": Run("samples", 32, _ready("Ready", MANY, [512, 512, 3], "float32")),
    "photos uint8": Run("photos", 64, {"normalised": False}),
    "photos float32": Run("photos", 64, {"normalised": True}),
    "heavy tail": Run("samples", 64, _ready("HeavyTailed", MANY, [64, 64, 3])),
    "small": Run("samples", 512, _ready("Ready", MANY, [28, 28])),
    "dicts": Run("samples", 256, _ready("Ready", MANY, [32, 32, 3])),
    "tuples": Run("samples", 256, _ready("ReadyPairs", MANY, [32, 32, 3])),
    "short epochs": Run("samples", 64, _ready("Ready", 64 * 8, [224, 224, 3])),
    "many workers": Run("samples", 256, _ready("Ready", MANY, [224, 224, 3]), workers=8, pause_s=0.02),
}


class Scenario(NamedTuple):
    """One column of the tables: a figure of a run.

    Attributes:
        title: with its unit.
        run: a key of RUNS.
        figure: a key of what `run` returns.
        scale: the figure is multiplied by it for display.
        digits: after the decimal point.
        lower: whether less is better.
    """

    title: str
    run: str
    figure: str
    scale: float = 1.0
    digits: int = 0
    lower: bool = False


TABLES = {
    "Ready samples": [
        Scenario("224 x 224 x 3 uint8, batch 256: GB/s", "large uint8", "gb_per_s", digits=2),
        Scenario("512 x 512 x 3 float32, batch 32: GB/s", "large float32", "gb_per_s", digits=2),
        Scenario("28 x 28, batch 512: samples/s", "small", "samples_per_s"),
        Scenario("dicts, 32 x 32 x 3, batch 256: samples/s", "dicts", "samples_per_s"),
        Scenario("tuples, 32 x 32 x 3, batch 256: samples/s", "tuples", "samples_per_s"),
    ],
    "Training": [
        Scenario("photographs, uint8: samples/s", "photos uint8", "samples_per_s"),
        Scenario("photographs, normalised float32: samples/s", "photos float32", "samples_per_s"),
        Scenario("1 in 100 takes 30 times as long: samples/s", "heavy tail", "samples_per_s"),
    ],
    "Waiting and memory": [
        Scenario("first batch of 64: ms", "short epochs", "first_batch_s", 1e3, lower=True),
        Scenario("from one epoch to the next: ms", "short epochs", "turn_s", 1e3, lower=True),
        Scenario("memory, 8 workers, batches of 38 MB: MB", "many workers", "memory_nbytes", 1e-6, lower=True),
    ],
}


def peer_module(peer: str) -> Any:
    return importlib.import_module(f"benchmarks.peers.{peer}")


def does(peer: str, run: str) -> bool:
    """Whether a peer supports a run; does not need the peer's environment."""
    return hasattr(peer_module(peer), RUNS[run].of)


def prepare(peer: str, files: str, prepared: str) -> dict[str, Any]:
    """Let the peer write what it needs before its runs over photographs."""
    module = peer_module(peer)
    if hasattr(module, "prepare"):
        Path(prepared).mkdir(parents=True, exist_ok=True)
        module.prepare(_photos(files, prepared))
    return {}


def run(peer: str, name: str, seconds: float, files: str, prepared: str) -> dict[str, Any]:
    """Two passes over a peer's batches, of which the second counts; each batch is copied, as a device would read it."""
    from loaders.benchmark import measure

    one, out = RUNS[name], np.zeros(0, np.uint8)

    def read(batch: Any) -> None:
        nonlocal out
        image = image_of(batch)
        if image.nbytes > out.nbytes or image.dtype != out.dtype:
            out = np.empty(image.size, image.dtype)
        np.copyto(out[: image.size].reshape(image.shape), image)
        time.sleep(one.pause_s)

    workers = one.workers or len(os.sched_getaffinity(0))
    if one.of == "photos":
        source = peer_module(peer).photos(_photos(files, prepared), one.batch_size, workers, **one.arguments)
    else:
        about = dict(one.arguments)
        dataset = getattr(workloads, about.pop("kind"))(**about)
        source = peer_module(peer).samples(dataset, one.batch_size, workers)
    found = measure(workloads.Epochs(lambda: iter(source)), name=peer, rounds=1, seconds=seconds, each=read)
    (counted,) = found.passes
    return {
        "samples_per_s": counted.samples_per_s,
        "gb_per_s": counted.gb_per_s,
        "first_batch_s": found.first_batch.median,
        "turn_s": counted.turn_s,
        "cpu_cores": counted.cpu_cores,
        "memory_nbytes": found.memory_nbytes,
        "batches": counted.batches,
    }


def _photos(files: str, prepared: str) -> Photos:
    """Read the paths from a file: they are too many for a command line."""
    return Photos(json.loads(Path(files).read_text()), prepared)
