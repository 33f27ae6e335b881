"""The demo's network, its normalisation on the device, and the file it is saved in. Plain `torch.nn`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from loaders import Normalize

SIZE = 80  # pixels, the side of the images the network is trained on
MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 … 1: the values that torchvision's ImageNet models were trained with
STD = (0.229, 0.224, 0.225)

# The prefetcher calls this on the device, so that images are copied to it as uint8.
normalise = Normalize(MEAN, STD, dtype=torch.float32)


class SmallNet(nn.Module):
    """Five convolutions and a linear layer: float (B, 3, H, W) → logits (B, classes). About 0.2 million weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(3, 24, stride=2),
            _block(24, 48, stride=2),
            _block(48, 64, stride=2),
            _block(64, 96, stride=2),
            _block(96, 128),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of normalised images."""
        logits: torch.Tensor = self.head(self.features(image).mean(dim=(2, 3)))
        return logits


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def save(path: Path, net: SmallNet, classes: list[str]) -> None:
    """Save a trained network and the names of its classes in one file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    torch.save({"classes": classes, "weights": net.state_dict()}, partial)
    partial.replace(path)


def load(path: Path) -> tuple[SmallNet, list[str]]:
    """The network that `save` wrote, in evaluation mode on the CPU, and the names of its classes.

    Raises:
        FileNotFoundError: there is no such file; `python -m examples.demo` trains a network.
    """
    if not path.exists():
        raise FileNotFoundError(f'no trained network at "{path}": run `python -m examples.demo` first.')
    kept = torch.load(path, map_location="cpu", weights_only=True)
    net = SmallNet(len(kept["classes"]))
    net.load_state_dict(kept["weights"])
    return net.eval(), kept["classes"]
