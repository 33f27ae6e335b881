"""Train a tiny network with a checkpoint every few steps. Kill it at any time and restart it: the losses are the same.

python examples/resume.py                     prints the loss of each step
python examples/resume.py --checkpoint FILE   where the state of the run is stored
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from loaders import DataLoader, sample_rng


class Blobs:
    """Noisy images of ten kinds; the noise of a sample differs in every epoch."""

    def __init__(self, count: int) -> None:
        self.kinds = np.random.default_rng(0).normal(size=(10, 1, 12, 12)).astype(np.float32)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = sample_rng().normal(size=(1, 12, 12)).astype(np.float32)
        return {"image": self.kinds[index % 10] + noise, "label": index % 10}


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write under another name first, so that an existing file is always complete."""
    unfinished = path.with_suffix(".part")
    torch.save(checkpoint, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("resume.pt"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=4, help="steps between two checkpoints")
    options = parser.parse_args()

    torch.set_num_threads(1)  # several threads would add in varying order
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(800, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    loader = DataLoader(Blobs(650), batch_size=32, shuffle=True, num_workers=options.workers, seed=0)
    first = step = 0
    if options.checkpoint.exists():
        checkpoint = torch.load(options.checkpoint)
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["loader"])
        torch.set_rng_state(checkpoint["random"])  # for the dropout
        first, step = checkpoint["epoch"], checkpoint["step"]

    for epoch in range(first, options.epochs):
        for batch in loader:
            loss = F.cross_entropy(net(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item()!r}", flush=True)
            if step % options.every == 0:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
                save({**state, "random": torch.get_rng_state(), "epoch": epoch, "step": step}, options.checkpoint)


if __name__ == "__main__":  # workers may be started by importing this file
    main()
