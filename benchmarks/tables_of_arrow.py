"""Rows of tables: our loader against Hugging Face's `datasets` in torch's. `python -m benchmarks.tables_of_arrow`.

Photographs as bytes in Parquet, in a folder, and in a `datasets.Dataset`; numbers in a `datasets.Dataset`, as one
column of vectors and as many columns. Everything is read from the page cache.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep, machine_line, ratios, rounds, run_fresh, spread, table, write_section
from benchmarks.photos import write_jpegs
from benchmarks.workloads import SIZE, train_photo

WORKS = {
    "photos": "RandomResizedCrop(224) of 500 x 375 photos, batches of 64",
    "vectors": "a column of 32 float32, batches of 512",
    "columns": "16 columns of float32, batches of 512",
}
PEERS = {
    "photos": {"parquet": "Parquet", "folder": "a folder", "datasets": "HF datasets + torch's loader"},
    "vectors": {"arrow": "Arrow", "datasets": "HF datasets + torch's loader"},
    "columns": {"arrow": "Arrow", "datasets": "HF datasets + torch's loader"},
}
GOALS = {("photos", "folder"): "≥ 0.95", ("photos", "datasets"): "≥ 1.3", ("vectors", "datasets"): "≥ 5"}
GOALS["columns", "datasets"] = GOALS["vectors", "datasets"]
BATCHES = {"photos": 64, "vectors": 512, "columns": 512}
SECONDS = 4.0
_PHOTOS, _ROWS = 1024, 200_000
_GROUP = 64  # photos in a row group
_TOGETHER = 4  # row groups that are mixed
_REPEATED = 8  # random orders of the photos in an epoch
_WARM_UP = 8  # batches


def write_tables(folder: Path, photos: int = _PHOTOS, rows: int = _ROWS) -> None:
    """The same photos and numbers in all forms."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets = _datasets()
    (folder / "photos").mkdir()
    write_jpegs(folder / "photos", photos)
    encoded = [file.read_bytes() for file in sorted((folder / "photos").iterdir())]
    whole = {"image": encoded, "label": list(range(photos))}
    pq.write_table(pa.table(whole), folder / "photos.parquet", row_group_size=_GROUP, compression="none")
    datasets.Dataset.from_dict(whole).save_to_disk(folder / "photos.hf")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, rows)
    kinds = {"x": datasets.Sequence(datasets.Value("float32"), length=32), "y": datasets.Value("int64")}
    vectors = {"x": rng.random((rows, 32), np.float32), "y": labels}
    datasets.Dataset.from_dict(vectors, datasets.Features(kinds)).save_to_disk(folder / "vectors.hf")
    columns = {f"x{number}": rng.random(rows, np.float32) for number in range(16)}
    datasets.Dataset.from_dict({**columns, "y": labels}).save_to_disk(folder / "columns.hf")


def through_loader(
    peer: str, work: str, folder: str, workers: int, seconds: float = SECONDS, batch_size: int | None = None
) -> dict[str, float]:
    """Samples per second through a loader, in a random order, after its first batches."""
    import torch

    torch.set_num_threads(1)
    loader = _made(peer, work, Path(folder), workers, batch_size or BATCHES[work])
    began, seen, taken_s = 0.0, 0, 0.0
    while taken_s < seconds:
        for number, batch in enumerate(loader):
            if number == _WARM_UP:
                began = time.perf_counter()
            seen += len(batch["label" if work == "photos" else "y"]) if number > _WARM_UP else 0
            if number > _WARM_UP and taken_s + time.perf_counter() - began > seconds:
                break
        taken_s += time.perf_counter() - began
    return {"samples_per_s": seen / taken_s}


def _made(peer: str, work: str, folder: Path, workers: int, batch_size: int) -> Any:
    import cv2
    import torch

    from loaders import ArrowDataset, DataLoader, GroupedSampler, ImageFiles, RandomResizedCrop

    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers}
    if work == "photos":
        files = sorted((folder / "photos").iterdir())
        orders = [np.random.default_rng(seed).permutation(len(files)).tolist() for seed in range(_REPEATED)]
        options["sampler"] = list(chain.from_iterable(orders))
    else:
        options["shuffle"] = True
    if peer == "datasets":
        stored: Any = _datasets().load_from_disk(folder / f"{work}.hf")
        stored = stored.with_transform(_augmented) if work == "photos" else stored.with_format("numpy")
        return torch.utils.data.DataLoader(stored, **options)
    if work != "photos":
        columns: dict[str, Any] = {"x": "x" if work == "vectors" else [f"x{number}" for number in range(16)], "y": "y"}
        dataset = ArrowDataset(_datasets().load_from_disk(folder / f"{work}.hf"), columns)
        return DataLoader(dataset, **options)
    crop = RandomResizedCrop(SIZE, flip=0.5, interpolation=cv2.INTER_LINEAR)
    if peer == "folder":
        return DataLoader(ImageFiles(files, range(len(files)), crop=crop), **options)
    photos = ArrowDataset(folder / "photos.parquet", image="image", crop=crop)
    orders = (GroupedSampler(photos.group_sizes, groups_open=_TOGETHER, seed=seed) for seed in range(_REPEATED))
    options["sampler"] = list(chain.from_iterable(orders))
    return DataLoader(photos, **options)


def _augmented(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    images = [train_photo(encoded, np.random.default_rng(), False) for encoded in rows["image"]]
    return {"image": images, "label": rows["label"]}


def _datasets() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    return datasets


def main(count: int = 5, workers: int = 2) -> None:
    content: dict[str, Any] = {"workers": workers, "rounds": count}
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder))
        for work in WORKS:
            content[work] = rounds(list(PEERS[work]), partial(_through, work, folder, workers), count)
    text = section(json.loads(keep("tables_of_arrow", content).read_text()))
    write_section("tables_of_arrow", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    rows = []
    for work, name in WORKS.items():
        ours, *others = PEERS[work]
        rates = {peer: spread([each["samples_per_s"] for each in content[work][peer]], 0) for peer in PEERS[work]}
        for other in others:
            faster = spread(ratios(content[work], ours, other, "samples_per_s"))
            labels = (f"{PEERS[work][ours]}: {rates[ours]}", f"{PEERS[work][other]}: {rates[other]}")
            rows.append([name, *labels, faster, GOALS[work, other]])
    return (
        f"## Rows of tables\n\nSamples per second with {content['workers']} workers: median (least to most) of "
        f"{content['rounds']} rounds, of which each runs all. Parquet is read in a random order that mixes "
        f"{_TOGETHER} row groups of {_GROUP} photos, all else in a random order. HF datasets decodes by OpenCV in "
        f"`with_transform`, and gives numbers in its numpy format. `python -m benchmarks.tables_of_arrow`. "
        f"{machine_line(content['machine'])}\n\n"
        f"{table(['work', 'ours', 'compared with', 'ratio', 'goal'], rows)}"
    )


def _through(work: str, folder: str, workers: int, peer: str) -> dict[str, float]:
    return run_fresh(
        "benchmarks.tables_of_arrow", "through_loader", peer=peer, work=work, folder=folder, workers=workers
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
