"""Training batches from JPEG files: our loader against torch's with OpenCV. `python -m benchmarks.images [ROUNDS]`.

Fresh processes, peers interleaved in alternating order, ratios within a round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, keep, machine_line, ratios, rounds, run_fresh, spread, table, write_section
from benchmarks.photos import write_jpegs
from loaders.images.decode import read_image
from loaders.images.decode.restart_index import index_of
from loaders.images.prepare.photo import interval

_MODULE = "benchmarks.image_scenarios"


class Work(NamedTuple):
    """What is measured, on which photos, and the goals."""

    name: str
    photos: str
    repeats: int
    epochs: int
    goal: float
    peers: tuple[str, ...] = ("ours", "torch")
    share_goal: float | None = None


PHOTOS = {"small": (600, (400, 470), 98), "large": (24, (3000, 4000), 92)}  # count, (height, width), quality
RECIPE = ("ours", "ours, flip by albumentations", "ours, prepared", "torch")
WORKS = {
    "recipe": Work("RandomResizedCrop(224) + flip, uint8", "small", 4, 2, 1.45, RECIPE, 0.92),
    "planes": Work("the same as normalised float32 NCHW", "small", 4, 2, 1.5),
    "cache": Work("the same from `DecodedCache`, after the first epoch", "small", 4, 4, 6.0),
    "large": Work("the same of photos of 4000 x 3000", "large", 8, 1, 3.0),
}
_PREPARED_GOAL = 1.65


def main(count: int = 5) -> None:
    content: dict[str, Any] = {"rounds": count}
    with tempfile.TemporaryDirectory() as top:
        for photos, (number, shape, quality) in PHOTOS.items():
            folder = Path(top) / photos
            for each, marks in ((folder, 0), (Path(f"{folder}-prepared"), interval(shape[1], (2, 2)))):
                each.mkdir()
                source = write_jpegs(each, number, shape, quality, marks)
            sizes = [file.stat().st_size for file in folder.iterdir()]
            content[f"photos, {photos}"] = {"source": source, "mean_nbytes": statistics.mean(sizes)}
            _write_index(Path(f"{folder}-prepared"))
        for name, work in WORKS.items():
            content[name] = _measure(name, work, Path(top) / work.photos, count)
            keep("images", content)
    text = section(json.loads((RESULTS / "images.json").read_text()))
    write_section("images", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    small, large = (content[f"photos, {photos}"] for photos in PHOTOS)
    header = ["JPEG files → batches of 64, two workers", "samples/s", "torch's, samples/s", "ratio", "goal"]
    rows = [row for name, work in WORKS.items() for row in _rows(work, content[name])]
    lines = [
        "## Decoding what is seen",
        "",
        f"Photos of 470 x 400 with {small['mean_nbytes'] / 1e3:.0f} KB on average, and of 4000 x 3000 with "
        f"{large['mean_nbytes'] / 1e6:.1f} MB, cut out of {small['source']}: medians of {content['rounds']} rounds in "
        "fresh processes, ratios within a round (least to most). torch's loader decodes with OpenCV and augments with "
        f"albumentations, on the original files. `python -m benchmarks.images`. {machine_line(content['machine'])}",
        "",
        table(header, rows),
    ]
    return "\n".join(lines)


def _write_index(folder: Path) -> None:
    index = index_of(folder)
    for photo in folder.glob("*.jpg"):
        read_image(photo, region=(0, 0, 8, 8))
    index.save()


def _measure(name: str, work: Work, folder: Path, count: int) -> dict[str, list[dict[str, float]]]:
    def run(peer: str) -> dict[str, float]:
        if peer == "bare":
            return run_fresh(_MODULE, "bare", work=name, folder=str(folder), seconds=4.0)
        arguments = {"work": name, "repeats": work.repeats, "epochs": work.epochs}
        return run_fresh(_MODULE, "loader", peer=peer, folder=str(folder), **arguments)

    return rounds([*work.peers, *(["bare"] if work.share_goal else [])], run, count)


def _rows(work: Work, figures: Mapping[str, Any]) -> list[list[str]]:
    medians = {peer: f"{statistics.median(each['per_s'] for each in found):,.0f}" for peer, found in figures.items()}
    goals = {"ours": work.goal, "ours, prepared": _PREPARED_GOAL}
    rows = []
    for peer in work.peers[:-1]:
        ratio = spread(ratios(figures, peer, "torch", "per_s"))
        goal = f"≥ {goals[peer]}" if peer in goals else ""
        rows.append([work.name + peer.removeprefix("ours"), medians[peer], medians["torch"], ratio, goal])
    if work.share_goal is not None:
        share = spread(ratios(figures, "ours", "bare", "per_s"))
        what = f"the first, of bare loops without a loader ({medians['bare']} samples/s)"
        rows.append([what, medians["ours"], "", share, f"≥ {work.share_goal}"])
    return rows


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
