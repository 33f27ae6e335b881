"""A dataset as a NumPy user writes it: torch is imported when the first sample is read, not before."""

from __future__ import annotations

import os
import sys
from typing import Any


class AsksWhoItIs:
    """Its samples describe the worker that reads them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        early = "torch" in sys.modules
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        return {
            "torch was there": early,
            "pid": os.getpid(),
            "id": info.id if info is not None else -1,
            "num_workers": info.num_workers if info is not None else -1,
            "seed": info.seed if info is not None else -1,
            "own dataset": info is not None and info.dataset is self,
        }
