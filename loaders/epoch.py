"""One pass over a dataset: opens batches ahead of the consumer, delivers them in order."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch.utils.data import default_convert

from loaders.batching.assemble import assemble
from loaders.batching.rows import RowWriter
from loaders.dispatch import Dispatch, OpenBatch, new_order
from loaders.engines.protocol import describe_reading
from loaders.engines.work import Order
from loaders.errors import WorkerTimeoutError, describe_sample
from loaders.failures import exception_of
from loaders.policy import Chunks, Skipping, substitute
from loaders.stateful import describe

if TYPE_CHECKING:
    from loaders.dataloader import DataLoader

# A run is sized to take about this long: long enough that its round trip costs nothing, short enough to share.
_RUN_S = 0.0015
# How many runs the first batches are cut into, per worker, while the cost of a sample is not known.
_FIRST_RUNS = 4
_POLL_S = 5.0


class Epoch(Iterator[Any]):
    """The iterator of a `DataLoader`.

    Args:
        loader: whose batches these are.
        dispatch: the engine's open batches.
        keys: what the sampler gives: a list of keys per batch, or one key where batching is off; None for streams.
        number: of this epoch, counted by the loader.
        seed: of the samples' randomness.
        owns_engine: True where the workers end with this epoch.
    """

    def __init__(
        self,
        loader: DataLoader,
        dispatch: Dispatch,
        keys: Iterator[Any] | None,
        number: int,
        seed: int,
        *,
        owns_engine: bool,
    ) -> None:
        self._loader = loader
        self._dispatch = dispatch
        self._plan = loader._plan
        self._keys = keys
        self._number = number
        self._seed = seed
        self._position = 0
        self._delivered = 0
        self._lanes = [0] * dispatch.engine.num_workers  # streams: serial of the next batch per worker; -1 if ended
        self._lane = 0
        self._open: deque[OpenBatch] = deque()
        self._error: Exception | None = None  # of the sampler: raised behind the batches that came before it
        self._exhausted = False
        self._skipping = Skipping(loader) if loader.on_error == "skip" else None
        self._failed_in_a_row = 0
        self._stop = weakref.finalize(self, _stop, dispatch, self._open, owns_engine)
        if loader.num_workers > 0:
            self._top_up()

    def __next__(self) -> Any:
        if not self._stop.alive:
            raise StopIteration
        batch = self.next_complete()
        if self._skipping is not None and (self._skipping.carried if batch is None else self._skipping.concerns(batch)):
            delivered = self._skipping.deliver(self, batch)
            if delivered is None:
                self._end()
            made, keys = delivered
        elif batch is None:
            self._end()
        else:
            made, keys = self._make(batch), batch.order.keys
        self._delivered += 1
        self._warn_about_length()
        made = self._loader._pinned(made)
        return (made, self._plan.as_indices(keys)) if self._loader.return_index else made

    def __len__(self) -> int:
        return len(self._loader)

    def _end(self) -> NoReturn:
        self._stop()
        self._loader._pool_is_idle()
        if self._error is not None:
            raise self._error
        raise StopIteration

    # -- opening batches

    def _top_up(self) -> None:
        """Keep as many batches open as the plan says, as long as there are keys."""
        while not self._exhausted and len(self._open) < self._plan.depth(self._dispatch.engine.num_workers):
            # The first sample tells what a batch looks like; only then can more of them be opened.
            if self._plan.by_rows and self._plan.spec is None and self._open:
                return
            try:
                if self._keys is None:
                    self._open_stream()
                else:
                    self._open_keys(self._next_keys(self._keys))
            except StopIteration:
                self._exhausted = True
            except Exception as error:
                self._error, self._exhausted = error, True

    def _next_keys(self, keys: Iterator[Any]) -> Any:
        if isinstance(keys, Chunks) and self._skipping is not None and self._loader.batch_size:
            # A shorter batch makes up for samples that were moved up into those before it.
            taken = len(self._skipping.carried) + sum(batch.rows for batch in self._open)
            keys.size = self._loader.batch_size - taken % self._loader.batch_size
        return next(keys)

    def _open_keys(self, drawn: Any) -> None:
        keys = list(drawn) if self._plan.batched else [drawn]
        self._plan.room = max(self._plan.room, len(keys))
        batch = self._new_batch(keys, self._position, len(keys))
        self._position += len(keys)
        self._start(batch)

    def _open_stream(self) -> None:
        if all(serial < 0 for serial in self._lanes):
            raise StopIteration
        while self._lanes[self._lane] < 0:
            self._lane = (self._lane + 1) % len(self._lanes)
        serial, lane = self._lanes[self._lane], self._lane
        self._lanes[lane] += 1
        self._lane = (lane + 1) % len(self._lanes)
        rows = self._plan.room
        # Each worker has a stream of its own: so has the randomness of its samples.
        batch = self._new_batch([serial], (lane << 40) + serial * rows, rows)
        batch.lane = lane
        self._start(batch)

    def _new_batch(self, keys: Sequence[Any], position: int, rows: int) -> OpenBatch:
        sizes = self._plan.sizes()
        slot = self._dispatch.engine.pool.acquire([size for size in sizes if size > 0])
        at = iter(slot)
        blocks = [(block.offset, block.nbytes) if (block := next(at) if size > 0 else None) else (0, 0) for size in sizes]
        order = new_order(keys, position, self._number, self._seed, self._plan.spec, blocks)
        return OpenBatch(order, slot, rows)

    def _start(self, batch: OpenBatch) -> None:
        self._open.append(batch)
        if not self._plan.by_runs:
            self._dispatch.submit(batch, [(0, len(batch.order.keys))])
        elif batch.order.spec is None:
            batch.asked = min(1, batch.rows)
            self._dispatch.submit(batch, [(0, batch.asked)] if batch.rows else [])
        else:
            self._dispatch.submit(batch, self._runs(0, batch.rows))

    def _runs(self, start: int, rows: int) -> list[tuple[int, int]]:
        """Rows `start` to `rows`, cut so that every worker has a share and a run takes one to two milliseconds."""
        workers = self._dispatch.engine.num_workers
        share = math.ceil((rows - start) / workers)
        if self._loader.num_workers == 0:
            length = share
        elif self._dispatch.cost_s == 0.0:
            length = math.ceil(share / _FIRST_RUNS)
        else:
            length = min(share, int(_RUN_S / self._dispatch.cost_s) + 1)
        return [(row, min(row + length, rows)) for row in range(start, rows, max(1, length))]

    # -- waiting

    def next_complete(self) -> OpenBatch | None:
        """The batch to deliver next, once it is complete; None at the end."""
        self._dispatch.collect(0)
        deadline = time.monotonic() + self._loader.timeout if self._loader.timeout > 0 else None
        while True:
            self._top_up()
            batch = self._choose()
            if batch is None and not self._open:
                return None
            if batch is not None and self._is_whole(batch):
                self._open.remove(batch)
                self._dispatch.forget(batch)
                self._top_up()
                return batch
            if batch is None and not self._dispatch.collect(
                None if deadline is None else max(0.0, deadline - time.monotonic())
            ) and deadline is not None and time.monotonic() >= deadline:
                self._time_out()

    def _choose(self) -> OpenBatch | None:
        """The first open batch if it is complete; without `in_order` the first that is."""
        for batch in self._open:
            if batch.complete:
                return batch
            if self._loader.in_order:
                return None
        return None

    def _is_whole(self, batch: OpenBatch) -> bool:
        """Whether a batch whose runs are all reported can be delivered; else it goes on."""
        if self._keys is None and batch.rows == 0:
            self._lanes[batch.lane] = -1
            self._drop(batch)
            return False
        if batch.outcome_spec is not None and batch.order.spec is None:
            self._begin_rows(batch)
            return batch.complete
        if self._plan.by_runs and batch.order.spec is None and self._loader.on_error != "raise" and batch.asked < batch.rows:
            # The sample that was to show the spec failed: ask the next one.
            batch.asked += 1
            self._dispatch.submit(batch, [(batch.asked - 1, batch.asked)])
            return False
        if self._loader.on_error == "substitute" and batch.failures:
            self._failed_in_a_row = substitute(self._loader, self._dispatch, batch, self._failed_in_a_row)
            return batch.complete
        return True

    def _begin_rows(self, batch: OpenBatch) -> None:
        """The first sample is there: from now on every batch has a slot."""
        if self._plan.spec is None:
            self._plan.spec = batch.outcome_spec
        full = self._new_batch(batch.order.keys, batch.order.position, batch.rows)
        self._dispatch.forget(batch)
        offsets = [offset for offset, _ in full.order.blocks]
        batch.order, batch.slot, seen = full.order, full.slot, batch.beside.samples
        batch.beside.samples = []
        writer = RowWriter(self._plan.spec, self._dispatch.engine.pool.arena.buffer, offsets, batch.rows)
        for row, sample in seen:
            writer.write(row, sample, batch.beside)
        if self._plan.by_runs and batch.asked < batch.rows:
            self._dispatch.submit(batch, self._runs(batch.asked, batch.rows))
            batch.asked = batch.rows
        self._top_up()

    def _drop(self, batch: OpenBatch) -> None:
        self._open.remove(batch)
        self._dispatch.forget(batch)
        self._dispatch.engine.pool.discard(batch.slot)

    def _time_out(self) -> None:
        orders = {batch.order.ticket: batch.order for batch in self._open}
        dataset = self._loader.dataset
        busy = [
            f"{describe_sample(key, describe(dataset, key))} for {since_s:.1f} s"
            for key, since_s in describe_reading(self._dispatch.engine.reading(), orders)
        ]
        self._stop()
        self._loader._forget_engine()
        raise WorkerTimeoutError(
            f"DataLoader timed out after {self._loader.timeout} seconds; being read: {'; '.join(busy) or 'nothing'}.\n"
            "  Read that sample by itself, or raise timeout=."
        )

    # -- delivering

    def discard(self, batch: OpenBatch) -> None:
        """Give a batch's slot back undelivered."""
        self._dispatch.engine.pool.discard(batch.slot)

    def lease(self, batch: OpenBatch) -> list[Any]:
        """The memory of a complete batch, one exporter per field (None for fields without) or per block."""
        pool, spec = self._dispatch.engine.pool, batch.order.spec
        pool.finish(batch.slot)
        name = f"batch {self._delivered}"
        if spec is None:
            return pool.lease(batch.slot, [name] * len(batch.slot))
        roots = iter(pool.lease(batch.slot, [f"{name}, {f.path!r}" for f in spec.fields if f.kind != "object"]))
        return [None if field.kind == "object" else next(roots) for field in spec.fields]

    def again(self, batch: OpenBatch, order: Order) -> OpenBatch:
        """Do a complete batch once more, under another order, and wait for it."""
        self.discard(batch)
        batch = OpenBatch(order, [], batch.rows, batch.lane)
        self._open.appendleft(batch)
        self._dispatch.submit(batch, [(0, batch.rows)])
        while not batch.complete:
            self._dispatch.collect(None)
        self._open.popleft()
        self._dispatch.forget(batch)
        return batch

    def _make(self, batch: OpenBatch) -> Any:
        """The batch's tensors over its slot.

        Raises:
            The user's own exception, if one came up while this batch was made.
        """
        plan, loader, spec = self._plan, self._loader, batch.order.spec
        if batch.broken is not None or batch.failures:
            self.discard(batch)
            failure = batch.broken or batch.failures[min(batch.failures)]
            raise exception_of(failure, batch.worker if loader.num_workers else None)
        if plan.by_rows and spec is None:
            return loader.collate_fn([])  # an empty batch, which torch does not allow: its own error
        memories = self.lease(batch)
        if spec is not None:
            if batch.beside.needs:
                plan.grow(batch.beside.needs)
            loader.beside_count += len(batch.beside.samples) + sum(map(len, batch.beside.fields.values()))
            made = assemble(spec, memories, batch.rows, batch.beside, self._namer(batch))
        elif batch.parcel is not None:
            loader.beside_count += sum(not isinstance(piece, int) for piece in batch.parcel.pieces)
            plan.learn(batch.parcel)
            made = batch.parcel.open(memories)
        else:
            made = batch.result
        if not plan.batched and loader.collate_fn is default_convert:
            made = default_convert(made)
        loader._warn_if_many_are_held()
        return made

    def _namer(self, batch: OpenBatch) -> Callable[[int], tuple[Any, str | None]]:
        def name(row: int) -> tuple[Any, str | None]:
            if self._keys is None:
                return None, None
            return batch.order.keys[row], describe(self._loader.dataset, batch.order.keys[row])

        return name

    def _warn_about_length(self) -> None:
        """torch's own warning about an IterableDataset that yields more than its length."""
        length = getattr(self._loader, "_IterableDataset_len_called", None)
        if self._keys is None and length is not None and self._delivered > length:
            warnings.warn(
                f"Length of IterableDataset {self._loader.dataset} was reported to be {length} (when accessing "
                f"len(dataloader)), but {self._delivered} samples have been fetched. "
                + ("Each worker iterates its own copy: split it by get_worker_info()." if self._lanes[1:] else ""),
                stacklevel=3,
            )


def _stop(dispatch: Dispatch, open_batches: deque[OpenBatch], owns_engine: bool) -> None:
    # Runs when an epoch is exhausted, dropped or garbage: it must not know the epoch itself.
    if owns_engine:
        dispatch.close(list(open_batches))
    else:
        dispatch.abandon(list(open_batches))
    open_batches.clear()
