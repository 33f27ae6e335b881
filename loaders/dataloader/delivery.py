"""The last step of a batch: from a complete slot into the caller's hands."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_convert

from loaders.batch.assemble import assemble, convert
from loaders.dataloader.checkpoint import Progress
from loaders.dataloader.dispatch import OpenBatch
from loaders.dataloader.failures import exception_of
from loaders.datasets.wrapped import describe
from loaders.memory.slots import SlotPool
from loaders.nested import leaves, map_tree
from loaders.timing import events

if TYPE_CHECKING:
    from loaders.dataloader.loader import DataLoader


# A consumer that holds this many times the open batches is told once, if it is also this much memory.
_MANY_HELD = 4
_MUCH_HELD_NBYTES = 16 << 20


class Delivery:
    """Hands out the batches of one epoch, and keeps count of them.

    Args:
        loader: whose batches these are.
        pool: where their slots are.
        progress: what was handed out.
    """

    def __init__(self, loader: DataLoader[Any], pool: SlotPool, progress: Progress) -> None:
        self._loader = loader
        self._pool = pool
        self._progress = progress
        self._is_stream = loader._plan.fetch == "stream"
        # As it was told before this epoch; of map-style datasets it is None.
        self._length: int | None = getattr(loader, "_IterableDataset_len_called", None)

    def discard(self, batch: OpenBatch) -> None:
        """Give a batch's slot back undelivered."""
        self._pool.discard(batch.slot)

    def lease(self, batch: OpenBatch) -> list[Any]:
        """The memory of a complete batch, one exporter per field or piece; None for those without."""
        self._pool.finish(batch.slot)
        spec, sizes = batch.task.spec, [nbytes for _, nbytes in batch.task.blocks]
        names = [field.path for field in spec.fields] if spec is not None else map(str, range(len(sizes)))
        number = self._progress.batches
        labels = [f"batch {number}, {name!r}" for name, nbytes in zip(names, sizes, strict=True) if nbytes]
        roots = iter(self._pool.lease(batch.slot, labels))
        return [next(roots) if nbytes else None for nbytes in sizes]

    def make(self, batch: OpenBatch) -> Any:
        """The batch's tensors over its slot.

        Raises:
            The user's own exception, if one came up while this batch was made. Whoever goes on goes on behind it.
        """
        self._note(batch)
        loader, plan, spec = self._loader, self._loader._plan, batch.task.spec
        if batch.broken is not None or batch.failures:
            self.discard(batch)
            failure = batch.broken or batch.failures[min(batch.failures)]
            raise exception_of(failure, apart=loader.num_workers > 0)
        if plan.by_rows and batch.rows == 0:
            self.discard(batch)
            return loader.collate_fn([])  # which torch does not allow: its own error
        memories = self.lease(batch)
        self._measure(batch, memories)
        if spec is not None or batch.overflow.whole is not None:
            loader.overflow_count += len(batch.overflow.samples) + sum(map(len, batch.overflow.fields.values()))
            made = assemble(spec, memories, batch.rows, batch.overflow, self._namer(batch), loader.collate_fn)
        elif batch.parcel is not None:
            loader.overflow_count += sum(
                isinstance(piece, bytearray) and len(piece) > 0 for piece in batch.parcel.pieces
            )
            made = batch.parcel.open(memories)
        else:
            made = batch.value
        if not plan.batched and loader.collate_fn is default_convert:
            made = convert(made, self._namer(batch))
        self._warn_if_many_are_held()
        return made

    def finish(self, made: Any, keys: Sequence[Any]) -> Any:
        """What the caller gets of a batch."""
        self._progress.batches += 1
        self._warn_about_length()
        if self._loader.pin_memory and torch.accelerator.is_available():
            # What its slot was locked for stays as it is.
            made = map_tree(lambda leaf: leaf.pin_memory() if _pins_itself(leaf) else leaf, made, is_leaf=_pins_itself)
        return (made, self._loader._plan.as_indices(keys)) if self._loader.return_index else made

    def _note(self, batch: OpenBatch) -> None:
        progress = self._progress
        if not self._is_stream:
            progress.first, progress.keys = batch.first, batch.first + len(batch.task.keys)
            return
        progress.lanes[batch.lane] = batch.task.keys[0] + 1
        progress.lane = (batch.lane + 1) % len(progress.lanes)
        progress.streams[batch.lane] = batch.stream_state

    def _namer(self, batch: OpenBatch) -> Callable[[int], tuple[Any, str | None]]:
        def name(row: int) -> tuple[Any, str | None]:
            if self._is_stream:
                return None, None
            return batch.task.keys[row], describe(self._loader.dataset, batch.task.keys[row])

        return name

    def _measure(self, batch: OpenBatch, memories: Sequence[Any]) -> None:
        """Count the bytes that workers wrote, and those that travelled beside the slot."""
        measures, spec, parcel = batch.measures, batch.task.spec, batch.parcel
        if measures is None:
            return
        if spec is not None:
            measures.written_nbytes += spec.row_nbytes * batch.rows
            for field, memory in zip(spec.fields, memories, strict=True):
                if field.kind == "ragged":
                    sizes = field.extents(memory, 0, batch.rows).prod(axis=1)
                    measures.written_nbytes += int(sizes.sum()) * field.dtype.itemsize
            if batch.overflow:
                values = [*batch.overflow.samples, *chain.from_iterable(batch.overflow.fields.values())]
                measures.overflow_nbytes += sum(_nbytes(value) for _, value in values)
        elif parcel is not None:
            measures.written_nbytes += sum(piece for piece in parcel.pieces if isinstance(piece, int))
            measures.overflow_nbytes += sum(len(piece) for piece in parcel.pieces if not isinstance(piece, int))
        if events.traces and batch.opened_ns:
            now, number = time.perf_counter_ns(), self._progress.batches
            ready_ns = batch.completed_ns or now
            about = {"ticket": batch.task.ticket, "rows": batch.rows}
            events.add("slots", "", f"batch {number}", batch.opened_ns, now, **about)
            events.add("slots", "", "filling", batch.opened_ns, ready_ns, **about)
            events.add("slots", "", "ready", ready_ns, now, **about)
            events.add("slots", "", "blocks held", now, events.VALUE, blocks=self._pool.leased_count)

    def _warn_if_many_are_held(self) -> None:
        loader, pool = self._loader, self._pool
        depth, fields = loader._plan.depth(max(1, loader.num_workers)), max(1, len(loader._plan.sizes()))
        many = max(8, _MANY_HELD * depth)
        if not loader._told_of_held and pool.leased_count // fields > many:
            pool.reclaim()
            held = pool.leased_count // fields
            if held > many and pool.leased_nbytes > _MUCH_HELD_NBYTES:
                loader._told_of_held = True
                warnings.warn(
                    f"{held} batches of this loader are held at once ({pool.leased_nbytes:,} bytes). They are safe to "
                    "keep, but their memory cannot be used again. loader.holders() lists them.",
                    stacklevel=4,
                )

    def _warn_about_length(self) -> None:
        """torch's own warning about an IterableDataset that yields more than its length."""
        if self._length is not None and self._progress.batches > self._length:
            split = (
                "Each worker iterates its own copy: split it by get_worker_info()." if self._progress.lanes[1:] else ""
            )
            warnings.warn(
                f"Length of IterableDataset {self._loader.dataset} was told to be {self._length}, but there are at "
                f"least {self._progress.batches} batches of it. {split}",
                stacklevel=4,
            )


def _pins_itself(node: Any) -> bool:
    """As torch decides it: tensors, and what has a method for it and is no container that torch knows."""
    return not isinstance(node, (Mapping, tuple, list, str, bytes)) and hasattr(node, "pin_memory")


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for _, leaf in leaves(value) if _is_dense(leaf))


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided)
