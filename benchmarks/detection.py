"""What annotations cost a forked worker, and what ten crops of one photo cost: `python -m benchmarks.detection`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.harness import keep, machine_line, run_fresh, spread, table, write_section

KINDS = {"arrays": "arrays, as `CocoDetection` has them", "dicts": "a list of dicts per picture"}
BOXES, PICTURES = 1_000_000, 125_000
SIZES = {"500 x 375": (500, 375), "4000 x 3000": (4000, 3000)}
GOAL = 1.3
_QUALITY = 92


def growth(kind: str, boxes: int, pictures: int) -> dict[str, float]:
    """How much private memory a forked worker gains while it reads the boxes of all pictures once, in bytes."""
    return _grown(_arrays(boxes, pictures) if kind == "arrays" else _dicts(boxes, pictures), pictures)


def _grown(read: Callable[[int], Any], pictures: int) -> dict[str, float]:
    read(0)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        before = _private_nbytes()
        for picture in range(pictures):
            read(picture)
        os.write(send, json.dumps({"grown_nbytes": _private_nbytes() - before}).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        found: dict[str, float] = json.loads(pipe.read())
    os.waitpid(child, 0)
    return found


def _arrays(boxes: int, pictures: int) -> Callable[[int], Any]:
    from loaders.datasets.detection.problems import Problems
    from loaders.datasets.detection.table import AnnotationsBuilder

    builder = AnnotationsBuilder(Problems(), extras={"iscrowd": np.uint8})
    for _ in range(pictures):
        builder.begin(640, 480)
        for number in range(boxes // pictures):
            builder.add(("", ""), (1.0, 2.0, 30.5, 40.5), number, extras=[0])
    annotations = builder.build()
    return lambda picture: annotations.fields_of(picture, 640, 480)


def _dicts(boxes: int, pictures: int) -> Callable[[int], Any]:
    entries = [
        [
            {"bbox": [float(picture), float(number), 30.5, 40.5], "category_id": 1000 + number, "iscrowd": 0}
            for number in range(boxes // pictures)
        ]
        for picture in range(pictures)
    ]

    def read(picture: int) -> Any:
        rows = entries[picture]
        return {
            "boxes": np.array([row["bbox"] for row in rows], np.float32),
            "labels": np.array([row["category_id"] for row in rows], np.int64),
            "iscrowd": np.array([row["iscrowd"] for row in rows], np.uint8),
        }

    return read


def _private_nbytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def crops(size: tuple[int, int], photos: int, repeats: int) -> dict[str, float]:
    """Milliseconds per photo, the least of all repeats: decoding it, one crop, ten in one, and ten by themselves."""
    from examples.demo.photos import PHOTOS, read_photo
    from loaders import MultiCrop, RandomResizedCrop, read_image
    from loaders.images.decode.image import EncodedImage
    from loaders.randomness.streams import enter_sample

    cv2.setNumThreads(0)
    pictures = [each for each in map(read_photo, PHOTOS) if each.shape[0] >= 375 and each.shape[1] >= 500][:photos]
    files = []
    for picture in pictures:
        enlarged = cv2.resize(picture[:375, :500], tuple(size), interpolation=cv2.INTER_CUBIC)
        files.append(cv2.imencode(".jpg", enlarged, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes())
    decoding = 0.0
    read = EncodedImage.read

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal decoding
        began = time.perf_counter()
        try:
            return read(self, *arguments, **options)
        finally:
            decoding += time.perf_counter() - began

    EncodedImage.read = timed  # type: ignore[method-assign]
    one, ten = RandomResizedCrop(224), MultiCrop([(224, 2), (96, 8)])
    alone = [RandomResizedCrop(224)] * 2 + [RandomResizedCrop(96)] * 8
    works: dict[str, Callable[[bytes], Any]] = {
        "whole": read_image,
        "one": one.read,
        "ten": ten.read,
        "alone": lambda file: [crop.read(file) for crop in alone],
    }
    least: dict[str, float] = {}
    for repeat in range(repeats):
        for name, work in works.items():
            decoding, began = 0.0, time.perf_counter()
            for number, file in enumerate(files):
                enter_sample(0, repeat, number)
                work(file)
            taken = {f"{name}_ms": time.perf_counter() - began, f"{name}_decoding_ms": decoding}
            for key, seconds in taken.items():
                least[key] = min(least.get(key, float("inf")), 1000 * seconds / len(files))
    EncodedImage.read = read  # type: ignore[method-assign]
    return least


def main(count: int = 5) -> None:
    content: dict[str, Any] = {"rounds": count, "boxes": BOXES, "pictures": PICTURES}
    for kind in KINDS:
        grow = partial(run_fresh, "benchmarks.detection", "growth", kind=kind, boxes=BOXES, pictures=PICTURES)
        content[kind] = [grow() for _ in range(count)]
    for name, size in SIZES.items():
        photos, repeats = (8, 30) if size[0] < 1000 else (2, 4)
        cut = partial(run_fresh, "benchmarks.detection", "crops", size=size, photos=photos, repeats=repeats)
        content[name] = [cut() for _ in range(count)]
    text = section(json.loads(keep("detection", content).read_text()))
    write_section("detection", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    grown = [[name, spread([each["grown_nbytes"] / 1e6 for each in content[kind]], 1)] for kind, name in KINDS.items()]
    rows = []
    for name in SIZES:
        rounds = content[name]
        times = [spread([each[f"{work}_ms"] for each in rounds]) for work in ("whole", "one", "ten", "alone")]
        share = spread([each["ten_decoding_ms"] / each["whole_decoding_ms"] for each in rounds])
        total = spread([each["ten_ms"] / each["whole_ms"] for each in rounds])
        rows.append([name, *times, share, total, f"≤ {GOAL}"])
    header = [
        "photo",
        "decoding it whole, ms",
        "`RandomResizedCrop(224)`, ms",
        "`MultiCrop([(224, 2), (96, 8)])`, ms",
        "its ten crops one by one, ms",
        "decoding in `MultiCrop` : decoding whole",
        "all of `MultiCrop` : decoding whole",
        "goal",
    ]
    return (
        "## Annotations and several crops\n\nPrivate memory that a forked worker gains while it reads "
        f"{content['boxes']:,} boxes of {content['pictures']:,} pictures once, and the time of crops of JPEGs in "
        f"memory by one thread: median (least to most) of {content['rounds']} rounds. "
        f"`python -m benchmarks.detection`. "
        f"{machine_line(content['machine'])}\n\n{table(['annotations', 'gained, MB'], grown)}\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
