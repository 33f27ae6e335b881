"""The last step of a batch: from a complete slot to what the caller gets."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_convert

from loaders.batch.assemble import assemble, collate_privately, convert, samples_of
from loaders.batch.spec import owners
from loaders.dataloader.checkpoint import Position
from loaders.dataloader.dispatch import OpenBatch
from loaders.dataloader.failures import exception_of
from loaders.dataloader.plan import Options, Plan
from loaders.datasets.wrapped import describe
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError
from loaders.memory.slots import SlotPool
from loaders.nested import leaves, map_tree
from loaders.timing import events
from loaders.workers.messages import Failure

_MISFITS = (FieldShapeError, FieldDtypeError, FieldNameError)
# A consumer is warned once if it holds more than this multiple of the open batches and more than this memory.
_MANY_HELD = 4
_MUCH_HELD_NBYTES = 16 << 20


class Delivery:
    """Turns a complete batch into what the caller gets.

    Args:
        plan, options: the loader's.
        told_length: what `len()` of an IterableDataset returned; None if it was not called.
        held: warns once about too many held batches; shared by all iterators of the loader.
    """

    def __init__(self, plan: Plan, options: Options, told_length: int | None, held: HeldWarning) -> None:
        self._plan = plan
        self._options = options
        self._told_length = told_length
        self._held = held

    def make(self, batch: OpenBatch, pool: SlotPool, number: int) -> Any:
        """The batch's tensors over its slot.

        Raises:
            Exception: what failed while this batch was made. Iteration may continue after the batch.
        """
        plan, spec, received = self._plan, batch.task.spec, batch.received
        failures = received.failures if self._options.on_error != "skip" else {}
        if received.broken is not None or failures:
            pool.discard(batch.slot)
            failure = received.broken or failures[min(failures)]
            raise exception_of(failure, apart=self._options.num_workers > 0)
        if plan.by_rows and batch.rows == 0:
            pool.discard(batch.slot)
            return plan.collate_fn([])  # which torch does not allow: raises its own error
        memories = self._lease(batch, pool, number)
        self._measure(batch, memories, pool, number)
        if received.failures:
            made = self._make_shorter(batch, memories)
        elif spec is not None or received.overflow.whole is not None:
            try:
                made = assemble(spec, memories, batch.rows, received.overflow, self._namer(batch), plan.collate_fn)
            except _MISFITS:
                if self._options.on_error != "skip":
                    raise
                made = self._make_shorter(batch, memories)
        elif received.parcel is not None:
            made = received.parcel.open(memories)
        else:
            made = received.value
        if not plan.batched and plan.collate_fn is default_convert:
            made = convert(made, self._namer(batch))
        self._held.look(pool, plan, self._options.num_workers)
        return made

    def finish(self, made: Any, batch: OpenBatch, position: Position) -> Any:
        """What the caller gets for a batch; `position` is the one after it."""
        self._warn_about_length(position)
        if self._options.pin_memory and torch.accelerator.is_available():
            # Tensors in a page-locked slot are returned as they are.
            made = map_tree(lambda leaf: leaf.pin_memory() if _pins_itself(leaf) else leaf, made, is_leaf=_pins_itself)
        if not self._options.return_index:
            return made
        failures = batch.received.failures
        keys = [key for row, key in enumerate(batch.task.keys) if row not in failures] if failures else batch.task.keys
        return made, self._plan.as_indices(keys)

    def after(self, batch: OpenBatch, position: Position, *, handed_out: bool = False) -> Position:
        """The position after a batch that was handed out, raised an error, or was left out."""
        failed, batches = position.failed, position.batches + handed_out
        if batch.left_out:
            known = {entry[0] for entry in failed}
            failed = (*failed, *(entry for entry in batch.left_out if entry[0] not in known))
        if self._plan.fetch != "stream":
            keys = batch.first + len(batch.task.keys)
            return Position(position.epoch, batches, keys, position.origin, failed, first=batch.first)
        lanes, streams = list(position.lanes), list(position.streams)
        lanes[batch.lane] = batch.task.keys[0] + 1
        streams[batch.lane] = batch.received.stream_state
        lane = (batch.lane + 1) % len(lanes)
        return Position(position.epoch, batches, 0, position.origin, failed, tuple(lanes), lane, tuple(streams))

    def _make_shorter(self, batch: OpenBatch, memories: Sequence[Any]) -> Any:
        """The batch without its failed samples, in its own memory; samples that do not fit fail here."""
        plan, spec, received, keys = self._plan, batch.task.spec, batch.received, batch.task.keys
        overflow = received.overflow
        if spec is not None:
            # The row of a failed sample holds arbitrary bytes.
            overflow.samples.extend((row, None) for row in received.failures)
            samples = dict(enumerate(samples_of(spec, memories, batch.rows, overflow)))
        else:
            samples = dict(sorted(overflow.samples, key=lambda pair: pair[0]))
        rows = [row for row in samples if row not in received.failures]
        if not plan.batched:
            return plan.collate_fn(samples[rows[0]])
        if not plan.by_rows:
            return plan.collate_fn([samples[row] for row in rows])
        odd = {row for row, _ in overflow.samples}
        for number, pairs in overflow.fields.items():
            if spec is not None and spec.fields[number].kind == "stack":
                odd |= {row for row, _ in pairs}
        # The sample that the others must fit: the first one that fits the spec, if there is one.
        model = next((row for row in rows if row not in odd), rows[0])

        def collated(rows: Sequence[int]) -> Any:
            def name(at: int) -> tuple[Any, str | None]:
                return keys[rows[at]], describe(self._options.dataset, keys[rows[at]])

            return collate_privately(spec, [samples[row] for row in rows], name, plan.collate_fn)

        try:
            return collated(rows)
        except _MISFITS:
            collated([model])  # if even this one cannot be collated, none is a misfit
        for row in [row for row in rows if row != model]:
            try:
                collated([model, row])
            except _MISFITS as error:
                summary = f"{type(error).__name__}: {error}".splitlines()[0]
                source = describe(self._options.dataset, keys[row])
                received.failures[row] = Failure(row, keys[row], source, "collating", summary, "", None)
                batch.left_out.append((batch.first + row, keys[row], source, summary))
                rows.remove(row)
        return collated(rows)

    def _lease(self, batch: OpenBatch, pool: SlotPool, number: int) -> list[Any]:
        """The memory of a complete batch, one buffer per field or piece; None for those without memory."""
        pool.finish(batch.slot)
        spec, places = batch.task.spec, batch.task.blocks
        names = [field.path for field in spec.fields] if spec is not None else list(map(str, range(len(places))))
        labels = [f"batch {number}, {name!r}" for name in names]
        if len(batch.slot) == len(places):  # each has a block of its own
            return pool.lease(batch.slot, labels)
        owner_of = owners(places)
        owns = [nbytes > 0 and owner_of[each] == each for each, (_, nbytes) in enumerate(places)]
        roots = iter(pool.lease(batch.slot, [label for label, own in zip(labels, owns, strict=True) if own]))
        memories: list[Any] = [next(roots) if is_own else None for is_own in owns]
        for each, owner in enumerate(owner_of):
            if owner != each and places[each][1]:
                memories[each] = memoryview(memories[owner])[places[each][0] - places[owner][0] :]
        return memories

    def _namer(self, batch: OpenBatch) -> Callable[[int], tuple[Any, str | None]]:
        def name(row: int) -> tuple[Any, str | None]:
            if self._plan.fetch == "stream":
                return None, None
            return batch.task.keys[row], describe(self._options.dataset, batch.task.keys[row])

        return name

    def _measure(self, batch: OpenBatch, memories: Sequence[Any], pool: SlotPool, number: int) -> None:
        """Count the bytes that workers wrote, and those that were sent outside the slot."""
        statistics, spec, parcel = batch.statistics, batch.task.spec, batch.received.parcel
        overflow = batch.received.overflow
        if statistics is None:
            return
        if spec is not None:
            statistics.written_nbytes += spec.row_nbytes * batch.rows
            for field, memory in zip(spec.fields, memories, strict=True):
                if field.kind == "ragged":
                    sizes = field.extents(memory, 0, batch.rows).prod(axis=1)
                    statistics.written_nbytes += int(sizes.sum()) * field.dtype.itemsize
            if overflow:
                values = [*overflow.samples, *chain.from_iterable(overflow.fields.values())]
                statistics.overflow_nbytes += sum(_nbytes(value) for _, value in values)
        elif parcel is not None:
            statistics.written_nbytes += sum(piece for piece in parcel.pieces if isinstance(piece, int))
            statistics.overflow_nbytes += sum(len(piece) for piece in parcel.pieces if not isinstance(piece, int))
        if events.traces and batch.opened_ns:
            now = time.perf_counter_ns()
            ready_ns = batch.completed_ns or now
            about = {"ticket": batch.task.ticket, "rows": batch.rows}
            events.add("slots", "", f"batch {number}", batch.opened_ns, now, **about)
            events.add("slots", "", "filling", batch.opened_ns, ready_ns, **about)
            events.add("slots", "", "ready", ready_ns, now, **about)
            events.add("slots", "", "blocks held", now, events.VALUE, blocks=pool.leased_count)

    def _warn_about_length(self, position: Position) -> None:
        """Warn, as torch does, about an IterableDataset that yields more than its reported length."""
        if self._told_length is not None and position.batches > self._told_length:
            split = "Each worker iterates its own copy: shard it with get_worker_info()." if position.lanes[1:] else ""
            warnings.warn(
                f"Length of IterableDataset {self._options.dataset} was reported to be {self._told_length}, but it "
                f"yielded at least {position.batches} batches. {split}",
                stacklevel=6,
            )


def overflow_count(batch: OpenBatch) -> int:
    """How many values of a batch no slot could hold."""
    received = batch.received
    if received.parcel is None and not received.overflow:
        return 0
    count = len(received.overflow.samples) + sum(map(len, received.overflow.fields.values()))
    pieces = received.parcel.pieces if received.parcel is not None else ()
    return count + sum(isinstance(piece, bytearray) and len(piece) > 0 for piece in pieces)


class HeldWarning:
    """Warns once per loader if its consumer holds too many batches."""

    def __init__(self) -> None:
        self._is_told = False

    def look(self, pool: SlotPool, plan: Plan, num_workers: int) -> None:
        """Warn if too many batches are held and no warning was given yet."""
        if self._is_told or pool.leased_nbytes <= _MUCH_HELD_NBYTES:
            return
        depth, fields = plan.depth(max(1, num_workers)), max(1, sum(size > 0 for size in plan.sizes()))
        many = max(8, _MANY_HELD * depth)
        if pool.leased_count // fields > many:
            pool.reclaim()
            held = pool.leased_count // fields
            if held > many and pool.leased_nbytes > _MUCH_HELD_NBYTES:
                self._is_told = True
                warnings.warn(
                    f"{held} batches of this loader are held at once ({pool.leased_nbytes:,} bytes). They are safe to "
                    "keep, but their memory cannot be reused. loader.holders() lists them.",
                    stacklevel=7,
                )


def _pins_itself(node: Any) -> bool:
    """Whether torch would call its `pin_memory()`: a tensor or other object with that method, not a known container."""
    return not isinstance(node, (Mapping, tuple, list, str, bytes)) and hasattr(node, "pin_memory")


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for _, leaf in leaves(value) if _is_dense(leaf))


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided)
