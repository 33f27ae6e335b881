"""The rank of this training process, so that ranks do not draw the same random numbers."""

from __future__ import annotations

import os
import sys
from typing import Any


def process_rank() -> tuple[int, int]:
    """(rank, number of ranks) of this process: torch.distributed's where it runs, else the launcher's, else (0, 1)."""
    # Looked up, never imported: if it is not loaded, it is not initialised.
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, ranks) if 0 <= rank < ranks else (0, 1)


def drawing_rank(rank: int, ranks: int) -> tuple[int, int]:
    """The rank and number of ranks that random numbers are keyed by.

    Args:
        rank, ranks: those of the sampler. If it does not shard (a sampler of the user, a Subset for each rank, a
            stream), those of the process are used.
    """
    return (rank, ranks) if ranks > 1 else process_rank()
