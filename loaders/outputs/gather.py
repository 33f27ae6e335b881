"""Rows of all ranks on rank 0, through torch.distributed's default group, whatever its backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from loaders.errors import CollectError
from loaders.outputs.stores import LengthStore, Rows, Store

ROUND_NBYTES = 64 << 20  # what rank 0 receives at a time, of all ranks together


def rank_and_ranks() -> tuple[int, int]:
    """(this rank, how many there are): (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def together() -> Iterator[None]:
    """An error in one rank is raised in all of them: none is left waiting for another."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  raised below, when the others know
        own = error
    told = _from_all_ranks(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, failure in enumerate(told):
        if failure is not None:
            raise CollectError(f"rank {rank} failed: {failure}")


def gather_rows(store: Store | None, kinds: Sequence[Rows]) -> None:
    """Bring the rows of all ranks into rank 0's store; a rank that added nothing has no store.

    Raises:
        CollectError: the ranks' outputs differ, or only rank 0 has none.
    """
    rank, ranks = rank_and_ranks()
    shares = _from_all_ranks((None if store is None else list(kinds), 0 if store is None else len(store.indices())))
    for other, (theirs, _) in enumerate(shares):
        if theirs is not None and theirs != shares[0][0]:
            raise CollectError(
                f"rank {other} collected {_describe(theirs)}, but rank 0 {_describe(shares[0][0] or [])}.\n"
                "  Every rank adds the same outputs, rank 0 at least one batch, if an empty one."
            )
    if store is None and rank == 0:
        return  # nobody has any
    # gather_object pads what each rank sends to the longest, including the empty part of rank 0.
    row_nbytes = 8 + sum(kind.nbytes for kind in shares[0][0])
    step = max(1, ROUND_NBYTES // ranks // row_nbytes)
    longest = max(rows for _, rows in shares[1:])
    for start in range(0, longest, step):
        received: list[Any] | None = [None] * ranks if rank == 0 else None
        sent = None if rank == 0 or isinstance(store, LengthStore | None) else store.take(start, start + step)
        dist.gather_object(sent, received, dst=0)
        with together():
            for index, arrays in filter(None, received or ()):
                assert store is not None
                store.put(index, arrays)


def _from_all_ranks(value: Any) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def _describe(kinds: Sequence[Rows]) -> str:
    said = [f"{kind.name or 'one tensor'} of {kind.dtype} rows {kind.shape}" for kind in kinds]
    return ", ".join(said) if said else "nothing"
