"""Forked children that have inherited batches.

A child sees the memory of every batch that its parent held when it forked: shared memory, as with torch's own shared
tensors. The parent cannot know what the child looks at, so such a batch counts as held until the child has ended, too.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from multiprocessing.connection import Connection

from loaders.memory.blocks import Block

# In a forked child: the ends that close when it ends, however it ends.
_inherited: list[Connection] = []


class Heirs:
    """Who has inherited which blocks of a pool. The pool calls it under its lock."""

    def __init__(self) -> None:
        self._living: list[tuple[Connection | None, frozenset[Block]]] = []
        self._claimed: list[Block] = []  # free but for their heirs
        self._will: tuple[Connection, Connection, frozenset[Block]] | None = None

    def before_fork(self, leased: Iterable[Block]) -> None:
        """A child is about to inherit the blocks that are `leased`."""
        blocks, self._will = frozenset(leased), None
        if blocks:
            try:
                self._will = (*multiprocessing.Pipe(duplex=False), blocks)
            except OSError:  # no descriptor is left to see the child's end by: it is taken to live for ever
                self._living.append((None, blocks))

    def after_fork_in_parent(self) -> None:
        """From here on the end of the pipe tells that the child has ended."""
        if self._will is not None:
            ours, theirs, blocks = self._will
            self._will = None
            theirs.close()
            self._living.append((ours, blocks))

    def after_fork_in_child(self) -> None:
        """Hold on to the other end."""
        if self._will is not None:
            ours, theirs, _ = self._will
            self._will = None
            ours.close()
            _inherited.append(theirs)

    def claim(self, block: Block) -> bool:
        """Whether a living child has inherited this block; then `ended` gives it later."""
        claimed = any(block in blocks for _, blocks in self._living)
        if claimed:
            self._claimed.append(block)
        return claimed

    def ended(self) -> list[Block]:
        """The blocks that were claimed by children that have ended."""
        living = [(end, blocks) for end, blocks in self._living if end is None or not end.poll()]
        if len(living) == len(self._living):
            return []
        self._living, claimed = living, self._claimed
        self._claimed = []
        return claimed


def release_inherited() -> None:
    """This process looks at no batch it has inherited."""
    while _inherited:
        _inherited.pop().close()
