"""Which of several training processes is this? What one draws, the others must not draw as well."""

from __future__ import annotations

import os
import sys
from typing import Any


def process_rank() -> tuple[int, int]:
    """(rank, number of ranks) of this process: torch.distributed's where it runs, else the launcher's, else (0, 1)."""
    # Looked up, never imported: who has not loaded it does not run it.
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
        rank, ranks: what the sampler shards over. Where it knows of no ranks (a sampler of the user's, a Subset for
            each rank, a stream), the processes themselves are told apart.
    """
    return (rank, ranks) if ranks > 1 else process_rank()
