"""ResNet-50 (He et al. 2015) with the stride of a block in its 3 x 3 convolution, as is usual today."""

from __future__ import annotations

import torch
from torch import nn

_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.body = nn.Sequential(
            *_convolution(channels, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, out, 1),
        )
        keeps = stride == 1 and channels == out
        self.shortcut = nn.Identity() if keeps else nn.Sequential(*_convolution(channels, out, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def resnet50(classes: int = 1000) -> nn.Sequential:
    """Images (B, 3, H, W) to logits (B, classes)."""
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, blocks in enumerate(_BLOCKS):
        width = 64 << stage
        for block in range(blocks):
            layers.append(_Bottleneck(channels, width, 2 if stage > 0 and block == 0 else 1))
            channels = width * _EXPANSION
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]
