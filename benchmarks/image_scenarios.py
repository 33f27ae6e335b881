"""Making training batches from JPEG files: each function runs in its own process and returns figures.

All peers do the same work: crops drawn from the same distribution, INTER_LINEAR, a flip with probability 0.5.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch

from benchmarks.peers import torch_loader
from benchmarks.peers.torch_loader import Augmented
from benchmarks.workloads import MEAN, SIZE, STD, Photos
from loaders import Albumentations, DataLoader, DecodedCache, ImageFiles, RandomResizedCrop

_CROP = RandomResizedCrop(SIZE, interpolation=cv2.INTER_LINEAR, flip=0.5)
_OPTIONS: dict[str, Any] = {"shuffle": True, "num_workers": 2, "persistent_workers": True}


def _torch_loader(files: list[str], *, normalised: bool = False) -> Any:
    return torch_loader.make(Augmented(Photos(files, ""), normalised), batch_size=64, **_OPTIONS)


def _ours(files: list[str], **options: Any) -> Any:
    return DataLoader(ImageFiles(files, np.arange(len(files)), **options), 64, seed=0, **_OPTIONS)


LOADERS = {
    "recipe": {
        "ours": lambda files: _ours(files, crop=_CROP),
        "ours, flip by albumentations": lambda files: _ours(
            files,
            crop=RandomResizedCrop(SIZE, interpolation=cv2.INTER_LINEAR),
            transform=Albumentations(A.Compose([A.HorizontalFlip(p=0.5)])),
        ),
        "ours, prepared": lambda files: _ours(files, crop=_CROP),
        "torch": _torch_loader,
    },
    "planes": {
        "ours": lambda files: _ours(files, crop=_CROP, normalize=(MEAN, STD)),
        "torch": lambda files: _torch_loader(files, normalised=True),
    },
    "cache": {
        "ours": lambda files: DataLoader(
            DecodedCache(ImageFiles(files, np.arange(len(files))), 8 << 30, crop=_CROP), 64, seed=0, **_OPTIONS
        ),
        "torch": _torch_loader,
    },
    "large": {"ours": lambda files: _ours(files, crop=_CROP), "torch": _torch_loader},
}


def loader(work: str, peer: str, folder: str, repeats: int, epochs: int) -> dict[str, float]:
    """Samples per second after a first epoch, which starts the workers and fills caches.

    Args:
        repeats: how often each file occurs in an epoch.
    """
    torch.set_num_threads(1)
    files = _files(f"{folder}-prepared" if peer.endswith("prepared") else folder)
    made = LOADERS[work][peer](files * (1 if work == "cache" else repeats))
    for _ in made:
        pass
    count, began = 0, time.perf_counter()
    for _ in range(epochs * (repeats if work == "cache" else 1)):
        for batch in made:
            count += len(batch["label"])
    return {"per_s": count / (time.perf_counter() - began)}


def bare(work: str, folder: str, seconds: float, processes: int = 2) -> dict[str, float]:
    """Samples per second of bare loops, one per core: read, decode the region, resize, flip; without a loader."""
    files, pipe = _files(folder), os.pipe()
    for worker in range(processes):
        if os.fork() == 0:
            try:
                os.write(pipe[1], f"{_bare_loop(files, worker, work, seconds)}\n".encode())
            finally:
                os._exit(0)
    os.close(pipe[1])
    with os.fdopen(pipe[0]) as rates:
        return {"per_s": sum(map(float, rates))}


def _bare_loop(files: list[str], worker: int, work: str, seconds: float) -> float:
    from loaders.randomness.streams import Domain, enter_sample

    cv2.setNumThreads(0)
    dataset = ImageFiles(files, crop=_CROP, normalize=(MEAN, STD) if work == "planes" else None)
    row = {"image": np.empty_like(dataset[0]["image"])}
    order = np.random.default_rng(worker).permutation(len(files)).tolist()
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        enter_sample(0, worker, count, Domain.SAMPLE)
        dataset.read_into(order[count % len(order)], row)
        count += 1
    return count / elapsed


def _files(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("*.jpg")))
