"""A block, the memory of one field of one batch. Its states and the only transitions between them:

FREE ──acquire──► FILLING ──finish──► READY ──lease──► LEASED ──the last view dies──► FREE
                     │                  │                └──► DEVICE_READING ──read──► FREE
                     │                  └───────────── discard ─────────────────────► FREE
                     └──abandon──► ABANDONED ──discard: the last writer is done ────► FREE
"""

from __future__ import annotations

import enum

from loaders.errors import SlotStateError


class BlockState(enum.Enum):
    """The state of a block."""

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    LEASED = "leased"
    DEVICE_READING = "device reading"
    ABANDONED = "abandoned"

    __hash__ = object.__hash__  # an enum's own is Python code


_BEFORE = {
    BlockState.FILLING: (BlockState.FREE,),
    BlockState.READY: (BlockState.FILLING,),
    BlockState.LEASED: (BlockState.READY,),
    BlockState.DEVICE_READING: (BlockState.LEASED,),
    BlockState.ABANDONED: (BlockState.FILLING, BlockState.READY),
    BlockState.FREE: tuple(state for state in BlockState if state is not BlockState.FREE),
}


class Block:
    """`nbytes` bytes at `offset` of the pool's arena: the memory of one field of one batch."""

    __slots__ = ("nbytes", "offset", "state")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.state = BlockState.FREE

    def become(self, state: BlockState) -> None:
        """Move to `state`, or raise SlotStateError if there is no such transition."""
        if self.state not in _BEFORE[state]:
            raise SlotStateError(f"a block that is {self.state.value} cannot become {state.value}.")
        self.state = state
