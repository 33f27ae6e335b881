"""What happens to samples that fail: `on_error="skip"` and `on_error="substitute"`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loaders.batching.assemble import collate_privately, samples_of
from loaders.dispatch import Dispatch, OpenBatch, new_order
from loaders.engines.work import Failure
from loaders.failures import exception_of, skipped
from loaders.rng import Domain, KeyedGenerator
from loaders.stateful import describe

if TYPE_CHECKING:
    from loaders.dataloader import DataLoader
    from loaders.epoch import Epoch


class Chunks(Iterator[list[Any]]):
    """A sampler's keys in chunks whose size can be chosen each time; the last one may be short."""

    def __init__(self, keys: Iterator[Any]) -> None:
        self._keys = keys
        self.size = 0

    def __next__(self) -> list[Any]:
        chunk = [key for _, key in zip(range(self.size), self._keys, strict=False)]
        if not chunk:
            raise StopIteration
        return chunk


def give_up(loader: DataLoader, failure: Failure, in_a_row: int) -> None:
    """Note a failed sample; raise its error if there were too many in a row."""
    loader.errors.append(skipped(failure))
    if in_a_row > loader.max_errors:
        error = exception_of(failure, None)
        limit = f"more than max_errors={loader.max_errors} samples failed in a row; loader.errors lists them"
        error.args = (f"{error.args[0] if error.args else error}\n  {limit}.",)
        raise error


def substitute(loader: DataLoader, dispatch: Dispatch, batch: OpenBatch, in_a_row: int) -> int:
    """Read another sample for every failed row, chosen by the position of the failed one alone.

    Returns:
        How many samples have failed in a row.
    """
    order = batch.order
    keys = list(order.keys)
    generator = KeyedGenerator()
    rows = sorted(batch.failures)
    for row in rows:
        in_a_row += 1
        give_up(loader, batch.failures.pop(row), in_a_row)
        draw = generator.rekey(Domain.SUBSTITUTE, order.seed, order.epoch, order.position + row, order.attempt)
        if type(keys[row]) is int:
            keys[row] = int(draw.integers(len(loader.dataset)))
        else:
            keys[row] = order.keys[int(draw.integers(len(keys)))]
    again = replace(
        new_order(keys, order.position, order.epoch, order.seed, order.spec, order.blocks), attempt=order.attempt + 1
    )
    dispatch.forget(batch)
    batch.order = again
    batch.beside.samples = [] if not loader._plan.by_rows else batch.beside.samples
    dispatch.submit(batch, [(row, row + 1) for row in rows] if loader._plan.by_runs else [(0, len(keys))])
    return in_a_row


class Skipping:
    """Delivers the epoch as if the failed samples were not in the sampler: the batches stay full, in order.

    Batches without a failure before them are delivered from their slot, without a copy. Behind a failure samples move up into
    the batch before, in private memory, until a shorter batch has made up for what is missing.

    Attributes:
        carried: (key, sample) that were moved up but not delivered yet.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.carried: list[tuple[Any, Any]] = []
        self._loader = loader
        self._in_a_row = 0

    def concerns(self, batch: OpenBatch) -> bool:
        """Whether this batch cannot be delivered as it is."""
        if not batch.failures and not self.carried:
            self._in_a_row = 0
        size = self._loader.batch_size
        return bool(batch.failures or self.carried or (size is not None and batch.rows < size))

    def deliver(self, epoch: Epoch, batch: OpenBatch | None) -> tuple[Any, list[Any]] | None:
        """(batch, keys) from what is carried, this batch and those behind it; None if nothing is left."""
        size = self._loader.batch_size or (batch.rows if batch is not None else len(self.carried))
        while batch is not None:
            self._take(epoch, batch)
            batch = epoch.next_complete() if len(self.carried) < size else None
        taken, self.carried = self.carried[:size], self.carried[size:]
        if not taken or (self._loader.drop_last and len(taken) < size):
            return None
        keys = [key for key, _ in taken]
        samples = [sample for _, sample in taken]
        if not self._loader._plan.by_rows:
            return self._loader.collate_fn(samples), keys

        def who(row: int) -> tuple[Any, str | None]:
            return keys[row], describe(self._loader.dataset, keys[row])

        return collate_privately(self._loader._plan.spec, samples, who), keys

    def _take(self, epoch: Epoch, batch: OpenBatch) -> None:
        """Append the good samples of a batch."""
        if batch.broken is not None:
            epoch.discard(batch)
            raise exception_of(batch.broken, batch.worker)
        if not self._loader._plan.by_rows and not batch.failures and not batch.order.raw:
            # It is collated already: ask for its samples instead.
            batch = epoch.again(batch, replace(batch.order, ticket=new_order([], 0, 0, 0, None, ()).ticket, raw=True))
        memories = epoch.lease(batch)
        spec = batch.order.spec
        samples = dict(batch.beside.samples)
        if spec is not None:
            samples = dict(enumerate(samples_of(spec, memories, batch.rows, batch.beside)))
        for row, key in enumerate(batch.order.keys):
            if row in batch.failures:
                self._in_a_row += 1
                give_up(self._loader, batch.failures[row], self._in_a_row)
            else:
                self._in_a_row = 0
                self.carried.append((key, samples[row]))
