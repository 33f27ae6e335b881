"""Randomness that belongs to the sample being read, not to the worker that reads it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def sample_rng() -> np.random.Generator:
    """The random generator of the sample that is being read. Draw from it in `__getitem__` and transforms.

    Outside a `loaders.DataLoader` no position in an epoch is known. There every call gives a new generator keyed by
    63 bits drawn from the process's own global generator: torch's where torch is loaded (a stock DataLoader seeds it
    per worker and epoch, `torch.manual_seed` in the main process), else NumPy's (`np.random.seed`).

    Returns:
        A Philox generator. Not to be kept after the sample is done.
    """
    return np.random.Generator(np.random.Philox(key=_draw_process_key()))


def _draw_process_key() -> int:
    # Looked up, never imported: a NumPy-only process stays one, and there torch's seeds mean nothing.
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "default_generator"):
        return int(torch.empty((), dtype=torch.int64).random_())
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))  # noqa: NPY002  np.random.seed must reach it
