"""timm's recipe: torch's loader with `fast_collate` to uint8; its prefetcher normalises the whole batch."""

from __future__ import annotations

from typing import Any

from benchmarks.workloads import MEAN, SIZE, STD, Photos

NAME = "timm"
REQUIREMENTS = ("timm==1.0.31", "torch==2.13.0", "torchvision==0.28.0", "pillow==13.0.0", "numpy==2.4.6")


def photos(photos: Photos, batch_size: int, workers: int, normalised: bool) -> Any:
    import torch

    from benchmarks.peers.torchvision_pil import _Opened, import_torchvision

    import_torchvision()
    from timm.data.loader import PrefetchLoader, fast_collate
    from timm.data.transforms_factory import create_transform

    # ImageNet's recipe without colour jitter and random erasing, as for all peers.
    transform = create_transform(
        (3, SIZE, SIZE), is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
    )
    dataset: Any = _Opened(photos, transform)
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, collate_fn=fast_collate
    )
    return PrefetchLoader(loader, mean=MEAN, std=STD, device=torch.device("cpu")) if normalised else loader
