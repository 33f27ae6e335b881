"""Leases: a reader's hold on one block."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from loaders.memory.blocks import Block


class Lease(weakref.ref[Any]):
    """Ends when the exporter of a block's buffer is gone, and is then put into the pool's queue of ended leases."""

    __slots__ = ("address", "block", "label", "named", "since_s", "streams")
    block: Block
    label: str
    since_s: float
    address: int
    streams: set[Hashable] | None  # device streams that may read the block; None: readers wait for their reads
    named: set[Hashable]  # streams that the user named as reading it
