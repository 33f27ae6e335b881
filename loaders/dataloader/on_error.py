"""What happens to samples that fail: `on_error="skip"` and `on_error="substitute"`."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler

from loaders.batch.assemble import collate_privately, samples_of
from loaders.batch.rows import Overflow
from loaders.dataloader.dispatch import Dispatch, OpenBatch, new_ticket
from loaders.dataloader.failures import exception_of, say_more, skipped
from loaders.datasets.wrapped import describe
from loaders.randomness.streams import Domain, KeyedGenerator
from loaders.workers.messages import Failure

if TYPE_CHECKING:
    from loaders.dataloader.checkpoint import Progress
    from loaders.dataloader.epoch import Epoch
    from loaders.dataloader.loader import DataLoader


def give_up(loader: DataLoader[Any], progress: Progress, position: int, failure: Failure, in_a_row: int) -> None:
    """Note a failed sample; raise its error if there were too many in a row."""
    entry = skipped(failure)
    loader.errors.append(entry)
    progress.failed.append((position, entry.index, entry.source, entry.error))
    if in_a_row > loader.max_errors:
        error = exception_of(failure, apart=loader.num_workers > 0)
        say_more(error, f"more than max_errors={loader.max_errors} samples failed in a row; loader.errors lists them.")
        try:
            raise error
        finally:
            del error  # whose traceback holds this frame


class Substituting:
    """Reads another sample for every failed row, chosen by the position of the failed one alone."""

    def __init__(self, loader: DataLoader[Any], progress: Progress) -> None:
        self._loader = loader
        self._progress = progress
        self._in_a_row = 0

    def is_whole(self, dispatch: Dispatch, batch: OpenBatch) -> bool:
        """Whether a complete batch has all its samples; else substitutes are asked for.

        Raises:
            The error of the last sample, if too many have failed in a row.
        """
        keys, generator = list(batch.task.keys), KeyedGenerator()
        # In the order in which one reader would have met them: the batch first, then what was read instead.
        for row in batch.replaced or range(batch.rows):
            if row not in batch.failures:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            give_up(self._loader, self._progress, batch.first + row, batch.failures[row], self._in_a_row)
            keys[row] = self._other_key(batch, row, generator)
        if batch.broken is not None or not batch.failures:
            return True
        old, by_runs = batch.task, self._loader._plan.by_runs
        batch.replaced = sorted(batch.failures)
        batch.failures = {}
        if not by_runs:
            batch.overflow = Overflow()
        dispatch.forget(batch)
        batch.task = replace(old, ticket=new_ticket(), keys=keys, attempt=old.attempt + 1)
        dispatch.submit(batch, [(row, row + 1) for row in batch.replaced] if by_runs else [(0, len(keys))])
        return False

    def _other_key(self, batch: OpenBatch, row: int, generator: KeyedGenerator) -> Any:
        task = batch.task
        position = task.position + row * task.stride
        draw = generator.rekey(Domain.SUBSTITUTE, task.seed, task.epoch, position, task.attempt)
        if type(task.keys[row]) is int and hasattr(self._loader.dataset, "__len__"):
            return int(draw.integers(len(self._loader.dataset)))
        return task.keys[int(draw.integers(len(task.keys)))]


class Skipping:
    """Delivers the epoch as if the failed samples were not in the sampler: the batches stay full, in order.

    Batches without a failure before them are delivered from their slot, without a copy. Behind a failure samples move
    up into the batch before, in private memory, until a shorter batch has made up for what is missing. The batches of
    a `batch_sampler` of the user's keep their sizes.

    Attributes:
        carried: (position, key, sample) that were moved up but not delivered yet.
        delivered: how many of this rank's keys the batches delivered so far have used up, failed ones included.
        batch_size: of every batch but the last; None where a batch sampler of the user's decides.
        sizes: of that one's batches that were taken apart and not delivered yet.
        sized: the position behind the last of these batches.
    """

    def __init__(self, loader: DataLoader[Any], progress: Progress) -> None:
        self._progress = progress
        # Found by an earlier run behind what it delivered: they fail again, also where they could be read by now.
        self._known = {entry[0]: entry for entry in progress.failed if entry[0] >= progress.keys}
        progress.failed = [entry for entry in progress.failed if entry[0] < progress.keys]
        self.carried: list[tuple[int, Any, Any]] = []
        self.delivered = 0
        self.sizes, self.sized = deque(progress.sizes), progress.sized
        self._unsettled: deque[tuple[int, Any, Any]] = deque()  # (…, sample or Failure), in the sampler's order
        self._loader = loader
        self._in_a_row = 0
        batches: Any = loader.batch_sampler
        torchs = type(batches) is BatchSampler
        self.batch_size: int | None = batches.batch_size if torchs else None
        self._drop_last = torchs and batches.drop_last

    @property
    def has_more(self) -> bool:
        """Whether anything is left to deliver when there are no more batches."""
        return bool(self.carried or self._unsettled)

    def concerns(self, epoch: Epoch, batch: OpenBatch) -> bool:
        """Whether this batch cannot be delivered as it is."""
        for position in self._known.keys() & set(range(batch.first, batch.first + batch.rows)):
            _, index, source, error = self._known.pop(position)
            row = position - batch.first
            batch.failures.setdefault(row, Failure(row, index, source, "reading", error, "", None))
        if self.has_more or batch.failures or batch.task.raw:
            return True
        if batch.rows and batch.broken is None:
            self._in_a_row = 0
        if self.sizes:
            if self.sizes[0] == batch.rows:
                self._count(batch)
                self.sizes.popleft()  # the place of the batch that was used up
                return False
            return True
        short = self.batch_size is not None and batch.rows < self.batch_size
        return short and (self._drop_last or not epoch.is_last)

    def deliver(self, epoch: Epoch, batch: OpenBatch | None) -> tuple[Any, list[Any]] | None:
        """(batch, keys) from what is carried, this batch and those behind it; None if nothing is left."""
        self._settle()
        while batch is not None:
            self._take(epoch, batch)
            self._settle()
            batch = epoch.next_complete() if len(self.carried) < self._size else None
        size = self._size
        taken, self.carried = self.carried[:size], self.carried[size:]
        if self.sizes:
            self.sizes.popleft()
        if not taken or (self._drop_last and len(taken) < size):
            return None
        keys = [key for _, key, _ in taken]
        samples = [sample for _, _, sample in taken]
        self.delivered = taken[-1][0] + 1
        if not self._loader._plan.batched:
            return self._loader.collate_fn(samples[0]), keys
        if not self._loader._plan.by_rows:
            return self._loader.collate_fn(samples), keys

        def who(row: int) -> tuple[Any, str | None]:
            return keys[row], describe(self._loader.dataset, keys[row])

        return collate_privately(self._loader._plan.spec, samples, who, self._loader.collate_fn), keys

    @property
    def _size(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return self.sizes[0] if self.sizes else 1

    def _count(self, batch: OpenBatch) -> None:
        if batch.first >= self.sized:  # else it is the rest of one that was counted before this state was taken
            self.sizes.append(batch.rows)
            self.sized = batch.first + batch.rows

    def _take(self, epoch: Epoch, batch: OpenBatch) -> None:
        """Take a batch apart."""
        if batch.broken is not None:
            epoch.delivery.discard(batch)
            raise exception_of(batch.broken, apart=self._loader.num_workers > 0)
        if not self._loader._plan.by_rows and len(batch.overflow.samples) + len(batch.failures) < batch.rows:
            # It is collated already, or was lost with a worker: ask for the samples themselves.
            epoch.reopen(batch)
            return
        memories, spec = epoch.delivery.lease(batch), batch.task.spec
        # Whatever lies in the row of a failed sample is nobody's.
        batch.overflow.samples.extend((row, failure) for row, failure in batch.failures.items())
        if spec is not None:
            samples = samples_of(spec, memories, batch.rows, batch.overflow)
        else:
            samples = [sample for _, sample in sorted(batch.overflow.samples, key=lambda pair: pair[0])]
        positions = range(batch.first, batch.first + batch.rows)
        self._unsettled.extend(zip(positions, batch.task.keys, samples, strict=True))
        if self.batch_size is None and self._loader._plan.batched:
            self._count(batch)

    def _settle(self) -> None:
        """Carry the good samples and give up the failed ones, in order. An error leaves those behind it for later."""
        while self._unsettled:
            position, key, sample = self._unsettled.popleft()
            if isinstance(sample, Failure):
                self._in_a_row += 1
                give_up(self._loader, self._progress, position, sample, self._in_a_row)
            else:
                self._in_a_row = 0
                self.carried.append((position, key, sample))
