"""Samples whose every word is known, to be cached. No torch here, so spawned workers start fast."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from loaders import DecodedCache

WORDS = 1 << 16


class Patterns:
    """Arrays of half a MiB whose every word shows its sample; each read appends a byte to `log`."""

    def __init__(self, length: int, log: Path) -> None:
        self.length = length
        self.log = str(log)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, b".")
        os.close(fd)
        return {"image": pattern(index), "label": index}

    @property
    def reads(self) -> int:
        return os.path.getsize(self.log)


def pattern(index: int) -> np.ndarray[Any, Any]:
    return np.arange(index << 32, (index << 32) + WORDS, dtype=np.int64)


def read_at_random(cache: DecodedCache, seed: int) -> None:
    rng = random.Random(seed)
    while cache.cached_count < len(cache):
        index = rng.randrange(len(cache))
        if (cache[index]["image"] != pattern(index)).any():
            os._exit(1)
    os._exit(0)
