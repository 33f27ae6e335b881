"""The last step of a batch: from a complete slot into the caller's hands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import default_convert

from loaders.batching.assemble import assemble, convert
from loaders.batching.slots import SlotPool
from loaders.dispatch import OpenBatch
from loaders.failures import exception_of
from loaders.state import Progress
from loaders.stateful import describe
from loaders.tree import map_tree

if TYPE_CHECKING:
    from loaders.dataloader import DataLoader


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
        spec, sizes = batch.order.spec, [nbytes for _, nbytes in batch.order.blocks]
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
        loader, plan, spec = self._loader, self._loader._plan, batch.order.spec
        if batch.broken is not None or batch.failures:
            self.discard(batch)
            failure = batch.broken or batch.failures[min(batch.failures)]
            raise exception_of(failure, apart=loader.num_workers > 0)
        if plan.by_rows and batch.rows == 0:
            self.discard(batch)
            return loader.collate_fn([])  # which torch does not allow: its own error
        memories = self.lease(batch)
        if spec is not None:
            loader.beside_count += len(batch.beside.samples) + sum(map(len, batch.beside.fields.values()))
            made = assemble(spec, memories, batch.rows, batch.beside, self._namer(batch), loader.collate_fn)
        elif batch.parcel is not None:
            loader.beside_count += sum(isinstance(piece, bytearray) and len(piece) > 0 for piece in batch.parcel.pieces)
            made = batch.parcel.open(memories)
        else:
            made = batch.result
        if not plan.batched and loader.collate_fn is default_convert:
            made = convert(made, self._namer(batch))
        loader._warn_if_many_are_held()
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
            progress.first, progress.keys = batch.first, batch.first + batch.rows
            return
        progress.lanes[batch.lane] = batch.order.keys[0] + 1
        progress.lane = (batch.lane + 1) % len(progress.lanes)
        progress.streams[batch.lane] = batch.stream_state

    def _namer(self, batch: OpenBatch) -> Callable[[int], tuple[Any, str | None]]:
        def name(row: int) -> tuple[Any, str | None]:
            if self._is_stream:
                return None, None
            return batch.order.keys[row], describe(self._loader.dataset, batch.order.keys[row])

        return name

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
