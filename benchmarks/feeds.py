"""Ways to feed a device: generators of batches on it, with images normalised to bfloat16, channels last.

All take a dataset of {"image": uint8 (H, W, 3), "label": int} and the same arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from benchmarks.workloads import MEAN, STD
from loaders import DataLoader, DevicePrefetcher, Normalize

Batches = Generator[dict[str, torch.Tensor], None, None]


def resident(dataset: Any, batch_size: int, workers: int, device: torch.device) -> Batches:
    """One batch that stays on the device; it is normalised in each step, as with all other feeds."""
    samples = [dataset[index] for index in range(batch_size)]
    image = torch.stack([torch.from_numpy(sample["image"]) for sample in samples]).to(device)
    label = torch.tensor([sample["label"] for sample in samples]).to(device)
    normalize = Normalize(MEAN, STD)
    while True:
        yield {"image": normalize(image), "label": label}


def ours(dataset: Any, batch_size: int, workers: int, device: torch.device) -> Batches:
    """`loaders.DataLoader` and `loaders.DevicePrefetcher`."""
    loader: Any = DataLoader(dataset, batch_size, num_workers=workers)
    yield from DevicePrefetcher(loader, device, transform=Normalize(MEAN, STD))


def torchs(dataset: Any, batch_size: int, workers: int, device: torch.device) -> Batches:
    """torch's loader with `pin_memory=True`, copies in the loop with `non_blocking=True`."""
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, pin_memory=_is_cuda(device))
    normalize = Normalize(MEAN, STD)
    for batch in loader:
        image = batch["image"].to(device, non_blocking=True)
        yield {"image": normalize(image), "label": batch["label"].to(device, non_blocking=True)}


def timms(dataset: Any, batch_size: int, workers: int, device: torch.device) -> Batches:
    """torch's loader with the scheme of timm's prefetcher: uint8 batches, copied and normalised one batch ahead.

    Both are done on a side stream that the loop's stream waits for.
    """
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size, num_workers=workers, pin_memory=_is_cuda(device), collate_fn=_stacked
    )
    mean, std = (
        torch.tensor([255 * value for value in values], device=device, dtype=torch.bfloat16).view(1, 3, 1, 1)
        for values in (MEAN, STD)
    )
    side = torch.cuda.Stream(device) if _is_cuda(device) else None
    ready: dict[str, torch.Tensor] | None = None
    for image, label in loader:
        with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
            on_device = image.to(device, non_blocking=True).movedim(-1, 1)
            coming = {
                "image": on_device.to(torch.bfloat16).sub_(mean).div_(std),
                "label": label.to(device, non_blocking=True),
            }
        if ready is not None:
            yield ready
        if side is not None:
            compute = torch.cuda.current_stream(device)
            compute.wait_stream(side)
            for tensor in coming.values():
                tensor.record_stream(compute)
        ready = coming
    if ready is not None:
        yield ready


FEEDS: dict[str, Callable[[Any, int, int, torch.device], Batches]] = {
    "resident": resident,
    "ours": ours,
    "torch": torchs,
    "timm": timms,
}


def _stacked(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.empty((len(samples), *samples[0]["image"].shape), dtype=torch.uint8)
    for row, sample in enumerate(samples):
        images[row] = torch.from_numpy(sample["image"])
    return images, torch.tensor([sample["label"] for sample in samples])


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"
