"""Tar shards: our loader on shards and on the same files in a folder, and WebDataset on the same shards.

`python -m benchmarks.tar [ROUNDS [SHARDS]]`. Everything is read from the page cache.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import keep, machine_line, ratios, rounds, run_fresh, spread, table, write_section

PEERS = {
    "folder": "ours, files in a folder",
    "shards": "ours, shards, random order",
    "grouped": "ours, shards, `GroupedSampler`",
    "webdataset": "WebDataset, shards, shuffle(1000)",
}
GOALS = {"folder": 0.97, "webdataset": 1.3}
BATCH, WORKERS, SIDE = 64, 2, 224
_PHOTOS, _PER_SHARD = 2000, 100
_MEMBERS = 500  # of a shard with tiny members
_FIRST_BATCH_GOAL_S, _MEMORY_GOAL = 0.5, 1.1


def write_photos(folder: Path, count: int = _PHOTOS, per_shard: int = _PER_SHARD) -> str:
    """Write JPEG files of 500 x 375, and shards with the same bytes and their classes. Returns what they show."""
    from benchmarks.photos import write_jpegs

    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    source = write_jpegs(folder / "files", count)
    files = sorted((folder / "files").iterdir())
    for first in range(0, count, per_shard):
        with tarfile.open(folder / "shards" / f"{first // per_shard:04}.tar", "w") as tar:
            for number, file in enumerate(files[first : first + per_shard], first):
                _add(tar, file.name, file.read_bytes())
                _add(tar, f"{file.stem}.cls", str(number % 1000).encode())
    return source


def write_tiny(folder: Path, shards: int) -> None:
    """Write shards of `_MEMBERS` tiny members, and the index of all and of the first alone."""
    from loaders import TarFiles

    (folder / "tiny").mkdir()
    for shard in range(shards):
        with tarfile.open(folder / "tiny" / f"{shard:05}.tar", "w") as tar:
            for number in range(_MEMBERS):
                _add(tar, f"{shard:05}{number:04}.cls", str(number).encode())
    for pattern in ("*", "00000"):
        TarFiles(_tiny(folder, pattern), index=_index(folder, pattern))


def train(peer: str, folder: str, epochs: int) -> dict[str, float]:
    """Samples per second of whole epochs of random crops, after a first one."""
    import torch

    torch.set_num_threads(1)
    loader = _loader(peer, Path(folder))
    for _ in loader:
        pass
    count, began = 0, time.perf_counter()
    for epoch in range(epochs):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch + 1)
        for batch in loader:
            count += len(batch["label"])
    return {"per_s": count / (time.perf_counter() - began)}


def first_batch(folder: str) -> dict[str, float]:
    """Seconds from making the dataset, with its index at hand, to the first batch of two workers."""
    from loaders import DataLoader, TarFiles

    # So that imports and the start of everything that is started once are not timed.
    small = TarFiles(_tiny(Path(folder), "00000"), index=_index(Path(folder), "00000"))
    next(iter(DataLoader(small, BATCH, num_workers=WORKERS)))
    began = time.perf_counter()
    dataset = TarFiles(_tiny(Path(folder), "*"), index=_index(Path(folder), "*"))
    made = time.perf_counter()
    next(iter(DataLoader(dataset, BATCH, shuffle=True, seed=0, num_workers=WORKERS)))
    ended = time.perf_counter()
    return {"first_batch_s": ended - began, "index_s": made - began, "samples": len(dataset)}


def scanning(folder: str) -> dict[str, float]:
    """Microseconds per member to find all members."""
    from loaders import TarFiles

    began = time.perf_counter()
    dataset = TarFiles(_tiny(Path(folder), "*"))
    return {"us_per_member": (time.perf_counter() - began) * 1e6 / len(dataset)}


def memory(folder: str, pattern: str, workers: int) -> dict[str, float]:
    """Bytes that a worker holds alone after reading a million samples at random, on average."""
    from loaders import DataLoader, TarFiles
    from loaders.benchmark.processes import descendants

    dataset = TarFiles(_tiny(Path(folder), pattern), index=_index(Path(folder), pattern))
    whole = TarFiles(_tiny(Path(folder), "*"), index=_index(Path(folder), "*"))
    epochs = len(whole) // len(dataset)
    del whole
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
    loader = DataLoader(_Repeated(dataset, epochs), 512, shuffle=True, seed=0, **options)
    for _ in loader:
        pass
    held = [_private_nbytes(pid) for pid in descendants()]
    return {"worker_nbytes": sum(held) / len(held), "index_nbytes": dataset._index.nbytes}


class _Repeated:
    """A dataset that is read several times in an epoch, so that all are read as often."""

    def __init__(self, dataset: Any, times: int) -> None:
        self.dataset, self.times = dataset, times

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


def _loader(peer: str, folder: Path) -> Any:
    import cv2

    from loaders import DataLoader, GroupedSampler, ImageFiles, RandomResizedCrop, TarFiles

    if peer == "webdataset":
        return _webdataset(folder)
    crop = RandomResizedCrop(SIDE, interpolation=cv2.INTER_LINEAR, flip=0.5)
    options: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "seed": 0, "drop_last": True}
    if peer == "folder":
        files = sorted(map(str, (folder / "files").iterdir()))
        dataset: Any = ImageFiles(files, np.arange(len(files)) % 1000, crop=crop)
    else:
        dataset = TarFiles(folder / "shards" / "*.tar", crop=crop)
    if peer == "grouped":
        return DataLoader(dataset, BATCH, sampler=GroupedSampler(dataset.group_sizes, groups_open=8), **options)
    return DataLoader(dataset, BATCH, shuffle=True, **options)


def _webdataset(folder: Path) -> Any:
    """As its documentation advises: shards and a buffer of samples are shuffled, workers make whole batches."""
    import webdataset

    from benchmarks.workloads import train_photo

    numbers = itertools.count()

    def read(sample: Any) -> dict[str, Any]:
        rng = np.random.default_rng(next(numbers))
        return {"image": train_photo(sample["jpg"], rng, False), "label": int(sample["cls"])}

    def stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    shards = sorted(map(str, (folder / "shards").iterdir()))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).map(read)
    batches = dataset.batched(BATCH, partial=False, collation_fn=stacked)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _tiny(folder: Path, pattern: str) -> str:
    return str(folder / "tiny" / f"{pattern}.tar")


def _index(folder: Path, pattern: str) -> str:
    return str(folder / f"index-{'all' if pattern == '*' else pattern}")


def _private_nbytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def measure(folder: Path, count: int, shards: int, epochs: int = 3) -> dict[str, Any]:
    """All figures, of fresh processes."""
    where = {"folder": str(folder)}
    module = "benchmarks.tar"
    train_rounds = rounds(
        list(PEERS), lambda peer: run_fresh(module, "train", peer=peer, epochs=epochs, **where), count
    )
    several = {name: [run_fresh(module, name, **where) for _ in range(count)] for name in ("first_batch", "scanning")}
    held = {
        f"{pattern} {workers}": [run_fresh(module, "memory", pattern=pattern, workers=workers, **where)]
        for pattern, workers in (("00000", 1), ("*", 1), ("*", 4))
    }
    return {"train": train_rounds, **several, "memory": held, "shards": shards}


def main(count: int = 5, shards: int = 2000) -> None:
    with tempfile.TemporaryDirectory() as top:
        source = write_photos(Path(top))
        write_tiny(Path(top), shards)
        content = {"source": source, "rounds": count, **measure(Path(top), count, shards)}
    text = section(json.loads(keep("tar", content).read_text()))
    write_section("tar", text)
    print(text)


def section(content: Mapping[str, Any]) -> str:
    """The section of benchmarks/README.md."""
    figures = content["train"]
    rates = {peer: spread([each["per_s"] for each in figures[peer]], 0) for peer in PEERS}
    rows = []
    for peer, name in PEERS.items():
        cells = ["", ""]
        if peer in ("shards", "grouped"):
            cells = [spread(ratios(figures, peer, base, "per_s")) for base in GOALS]
        rows.append([name, rates[peer], *cells])
    rows.append(["goal", "", *(f"≥ {goal}" for goal in GOALS.values())])
    return "\n\n".join(
        [
            "## Tar shards",
            f"RandomResizedCrop({SIDE}) and flip of JPEGs of 500 x 375, cut out of {content['source']}, in shards of "
            f"{_PER_SHARD}; batches of {BATCH}, {WORKERS} workers. Median (least to most) of {content['rounds']} "
            "rounds in fresh processes, ratios within a round. WebDataset decodes with OpenCV, to uint8 as we do. "
            f"`python -m benchmarks.tar`. {machine_line(content['machine'])}",
            table(["", "samples/s", "of the folder", "of WebDataset"], rows),
            "\n".join(_other_lines(content)),
        ]
    )


def _other_lines(content: Mapping[str, Any]) -> Iterator[str]:
    def median(name: str, figure: str) -> float:
        return statistics.median(each[figure] for each in content[name])

    (one,), (alone,), (of_four,) = (content["memory"][key] for key in ("00000 1", "* 1", "* 4"))
    largest = max(alone["worker_nbytes"], of_four["worker_nbytes"])
    yield (
        f"{content['shards']:,} shards of {_MEMBERS} tiny members, {median('first_batch', 'samples'):,.0f} samples: "
        f"the first batch with the index at hand takes {median('first_batch', 'first_batch_s'):.2f} s (goal: "
        f"< {_FIRST_BATCH_GOAL_S} s), of which {median('first_batch', 'index_s'):.2f} s to load the index. Reading all "
        f"headers takes {median('scanning', 'us_per_member'):.1f} µs per member."
    )
    yield (
        f"Of its own, a worker holds {alone['worker_nbytes'] / 1e6:.1f} MB, or {of_four['worker_nbytes'] / 1e6:.1f} MB "
        f"where there are four: {largest / one['worker_nbytes']:.2f} of one that reads a single shard (goal: "
        f"< {_MEMORY_GOAL}). The index, which they share, has {alone['index_nbytes'] / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
