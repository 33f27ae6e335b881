"""How the positions of an epoch are divided: ranks, world sizes, and the tail."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, get_args

Tail = Literal["pad", "drop", "uneven"]


def find_rank(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """(rank, num_replicas): as given, else of torch.distributed if initialised, else RANK and WORLD_SIZE, else (0, 1).

    Raises:
        ValueError: one is known and the other is not, or rank is outside [0, num_replicas).
    """
    if rank is None and num_replicas is None:
        # Looked up, never imported: if torch is not loaded, it is not initialised.
        distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank()), int(distributed.get_world_size())
        rank, num_replicas = _from_environment("RANK"), _from_environment("WORLD_SIZE")
        if rank is None and num_replicas is None:
            return 0, 1
    if rank is None or num_replicas is None:
        missing, known = ("rank", "num_replicas") if rank is None else ("num_replicas", "rank")
        raise ValueError(f"{known} is known and {missing} is not: give both, or set both RANK and WORLD_SIZE")
    if not 0 <= rank < num_replicas:
        raise ValueError(
            f"rank should be in the interval [0, {num_replicas - 1}], but got {rank} of {num_replicas} ranks"
        )
    return rank, num_replicas


def _from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"the environment variable {name} should be a whole number, but is {value!r}") from None


def epoch_length(n: int, tail: Tail, global_batch: int) -> int:
    """The number of positions in an epoch of `n` samples, over all ranks."""
    if tail not in get_args(Tail):
        raise ValueError(f'tail should be "pad", "drop" or "uneven", but got {tail!r}')
    if tail == "uneven":
        return n
    batches = n // global_batch if tail == "drop" else -(-n // global_batch)
    return batches * global_batch
