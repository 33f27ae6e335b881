"""Crops of JPEGs with restart markers: our loader against torch's with OpenCV. `python -m benchmarks.patches`.

Patches of 12-megapixel photos, random-resized crops of small ones, and the bytes read for a patch. The same images are
encoded with and without markers; everything is read from the page cache.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.harness import keep, machine_line, ratios, rounds, run_fresh, spread, table, write_section

PEERS = {"prepared": "ours, prepared", "original": "ours, as they were", "torch": "torch's loader"}
WORKS = {
    "patches": "224 x 224 patches of 4000 x 3000 photos",
    "recipe": "RandomResizedCrop(224) of 500 x 375 photos",
}
GOALS = {"patches": "≥ 30", "recipe": "≥ 1.65", "bytes": "≤ 6 %"}
SAMPLES = {
    ("patches", "prepared"): 6000,
    ("patches", "original"): 600,
    ("patches", "torch"): 320,
    ("recipe", "prepared"): 6000,
    ("recipe", "original"): 6000,
    ("recipe", "torch"): 4000,
}
SIDE = 224
BATCH = 32
# With these, small photos have about 100 KB, like those of ImageNet.
_QUALITY = {"patches": 92, "recipe": 97}
_LARGE, _SMALL = (3000, 4000), (375, 500)
_COUNTS = {"patches": 8, "recipe": 400}


class WholeThenCrop:
    """The usual hand-written dataset: OpenCV decodes the whole file, then the region is cropped and resized.

    Args:
        files: the paths; sample i is of file i % len(files).
        crop: its regions are used, so that all peers read regions of the same sizes.
        count: how many samples.
    """

    def __init__(self, files: list[str], crop: Any, count: int) -> None:
        self.files, self.crop, self.count = files, crop, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        cv2.setNumThreads(0)  # the workers are the parallelism
        photo: Any = cv2.imread(self.files[index % len(self.files)])
        region = self.crop.region(photo.shape[1], photo.shape[0], np.random.default_rng(index))
        part = region.of(photo)
        if part.shape[:2] != (SIDE, SIDE):
            part = cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        return {"image": cv2.cvtColor(part, cv2.COLOR_BGR2RGB)}


def crop_of(work: str) -> Any:
    """The crop that all peers apply."""
    from loaders import RandomPatches, RandomResizedCrop

    return RandomPatches(SIDE) if work == "patches" else RandomResizedCrop(SIDE, interpolation=cv2.INTER_LINEAR)


def through_loader(peer: str, work: str, folder: str, samples: int, workers: int) -> dict[str, float]:
    """Samples per second through a loader, after its first batches."""
    import torch

    from loaders import DataLoader, ImageFiles

    torch.set_num_threads(1)
    kind = "prepared" if peer == "prepared" else "original"
    files = sorted(map(str, Path(folder, work, kind).glob("*.jpg")))
    loader: Any
    if peer == "torch":
        dataset = WholeThenCrop(files, crop_of(work), samples)
        loader = torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers)
    else:
        paths = [files[number % len(files)] for number in range(samples)]
        loader = DataLoader(ImageFiles(paths, crop=crop_of(work)), BATCH, num_workers=workers)
    # As many batches as either loader prefetches are not counted.
    began, seen, warm_up = 0.0, 0, 2 * workers
    for number, batch in enumerate(loader):
        if number == warm_up:
            began = time.perf_counter()
        seen += len(batch["image"]) if number > warm_up else 0
    return {"samples_per_s": seen / (time.perf_counter() - began)}


def bytes_of_patches(folder: str, patches: int) -> dict[str, float]:
    """The share of a photo's file that is read for a patch, and the size of the index relative to all files."""
    from loaders.images.decode import files, restart_index

    noted: list[int] = []
    parts, crop = files._LocalFile.read_parts, crop_of("patches")

    def read_parts(self: Any, starts: Any, ends: Any) -> bytearray:
        found = parts(self, starts, ends)
        noted.append(len(found))
        return found

    files._LocalFile.read_parts = read_parts  # type: ignore[method-assign]
    photos = sorted(Path(folder, "patches", "prepared").glob("*.jpg"))
    nbytes = [photo.stat().st_size for photo in photos]
    shares = []
    for number in range(patches):
        noted.clear()
        crop.read(photos[number % len(photos)])
        shares.append(sum(noted) / nbytes[number % len(photos)])
    index = Path(folder, "patches", "prepared", restart_index.NAME).stat().st_size
    before = sum(photo.stat().st_size for photo in Path(folder, "patches", "original").glob("*.jpg"))
    return {
        "share": sum(shares) / patches,
        "largest_share": max(shares),
        "index_share": index / sum(nbytes),
        "grown": sum(nbytes) / before - 1,
        "mean_nbytes": sum(nbytes) / len(nbytes),
    }


