"""The cost of keyed randomness per sample, compared with reading one JPEG of about 100 KB.

`python -m benchmarks.randomness`. Times only what a worker does for keys, in spans as long as a loader makes them for
samples that take this long, and `read_image` of a photograph from the page cache, in the same process.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import keep, machine, machine_line, rounds, run_fresh, spread, table, write_section

KINDS = {
    "nothing": "nothing (generators are only watched)",
    "sample_rng": "`sample_rng()`",
    "compose": "an albumentations `Compose`",
    "process": "`random`, `numpy.random` and torch's generator",
}
PLACES = {"worker": "a worker", "inline": "`num_workers=0`"}
PEERS = [f"{kind} {place}" for kind in KINDS for place in PLACES]
# Samples in a span: one to two milliseconds of work if several workers share a batch; else the whole batch.
SPANS = {"worker": 2, "inline": 64}
PHOTO_NBYTES = 100_000
GOAL = 3.0  # per cent


def cost(kind: str, place: str, samples: int) -> dict[str, float]:
    """Microseconds per sample for its keys, and per photograph that is read."""
    import albumentations as A
    import cv2
    import numpy as np
    import torch  # loaded, so that its generator is watched and keyed too

    from examples.demo.photos import read_photo
    from loaders import sample_rng
    from loaders.images.decode import read_image
    from loaders.workers.messages import Job, Task
    from loaders.workers.worker import Worker

    class Reads:
        transform = None

        def __init__(self) -> None:
            if kind == "compose":
                self.transform = A.Compose([A.RandomCrop(224, 224), A.HorizontalFlip(), A.ColorJitter()])

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    span = SPANS[place]
    job = Job(Reads(), "each", None, True, {}, False, span, False, 2, 0, None)
    worker = Worker(job, 0, bytearray(8), apart=place == "worker")
    task = Task(0, range(samples), 0, 1, 5, None, ())
    generators = worker._generators
    assert generators is not None
    generators.keyed = kind == "process"  # as after a sample was found to draw

    def key_all() -> None:
        for start in range(0, samples, span):
            generators.begin()
            for row in range(start, start + span):
                worker._enter(task, row)
                if kind == "sample_rng":
                    sample_rng()
            assert not generators.drew()
            generators.end()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        photo = read_photo("coffee")
        for quality in range(70, 101):
            _, jpeg = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, quality])
            if jpeg.nbytes >= PHOTO_NBYTES:
                break
        path.write_bytes(jpeg.tobytes())

        def read_all() -> None:
            for _ in range(samples // 8):
                assert read_image(path).dtype == np.uint8

        random.seed(0)
        key_s, read_s = _best(key_all) / samples, _best(read_all) / (samples // 8)
    return {
        "key_us": key_s * 1e6,
        "read_us": read_s * 1e6,
        "percent": 100 * key_s / read_s,
        "photo_nbytes": jpeg.nbytes,
        "height": photo.shape[0],
        "width": photo.shape[1],
    }


def _best(work: Callable[[], None]) -> float:
    """Median seconds of a few repetitions, without the first."""
    taken = []
    for _ in range(6):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def main(count: int = 5, samples: int = 512) -> None:
    def run(peer: str) -> dict[str, float]:
        kind, place = peer.split()
        return run_fresh("benchmarks.randomness", "cost", kind=kind, place=place, samples=samples)

    kept = {"goal_percent": GOAL, "spans": SPANS, "figures": rounds(PEERS, run, count)}
    keep("randomness", kept)
    text = section({"machine": machine(), **kept})
    write_section("randomness", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    figures, goal, rows = content["figures"], content["goal_percent"], []
    for peer in PEERS:
        kind, place = peer.split()
        seen = {name: [each[name] for each in figures[peer]] for name in figures[peer][0]}
        over = " — over" if statistics.median(seen["percent"]) >= goal else ""
        rows.append([KINDS[kind], PLACES[place], spread(seen["key_us"], 1), spread(seen["percent"]) + over])
    one, count = figures[PEERS[0]][0], len(figures[PEERS[0]])
    reads = spread([each["read_us"] for peer in PEERS for each in figures[peer]], 0)
    return (
        "## Randomness\n\nWhat a sample costs for its keys, per thing that its dataset draws from, and in per cent of "
        f"reading one JPEG of {one['photo_nbytes'] / 1e3:.0f} KB ({one['height']:.0f} by {one['width']:.0f} pixels: "
        f"{reads} µs) in the same process: median (least to most) of {count} fresh processes. The "
        "generators are watched span by span: spans of 2 samples in a worker, of a batch of 64 without workers. "
        f"The goal is less than {goal:.0f} %. `python -m benchmarks.randomness`. "
        f"{machine_line(content['machine'])}\n\n"
        + table(["draws from", "read by", "µs per sample", "% of a JPEG"], rows)
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
