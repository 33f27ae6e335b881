"""The demo's training run: a folder of photographs in, a trained network and a record of the run out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import torch
from rich.console import Console
from torch.nn import functional as F

from loaders import (
    Albumentations,
    DataLoader,
    DatasetError,
    DevicePrefetcher,
    ImageFolder,
    numpy_collate,
    to_image,
    to_numpy,
)

from .display import Display
from .network import MEAN, SIZE, STD, SmallNet, normalise
from .record import EpochRecord, Guess, Run, WindowRecord

BATCH_SIZE = 64
STEPS_PER_WINDOW = 10  # the loss is read only this often: reading it waits for the device
PEAK_RATE = 3e-3
GUESSES = 20
SEED = 0


def train(
    folder: Path, *, epochs: int, workers: int, device: torch.device, console: Console
) -> tuple[SmallNet, list[str], Run]:
    """Train on folder/train/<class>/…, validate on folder/val/<class>/… after every epoch.

    Returns:
        the network, the names of its classes, and the record of the run.

    Raises:
        DatasetError: the two folders do not have the same classes.
    """
    torch.manual_seed(SEED)  # the weights, the order and, through the seeds of the workers, every augmentation
    photos, val_photos = photo_set(folder / "train", augment=True), photo_set(folder / "val", augment=False)
    classes = list(photos.classes)
    if classes != list(val_photos.classes):
        raise DatasetError(f'"{folder}": train/ and val/ must hold folders of the same names, one for each class.')

    net = SmallNet(len(classes)).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stubs lack this argument
    trainer = Trainer(net, photo_loader(photos, workers, shuffle=True), epochs, device)
    val_batches = DevicePrefetcher(photo_loader(val_photos, workers, shuffle=False), device, transform=normalise)
    done: list[EpochRecord] = []
    start_s = time.perf_counter()
    with Display(console, epochs, len(photos)) as display:
        for _ in range(epochs):
            display.start_epoch()
            windows = []
            for window in trainer.train_epoch():
                display.show_window(window)
                windows.append(window)
            done.append(EpochRecord(windows, accuracy(net, val_batches)))
            display.end_epoch(done[-1])
    seconds = time.perf_counter() - start_s
    return net, classes, Run(done, guess(net, val_photos, classes, device), seconds)


def photo_set(folder: Path, *, augment: bool) -> ImageFolder:
    """Samples {"image": uint8 (SIZE, SIZE, 3), "label": int}, cropped and coloured at random, or only resized."""
    steps = [A.Resize(SIZE, SIZE, interpolation=cv2.INTER_AREA)]
    if augment:
        steps = [
            A.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.5, 1.0)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.01),
        ]
    return ImageFolder(folder, transform=Albumentations(A.Compose(steps)))


def photo_loader(photos: ImageFolder, workers: int, *, shuffle: bool) -> DataLoader[Any]:
    """Batches {"image": uint8 (B, SIZE, SIZE, 3), "label": int64 (B,)}."""
    return DataLoader(
        photos,
        batch_size=BATCH_SIZE,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class TimedLoader:
    """A loader that adds up in `waited_s` how long its reader waits for batches."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.waited_s = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start_s = time.perf_counter()
        for batch in self.loader:
            self.waited_s += time.perf_counter() - start_s
            yield batch
            start_s = time.perf_counter()


class Trainer:
    """Trains `net`, which is on `device`, for `epochs` passes over `loader`: AdamW, one-cycle rate."""

    def __init__(self, net: SmallNet, loader: DataLoader[Any], epochs: int, device: torch.device) -> None:
        self.net = net
        self.timed = TimedLoader(loader)
        self.batches = DevicePrefetcher(self.timed, device, transform=normalise)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.05)
        steps = epochs * len(loader)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK_RATE, total_steps=steps)

    def train_epoch(self) -> Iterator[WindowRecord]:
        """Train on every batch once; yields a window every STEPS_PER_WINDOW steps, and at the end."""
        self.net.train()
        start_s, samples, self.timed.waited_s = time.perf_counter(), 0, 0.0
        for step, batch in enumerate(self.batches, start=1):
            loss = F.cross_entropy(self.net(batch["image"]), batch["label"])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            self.optimizer.step()
            self.schedule.step()
            samples += len(batch["label"])
            if step % STEPS_PER_WINDOW == 0 or step == len(self.timed):
                last_loss, now_s = loss.item(), time.perf_counter()
                yield WindowRecord(now_s - start_s, self.timed.waited_s, samples, last_loss)
                start_s, samples, self.timed.waited_s = now_s, 0, 0.0


@torch.inference_mode()
def accuracy(net: SmallNet, batches: DevicePrefetcher) -> float:
    """The share (0 … 1) of the samples in `batches` whose class `net` gives the highest score."""
    net.eval()
    right = [net(batch["image"]).argmax(dim=1) == batch["label"] for batch in batches]
    return torch.cat(right).float().mean().item()


@torch.inference_mode()
def guess(net: SmallNet, photos: ImageFolder, classes: list[str], device: torch.device) -> list[Guess]:
    """The predictions of `net` for GUESSES photographs, spread evenly over `photos`."""
    net.eval()
    picked = [(2 * place + 1) * len(photos) // (2 * GUESSES) for place in range(GUESSES)]
    batches = [numpy_collate([photos[index] for index in picked])]
    (batch,) = DevicePrefetcher(batches, device, transform=normalise)
    confidence, index = net(batch["image"]).softmax(dim=1).max(dim=1)
    found = to_numpy({"confidence": confidence, "index": index, "label": batch["label"]})
    images = to_image(batch["image"], MEAN, STD)
    return [
        Guess(image, classes[label], classes[index], float(confidence))
        for image, label, index, confidence in zip(
            images, found["label"], found["index"], found["confidence"], strict=True
        )
    ]