def write_photos(folder: Path) -> None:
    """Write the same images without and with markers, and an index of those with markers."""
    from examples.demo.photos import PHOTOS, read_photo
    from loaders.images.decode import read_image
    from loaders.images.decode.restart_index import index_of
    from loaders.images.prepare.photo import interval

    photos = [read_photo(name) for name in PHOTOS]
    rng = np.random.default_rng(0)
    for work, (height, width) in (("patches", _LARGE), ("recipe", _SMALL)):
        for kind in ("original", "prepared"):
            (folder / work / kind).mkdir(parents=True)
        for number in range(_COUNTS[work]):
            picture = _montage(photos, rng, height, width) if work == "patches" else _part(photos, rng, height, width)
            for kind, marks in (("original", 0), ("prepared", interval(width, (2, 2)))):
                flags = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY[work], cv2.IMWRITE_JPEG_RST_INTERVAL, marks]
                cv2.imwrite(str(folder / work / kind / f"{number:04}.jpg"), picture, flags)
        index = index_of(folder / work / "prepared")
        for photo in (folder / work / "prepared").glob("*.jpg"):
            read_image(photo, region=(0, 0, 8, 8))
        index.save()


def _montage(photos: list[Any], rng: np.random.Generator, height: int, width: int) -> Any:
    """A grid of photographs at their original size, with as much detail as a large photo."""
    picture = np.zeros((height, width, 3), np.uint8)
    for top in range(0, height, 500):
        for left in range(0, width, 500):
            part = _part(photos, rng, 500, 500)
            picture[top : top + 500, left : left + 500] = part
    return picture


def _part(photos: list[Any], rng: np.random.Generator, height: int, width: int) -> Any:
    photo = photos[int(rng.integers(len(photos)))]
    if photo.shape[0] < height or photo.shape[1] < width:
        share = max(height / photo.shape[0], width / photo.shape[1])
        photo = cv2.resize(photo, None, fx=share + 0.01, fy=share + 0.01, interpolation=cv2.INTER_CUBIC)
    top, left = (int(rng.integers(room + 1)) for room in (photo.shape[0] - height, photo.shape[1] - width))
    return photo[top : top + height, left : left + width]


def main(count: int = 5, workers: int = 2) -> None:
    content: dict[str, Any] = {"workers": workers, "rounds": count}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        for work in WORKS:
            content[work] = rounds(list(PEERS), partial(_through, work, folder, workers), count)
        content["bytes"] = run_fresh("benchmarks.patches", "bytes_of_patches", folder=folder, patches=2000)
    text = section(json.loads(keep("patches", content).read_text()))
    write_section("patches", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    rows = []
    for work, name in WORKS.items():
        rates = [spread([each["samples_per_s"] for each in content[work][peer]], 0) for peer in PEERS]
        faster = [spread(ratios(content[work], peer, "torch", "samples_per_s")) for peer in ("prepared", "original")]
        rows.append([name, *rates, *faster, GOALS[work]])
    taken = content["bytes"]
    header = ["work", *PEERS.values(), "prepared : torch's", "as they were : torch's", "goal"]
    return (
        f"## Crops of prepared JPEGs\n\nSamples per second with {content['workers']} workers: median (least to most) "
        f"of {content['rounds']} rounds, of which each runs all three. torch's loader decodes whole photos by OpenCV, "
        f"cuts and resizes. `python -m benchmarks.patches`. {machine_line(content['machine'])}\n\n"
        f"{table(header, rows)}\n\n"
        f"A {SIDE} x {SIDE} patch reads {taken['share']:.1%} of its 12-megapixel file "
        f"({taken['mean_nbytes'] / 1e6:.1f} MB on average), {taken['largest_share']:.1%} at most; the goal is "
        f"{GOALS['bytes']}. The markers make the files {taken['grown']:.1%} larger, and the index has "
        f"{taken['index_share']:.2%} of their size."
    )


def _through(work: str, folder: str, workers: int, peer: str) -> dict[str, float]:
    arguments = {"peer": peer, "work": work, "folder": folder, "samples": SAMPLES[work, peer], "workers": workers}
    return run_fresh("benchmarks.patches", "through_loader", **arguments)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
