"""Train on patches of large photos without decoding whole photos: prepare once, then read windows.

python examples/patches.py FOLDER

FOLDER holds one folder of photos per class. A small network learns to classify patches; reading patches of the original
photos as well shows what the preparation saves. Preparing changes no pixel if `jpegtran` is installed; here the photos
are re-encoded, so that the example runs anywhere.
"""

import argparse
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from loaders import DataLoader, DevicePrefetcher, ImageFolder, Normalize, RandomPatches

SIDE = 64


def patches_of(folder: Path, per_photo: int, workers: int) -> DataLoader:
    """Batches of windows: each photo gives `per_photo` samples per epoch, shuffled."""
    dataset = ImageFolder(folder, crop=RandomPatches(SIDE, per_photo=per_photo))
    return DataLoader(dataset, batch_size=64, shuffle=True, num_workers=workers, seed=0)


def rate_of(loader: DataLoader) -> float:
    """Samples per second of one epoch, without training."""
    began = time.perf_counter()
    count = sum(len(batch["image"]) for batch in loader)
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder for the prepared photos")
    parser.add_argument("--per-photo", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    command = [sys.executable, "-m", "loaders", "prepare", options.folder, options.prepared, "--quality", "92"]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(1)

    loader = patches_of(options.prepared, options.per_photo, options.workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers: list[torch.nn.Module] = []
    for before, after in pairwise((3, 16, 32, 64)):
        layers += [torch.nn.Conv2d(before, after, 3, stride=2), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
    classes = len(loader.dataset.classes)
    net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, classes))
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    normalize = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), dtype=torch.float32)
    for epoch in range(options.epochs):
        hits = seen = 0
        for batch in DevicePrefetcher(loader, device, transform=normalize):
            scores = net(batch["image"])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(scores, batch["label"]).backward()
            optimizer.step()
            hits += (scores.argmax(1) == batch["label"]).sum().item()
            seen += len(scores)
        print(f"epoch {epoch}: {seen} patches, {hits / seen:.1%} classified correctly in training")

    folders = (options.prepared, options.folder)
    rates = [rate_of(patches_of(folder, options.per_photo, options.workers)) for folder in folders]
    print(f"patches per second: {rates[0]:,.0f} prepared, {rates[1]:,.0f} original")


if __name__ == "__main__":
    main()
