"""The drop-in `DataLoader`: torch's arguments and their meaning, slots instead of copies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypeVar

import torch
import torch.utils.data
from torch.utils.data import BatchSampler

from loaders.batch.collate import registered_collation
from loaders.batch.spec import Field
from loaders.dataloader.arguments import check_arguments, check_iteration, check_sampler, workers_of
from loaders.dataloader.auto_workers import AutoWorkers, Tuner
from loaders.dataloader.checkpoint import Agreement, Position, position_of, state_of
from loaders.dataloader.cursor import SamplerCursor
from loaders.dataloader.delivery import Delivery, HeldWarning
from loaders.dataloader.engines import Engines, EngineSetup
from loaders.dataloader.epoch import Epoch
from loaders.dataloader.epochs import EpochLog, Epochs
from loaders.dataloader.orders import check_origin, inner_sampler, restore, world_of
from loaders.dataloader.plan import Options, Plan
from loaders.errors import StateError
from loaders.memory.accelerator import open_accelerator
from loaders.memory.device_reads import PageLocker
from loaders.randomness.streams import Domain, keyed_word
from loaders.report.report import Report, Snapshot, report_of
from loaders.report.statistics import EpochStatistics, SkippedSample
from loaders.workers.messages import Job, keys_of

_T_co = TypeVar("_T_co", covariant=True)


class TorchsDefault(int):
    """A value that torch gave to an attribute; passed to another loader, it means that no value was given."""


class DataLoader(torch.utils.data.DataLoader[_T_co]):
    """torch's DataLoader without its copies: workers write samples directly into the batch's memory.

    Takes every argument of `torch.utils.data.DataLoader` with the same meaning; batches have the same structure,
    dtypes, values and order. A batch may be kept indefinitely: its memory is reused only when no tensor, array or view
    over it is left.

    Args:
        dataset: NumPy-native (see `loaders.Dataset`), or any other that torch accepts. It may have
            `read_into(index, out)`, which writes a sample's fields into the arrays of `out`, shaped like the first
            sample that `dataset[index]` returned, and `describe(index)`, a name for messages, usually a path.
        num_workers: as in torch. "auto" finds the number within the first hundred batches: enough that the loop does
            not wait, up to the number of cores. The attribute is the current number; the one of `worker_info()` is the
            maximum. Batches do not depend on it; a stream's would, so an IterableDataset gets one worker.
        seed: fixes the randomness of samples and the order of torch's random samplers. If None, it is drawn from
            `generator` as torch draws its base seed, and `state_dict()` stores it.
        worker_method: "process", or "thread" for datasets that release the GIL most of the time.
        fields: how fields whose samples differ in shape share a batch: `{"boxes": Field(ragged=True)}`. Ignored with a
            custom `collate_fn`.
        on_error: what to do if reading a sample raises: "raise" the exception; "skip" the sample, so that its batch is
            shorter (a batch in which all samples fail is left out); or "substitute" another sample. "skip" also leaves
            out samples whose shape or dtype does not fit their batch.
        max_errors: how many samples may fail in a row before the error is raised despite `on_error`.
        max_buffer_bytes: the most bytes that batches, open or held, may take; by default half of the memory available.
        return_index: return `(batch, indices)`, indices as int64 (B,), or as a list if they are not ints.

    Raises:
        ValueError, TypeError: an argument is not allowed; for torch's arguments as torch does.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        num_workers: int | Literal["auto"] = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: BaseContext | str | None = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        seed: int | None = None,
        worker_method: Literal["process", "thread"] = "process",
        fields: Mapping[str, Field] | None = None,
        on_error: Literal["raise", "skip", "substitute"] = "raise",
        max_errors: int = 10,
        max_buffer_bytes: int | None = None,
        return_index: bool = False,
    ) -> None:
        check_arguments(
            dataset,
            seed=seed,
            worker_method=worker_method,
            fields=fields,
            on_error=on_error,
            return_index=return_index,
        )
        workers, self._most_workers = workers_of(num_workers, dataset)
        if isinstance(prefetch_factor, TorchsDefault):
            prefetch_factor = None
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        check_sampler(self._inner_sampler())
        if prefetch_factor is None and self.prefetch_factor is not None:
            self.prefetch_factor = TorchsDefault(self.prefetch_factor)  # not our default
        self._tuner = Tuner(self._most_workers) if self._most_workers > workers else None
        self.shuffle = shuffle
        self.seed = seed
        self.worker_method = worker_method
        self.fields = fields
        self.on_error = on_error
        self.max_errors = max_errors
        self.max_buffer_bytes = max_buffer_bytes
        self.return_index = return_index
        self._planned: tuple[Any, ...] = ()
        self._make_plan()
        self._epochs = Epochs(seed)
        self._engines = Engines()
        self._held = HeldWarning()

    @property
    def errors(self) -> list[SkippedSample]:
        """Samples that `on_error` left out since the loader was made or a state loaded, those of the state included."""
        return self._epochs.errors

    @property
    def overflow_count(self) -> int:
        """How many values no slot could hold, each of which was copied one more time."""
        return self._epochs.overflow_count

    def __iter__(self) -> Any:
        """Begin an epoch."""
        if self._is_torchs():
            return super().__iter__()
        persistent = self.persistent_workers and self.num_workers > 0
        if not persistent or self._engines.kept is None:
            if self.num_workers > 0:
                self.check_worker_number_rationality()
            check_iteration(
                num_workers=self.num_workers,
                timeout_s=self.timeout,
                pin_memory=self.pin_memory,
                pin_memory_device=self.pin_memory_device,
            )
            self._make_plan()
        if self.pin_memory and self._engines.page_locker is None:
            self._engines.page_lock_with(open_accelerator())
        start = self._epochs.start(self._inner_sampler())
        # torch makes the sampler's iterator before it draws its base seed.
        cursor: SamplerCursor | None = self._cursor_at(start) if self._plan.fetch != "stream" else None
        keep_seed = persistent and self._engines.kept is not None
        setup = self._setup(0 if keep_seed else self._base_seed(start), persistent=persistent)
        first = [cursor] if cursor is not None else []
        options = self._options()
        return Epoch(
            self._epochs,
            EpochLog(start if cursor is None else _with_origin(start, cursor), EpochStatistics(start.epoch)),
            self._engines,
            setup,
            self._plan,
            options,
            Delivery(self._plan, options, getattr(self, "_IterableDataset_len_called", None), self._held),
            None if cursor is None else lambda position: first.pop() if first else self._cursor_at(position),
            self.__len__,
            self._tuner,
            self._have_workers,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, which keys the randomness of its samples, here and on the sampler.

        Without it, epochs are numbered automatically. An epoch that is set on the sampler alone is adopted. A loaded
        state of another epoch is discarded with a warning.
        """
        sampler = self._inner_sampler()
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self._epochs.set(epoch, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Which batch comes next, in a few plain numbers: counts batches handed out, not those made ahead.

        May be taken before, during and after an epoch; after the last batch, the first of the next epoch comes next. A
        loader over the same data that loads it continues with bit-identical batches, also with other workers and, at
        equal global batch size, on another number of ranks.

        Raises:
            StateError: inside an epoch with `in_order=False`, where the order depends on timing; or where torch's own
                DataLoader does the work, which has no state.
        """
        self._check_has_state()
        position, is_inside = self._epochs.position(self._inner_sampler(), drawn=self._engines.kept is not None)
        if is_inside and not self.in_order and self.num_workers > 0:
            raise StateError(
                "with in_order=False there is no state in the middle of an epoch: the order depends on timing."
            )
        return state_of(self._agreement(), position, self._epochs.seed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where `state` was taken.

        Raises:
            StateError: the state does not fit this loader; the message names the differences. Nothing was changed.
        """
        self._check_has_state()
        position, sampler = position_of(self._agreement(), state), self._inner_sampler()
        check_origin(position.origin)
        restore(sampler, position.origin)
        try:
            is_over = 0 < len(self) <= position.batches
        except TypeError:
            is_over = False
        self._epochs.load(position, state["seed"], sampler, is_over=is_over)
        if any(serial > 0 and own is None for serial, own in zip(position.lanes, position.streams, strict=True)):
            warnings.warn(
                f"{type(self.dataset).__name__} has no state_dict(): to resume after batch {position.batches}, "
                "everything before it is read again and discarded.",
                stacklevel=2,
            )

    def report(self) -> Report:
        """Where the time goes, and what to change: in the running epoch, else in the last one.

        It has a one-sentence verdict and the numbers behind it as attributes; `print` shows both. It needs no setup.
        """
        blocks, nbytes, ceiling_nbytes = self._engines.leased()
        return report_of(
            Snapshot(
                statistics=self._epochs.statistics,
                dataset=self.dataset,
                num_workers=self.num_workers,
                worker_method=self.worker_method,
                depth=self._plan.depth(max(1, self.num_workers)),
                blocks_per_batch=sum(size > 0 for size in self._plan.sizes()),
                held_blocks=blocks,
                held_nbytes=nbytes,
                ceiling_nbytes=ceiling_nbytes,
                skipped=tuple(self.errors),
            )
        )

    def holders(self) -> str:
        """The batches still held: a line per field, with size and age; with LOADERS_DEBUG=slots also who took it."""
        return self._engines.holders()

    # -- for the library's own prefetcher

    def page_lock_with(self, locker: PageLocker) -> None:
        """From the next iteration on, put batches in memory that this accelerator reads in place."""
        self._engines.page_lock_with(locker)

    def batch_key(self) -> tuple[int, int, int] | None:
        """(seed, epoch, number unique over all ranks) of the batch handed out last; None outside an epoch."""
        return self._epochs.batch_key(self._inner_sampler(), is_stream=self._plan.fetch == "stream")

    @property
    def turns(self) -> int:
        """How many epochs were begun or resumed, plus states loaded."""
        return self._epochs.turns

    # -- inside

    @property
    def _iterator(self) -> Any:
        """torch's attribute for the iterator of persistent workers; frameworks set it to None to stop the workers."""
        return self.__dict__.get("_torchs_iterator")

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.__dict__["_torchs_iterator"] = iterator
        if iterator is None and "_engines" in self.__dict__:
            self._engines.drop_kept()

    def __getstate__(self) -> dict[str, Any]:
        # Workers and buffers stay here; a copy makes its own.
        state = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_engines", "_held", "_torchs_iterator")
        }
        return {**state, "_epochs": self._epochs.copied()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _engines=Engines(), _held=HeldWarning())

    def _is_torchs(self) -> bool:
        """Whether torch's own iterator does the work: on request, and for datapipes, which it seeds and shards."""
        disabled = os.environ.get("LOADERS_DISABLE") == "1"
        return disabled or isinstance(self.dataset, (torch.utils.data.IterDataPipe, torch.utils.data.MapDataPipe))

    def _check_has_state(self) -> None:
        if self._is_torchs():
            raise StateError(
                "torch's own DataLoader does the work here (LOADERS_DISABLE=1, or a datapipe): it has no state."
            )

    def _inner_sampler(self) -> Any:
        return inner_sampler(self.sampler, self.batch_sampler)

    def _cursor_at(self, position: Position) -> SamplerCursor:
        return SamplerCursor(
            self.sampler,
            self.batch_sampler,
            self.seed,
            position.epoch,
            dict(position.origin),
            position.keys,
            partial(keys_of, dataset=self.dataset, whole=self._plan.fetch == "all"),
        )

    def _base_seed(self, position: Position) -> int:
        """The base of the workers' seeds, drawn as torch draws it where `seed` is not given."""
        seed = None
        if position.batches == 0 and (self.seed is None or self.generator is not None):
            # Drawn where torch draws it, so that generators are in the same state afterwards: once per epoch, not again
            # when it is resumed, and not from torch's default generator if `seed` is given.
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator).item())
            if self._epochs.seed is None:
                self._epochs.seed = seed
        if self.seed is not None or seed is None:
            assert self._epochs.seed is not None
            seed = keyed_word(Domain.ORDER, self._epochs.seed, position.epoch, 1) >> 1
        return seed

    def _have_workers(self, workers: int) -> None:
        self.num_workers = AutoWorkers(workers)

    def _make_plan(self) -> None:
        """Make a new plan if its inputs have changed: torch allows these attributes to be set at any time."""
        workers = self.num_workers if self._tuner is None else self._most_workers
        factor = None if isinstance(self.prefetch_factor, TorchsDefault) else self.prefetch_factor
        made_of = (self.collate_fn, workers, factor, registered_collation())
        if made_of != self._planned:
            self._planned = made_of
            depth = 1 if workers == 0 else factor and factor * workers
            batched = self.batch_sampler is not None
            self._plan = Plan(self.dataset, self.collate_fn, self.batch_size, batched, depth)

    def _options(self) -> Options:
        return Options(
            dataset=self.dataset,
            num_workers=self.num_workers,
            in_order=self.in_order,
            timeout_s=self.timeout,
            on_error=self.on_error,
            max_errors=self.max_errors,
            pin_memory=self.pin_memory,
            return_index=self.return_index,
        )

    def _setup(self, seed: int, *, persistent: bool) -> EngineSetup:
        job = Job(
            dataset=self.dataset,
            fetch=self._plan.fetch,
            collate=self._plan.collate,
            batched=self._plan.batched,
            fields=dict(self.fields or {}),
            keep_going=self.on_error != "raise",
            batch_rows=(self.batch_size or 1) if self._plan.batched else 1,
            drop_last=self.drop_last,
            num_workers=max(self.num_workers, self._most_workers),
            seed=seed,
            init=self.worker_init_fn,
            indexed=self.return_index,
        )
        context = self.multiprocessing_context
        return EngineSetup(job, self.num_workers, self.worker_method, context, self.max_buffer_bytes, persistent)

    def _agreement(self) -> Agreement:
        sampler = self._inner_sampler()
        world_size = world_of(sampler)[1]
        is_stream = self._plan.fetch == "stream"
        batches, size, drop_last = self.batch_sampler, self.batch_size, self.drop_last
        if is_stream:
            # Each worker reads its own stream, whose content depends on how many workers there are.
            streams = {"num_workers": int(self.num_workers), "batch_size": size, "drop_last": drop_last}
            return Agreement(streams, self.seed, world_size, True, max(1, self.num_workers))
        if type(batches) is BatchSampler:
            size, drop_last = batches.batch_size, batches.drop_last
        fixed: dict[str, Any] = {
            "length": _length(self.dataset),
            "global_batch": None if size is None else size * world_size,
            "drop_last": drop_last,
            "sampler": type(sampler).__name__,
            # An order that the seed fixes is not stored in the state; any other is.
            "seeded": self.seed is not None,
        }
        return Agreement(fixed, self.seed, world_size, False, 0)


def _with_origin(position: Position, cursor: SamplerCursor) -> Position:
    # The cursor fills it in when it draws the first key.
    return position._replace(origin=cursor.origin)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
