"""Leases: a reader's hold on one block."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from loaders.memory.blocks import Block


class Lease(weakref.ref[Any]):
    """Dies with the exporter of a block's buffer, and then stands in the pool's queue of ended leases."""

    __slots__ = ("address", "block", "label", "named", "since_s", "streams")
    block: Block
    label: str
    since_s: float
    address: int
    streams: set[Hashable] | None  # of the device, that may read the block; None: whoever reads it waits for that
    named: set[Hashable]  # streams that the user said to read it
