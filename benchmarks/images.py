"""Training batches of JPEG files: ours against torch's loader with OpenCV. `python -m benchmarks.images [ROUNDS]`.

Fresh processes, rounds interleaved in alternating order, ratios within a round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import keep, ratios, rounds, run_fresh, spread, table, write_section
from benchmarks.photos import write_jpegs

_MODULE = "benchmarks.image_scenarios"


class Work(NamedTuple):
    """What is measured, on which photos, and what it should reach."""

    name: str
    photos: str
    repeats: int
    epochs: int
    goal: float
    peers: tuple[str, ...] = ("ours", "torch")
    share_goal: float | None = None


PHOTOS = {"small": (600, (400, 470), 98), "large": (24, (3000, 4000), 92)}  # how many, (height, width), quality
WORKS = {
    "recipe": Work(
        "RandomResizedCrop(224) + flip, uint8",
        "small",
        4,
        2,
        1.45,
        ("ours", "ours, flip by albumentations", "torch"),
        0.92,
    ),
    "planes": Work("the same as normalised float32 NCHW", "small", 4, 2, 1.5),
    "cache": Work("the same from `DecodedCache`, after the first epoch", "small", 4, 4, 6.0),
    "large": Work("the same of photos of 4000 x 3000", "large", 8, 1, 3.0),
}


def main(count: int = 5) -> None:
    kept: dict[str, Any] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as top:
        for photos, (number, shape, quality) in PHOTOS.items():
            folder = Path(top) / photos
            folder.mkdir()
            source = write_jpegs(folder, number, shape, quality)
            sizes = [file.stat().st_size for file in folder.iterdir()]
            kept[f"photos, {photos}"] = {"source": source, "mean_nbytes": statistics.mean(sizes), "shape": shape}
        for name, work in WORKS.items():
            kept[name] = figures = _measure(name, work, Path(top) / work.photos, count)
            rows += _rows(work, figures)
            keep("images", kept)
    header = ["JPEG files → batches of 64, two workers", "samples/s", "torch's, samples/s", "ratio", "goal"]
    small, large = (kept[f"photos, {photos}"] for photos in PHOTOS)
    text = [
        f"Photos of 470 x 400 with {small['mean_nbytes'] / 1e3:.0f} KB on average, and of 4000 x 3000 with "
        f"{large['mean_nbytes'] / 1e6:.1f} MB, cut out of {small['source']}: medians of {count} rounds, ratios within "
        "a round (least to most); torch's loader decodes with OpenCV and augments with albumentations. "
        "`python -m benchmarks.images`",
        "",
        table(header, rows),
    ]
    write_section("images", "\n".join(["## Decoding what is seen", "", *text]))
    print("\n".join(text))


def _measure(name: str, work: Work, folder: Path, count: int) -> dict[str, list[dict[str, float]]]:
    def run(peer: str) -> dict[str, float]:
        if peer == "bare":
            return run_fresh(_MODULE, "bare", work=name, folder=str(folder), seconds=4.0)
        arguments = {"work": name, "repeats": work.repeats, "epochs": work.epochs}
        return run_fresh(_MODULE, "loader", peer=peer, folder=str(folder), **arguments)

    return rounds([*work.peers, *(["bare"] if work.share_goal else [])], run, count)


def _rows(work: Work, figures: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    medians = {peer: f"{statistics.median(each['per_s'] for each in found):,.0f}" for peer, found in figures.items()}
    rows = []
    for peer in work.peers[:-1]:
        ratio = spread(ratios(figures, peer, "torch", "per_s"))
        what = work.name + peer.removeprefix("ours")
        rows.append([what, medians[peer], medians["torch"], ratio, f"≥ {work.goal}" if peer == "ours" else ""])
    if work.share_goal is not None:
        share = spread(ratios(figures, "ours", "bare", "per_s"))
        what = f"the first, of bare loops without a loader ({medians['bare']} samples/s)"
        rows.append([what, medians["ours"], "", share, f"≥ {work.share_goal}"])
    return rows


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
