"""The drop-in `DataLoader`: torch's arguments and meaning, slots instead of copies."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypeVar

import torch
import torch.utils.data

from loaders.batch.collate import registered_collation
from loaders.batch.spec import Field
from loaders.dataloader.arguments import check_arguments, check_iteration, workers_of
from loaders.dataloader.auto_workers import Tuner
from loaders.dataloader.checkpoint import Progress, progress_of, state_of
from loaders.dataloader.cursor import KeyStream, inner_sampler, order_at_rest, restore, world_of
from loaders.dataloader.dispatch import Dispatch
from loaders.dataloader.epoch import Epoch
from loaders.dataloader.failures import SkippedSample
from loaders.dataloader.plan import Plan
from loaders.errors import StateError
from loaders.memory.accelerator import open_accelerator
from loaders.memory.arena import Arena
from loaders.memory.device_reads import Reader
from loaders.memory.slots import SlotPool
from loaders.randomness.ranks import drawing_rank
from loaders.randomness.streams import Domain, keyed_word
from loaders.report.report import Report, report_of
from loaders.report.statistics import Measures
from loaders.system.limits import available_nbytes
from loaders.workers.engine import Engine
from loaders.workers.inline import InlineEngine
from loaders.workers.messages import Job
from loaders.workers.processes import ProcessEngine
from loaders.workers.threads import ThreadEngine

_T_co = TypeVar("_T_co", covariant=True)

# Of the memory available when the first batch is made, the share that batch buffers may take.
_DEFAULT_SHARE = 0.5
# Address space per byte of it, so that blocks of changing sizes always find a free run.
_VIRTUAL_FACTOR = 4


class DataLoader(torch.utils.data.DataLoader[_T_co]):
    """torch's DataLoader without its copies: workers write samples into the batch itself.

    Takes every argument of `torch.utils.data.DataLoader` with its meaning; batches have the same structure, dtypes,
    values and task. A batch may be kept for ever: its memory is used again only when the last tensor, array or view
    over it is gone.

    Args:
        dataset: NumPy-native (see `loaders.Dataset`) or any other that torch takes. It may offer
            `read_into(index, out)`, which writes a sample's fields into the arrays of `out`, shaped like the first
            sample that `dataset[index]` gave, and `describe(index)`, a name for messages, usually a path.
        num_workers: as in torch; "auto" finds the number within the first hundred batches: enough that the loop does
            not wait, as far as there are cores. The attribute is the number of the moment, and `worker_info()` tells
            the most there may be. No batch depends on it; a stream would, so an IterableDataset gets one worker.
        seed: fixes the randomness of samples and the order of torch's random samplers. Not given, it is drawn from
            `generator` as torch draws its base seed, and `state_dict()` remembers it.
        worker_method: "process", or "thread" for datasets that release the GIL most of the time.
        fields: how fields whose samples differ in shape share a batch: `{"boxes": Field(ragged=True)}`.
            A custom `collate_fn` decides by itself.
        on_error: what a sample does whose reading raises: "raise" its exception; "skip" it, as if the sampler had not
            drawn it (with several ranks use "substitute": ranks of unequal length hang); "substitute" another for it.
        max_errors: how many samples may fail in a row before the error is raised all the same.
        max_buffer_bytes: the most memory that batches, made and held, may take; half of what is available by default.
        return_index: deliver `(batch, indices)`, indices as int64 (B,), or as a list if they are no ints.

    Attributes:
        errors: what a policy left out, since the loader was made or a state was loaded: `SkippedSample(index, source,
            error)`.
        overflow_count: values that no slot could hold and that travelled beside it.

    Raises:
        ValueError, TypeError: as torch does for its arguments.
    """

    errors: list[SkippedSample]

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
        self._tuner = Tuner(self._most_workers) if self._most_workers > workers else None
        self.shuffle = shuffle
        self.seed = seed
        self.worker_method = worker_method
        self.fields = fields
        self.on_error = on_error
        self.max_errors = max_errors
        self.max_buffer_bytes = max_buffer_bytes
        self.return_index = return_index
        self.errors = []
        self.overflow_count = 0
        self._depth = prefetch_factor  # torch puts a default of its own into the attribute
        self._planned: tuple[Any, ...] = ()
        self._make_plan()
        self._sample_seed = seed
        self._next_epoch = 0
        self._turns = 0  # epochs begun or gone on with, and states loaded
        self._sampler_epoch: Any = 0
        self._progress: Progress | None = None  # of the epoch that was begun last, until it ends
        self._resume: Progress | None = None  # loaded, for the next epoch
        self._pool: SlotPool | None = None
        self._reader: Reader | None = None  # the accelerator that reads the slots where they lie
        self._dispatch: Dispatch | None = None
        self._measures: Measures | None = None  # of the epoch that was begun last
        self._pid = os.getpid()
        self._told_of_held = False
        self._told: set[str] = set()  # what workers noted

    def __iter__(self) -> Any:
        """Begin an epoch."""
        if self._is_torchs():
            return super().__iter__()
        if self._pid != os.getpid():
            # A forked child has none of the parent's workers, and must not touch its slots.
            self._reader = self._reader if self._pid == -1 else None  # not the parent's
            self._pid, self._pool, self._dispatch = os.getpid(), None, None
        persistent = self.persistent_workers and self.num_workers > 0
        if self.pin_memory and self._reader is None:
            self._reader = open_accelerator()
        if self._reader is not None and self._pool is not None and not self._pool.arena.shared:
            self._let_go_of_engine()  # of threads whose memory cannot be page-locked
        dispatch = self._dispatch if persistent else None
        if dispatch is None:
            check_iteration(self)
            self._make_plan()
        epoch = self._epoch_number()
        progress = self._resume.copy() if self._resume is not None else Progress(epoch)
        keys = KeyStream(self, progress) if self._plan.fetch != "stream" else None
        if dispatch is None:
            dispatch = Dispatch(self._new_engine(self._base_seed(progress)))
            if persistent:
                self._dispatch = dispatch
                weakref.finalize(self, dispatch.close, ())
        if self._reader is not None and self._pool is not None:
            self._pool.page_lock(self._reader)
        assert self._sample_seed is not None
        return Epoch(self, dispatch, keys, progress, self._sample_seed, owns_engine=not persistent)

    def set_epoch(self, epoch: int) -> None:
        """Number the next epoch, for the randomness of its samples; a sampler that has a `set_epoch` is told as well.

        Without it epochs count themselves. An epoch that is set on the sampler alone counts here, too.
        """
        sampler = inner_sampler(self)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self._next_epoch = epoch
        self._sampler_epoch = getattr(sampler, "epoch", 0)
        if self._resume is not None and self._resume.epoch != epoch:
            self._resume = None

    def state_dict(self) -> dict[str, Any]:
        """Which batch comes next, in a few plain numbers: of batches handed out, not of those made ahead.

        May be taken before, during and after an epoch. Whoever loads it into a loader over the same data goes on with
        the same batches to the bit, also with other workers and, at equal global batch, on another number of ranks.

        Raises:
            StateError: with `in_order=False` during an epoch: what comes next depends on who is faster. Also where
                torch's own DataLoader does the work, which counts nothing.
        """
        self._check_has_state()
        progress = self._resume or self._progress
        if progress is None:
            epoch, drawn = self._epoch_number(), self._dispatch is not None
            progress = Progress(epoch, origin=order_at_rest(inner_sampler(self), drawn=drawn))
        elif not self.in_order and self.num_workers > 0:
            raise StateError(
                "with in_order=False there is no state in the middle of an epoch: batches come as they may."
            )
        return state_of(self, progress, self._sample_seed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken.

        Raises:
            StateError: the state does not fit this loader; the message names the difference. Nothing has changed then.
        """
        self._check_has_state()
        progress, sampler = progress_of(self, state), inner_sampler(self)
        restore(sampler, progress.origin)
        self._resume, self._progress = progress, None
        self._turns += 1
        self._next_epoch, self._sampler_epoch = progress.epoch, getattr(sampler, "epoch", 0)
        if state["seed"] is not None:
            self._sample_seed = state["seed"]
        self.errors = [SkippedSample(*rest) for position, *rest in progress.failed if position < progress.keys]
        if any(serial > 0 and own is None for serial, own in zip(progress.lanes, progress.streams, strict=True)):
            warnings.warn(
                f"{type(self.dataset).__name__} has no state_dict(): to go on behind batch {progress.batches}, all "
                "that was delivered is read once more and thrown away.",
                stacklevel=2,
            )

    def _base_seed(self, progress: Progress) -> int:
        """What the workers' seeds count from; torch's own where `seed` is not given."""
        seed = None
        if progress.batches == 0 and (self.seed is None or self.generator is not None):
            # Drawn where torch draws it, so that generators are in the same state afterwards: once an epoch, not again
            # in the middle of it, and not from the process's own generator if there is nothing to be drawn.
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator).item())
            if self._sample_seed is None:
                self._sample_seed = seed
        if self.seed is not None or seed is None:
            assert self._sample_seed is not None
            seed = keyed_word(Domain.ORDER, self._sample_seed, progress.epoch, 1) >> 1
        return seed

    def _epoch_number(self) -> int:
        epoch = getattr(inner_sampler(self), "epoch", self._sampler_epoch)
        if isinstance(epoch, int) and epoch != self._sampler_epoch:
            # Set on the sampler by the user, or by a framework.
            self._sampler_epoch = self._next_epoch = epoch
            self._resume = None  # of another one
        return self._next_epoch

    def _has_begun(self, progress: Progress, measures: Measures) -> None:
        """The first batch of an epoch is asked for. Until then it could have been a stray `iter()`."""
        if self._progress is not progress:
            self._measures = measures
            self._progress, self._resume, self._next_epoch = progress, None, progress.epoch + 1
            self._turns += 1

    def _has_ended(self, progress: Progress) -> None:
        if self._progress is progress:
            self._progress = None

    def _batch_key(self) -> tuple[int, int, int] | None:
        """(seed, epoch, a number that no other batch of any rank has) of the batch that was handed out last."""
        progress = self._progress
        if progress is None or self._sample_seed is None:
            return None
        rank, ranks = drawing_rank(*world_of(inner_sampler(self)))
        # Of map-style datasets the position of its first sample in the epoch: also after resuming on other ranks.
        number = progress.first if self._plan.fetch != "stream" else progress.batches - 1
        return self._sample_seed, progress.epoch, number * ranks + rank

    def report(self) -> Report:
        """Where the time goes, and what to change: of the epoch that is running, else of the one that ran last.

        It has a verdict in one sentence, and the numbers behind it as attributes; `print` shows them. What it is made
        of is always measured.
        """
        return report_of(self)

    def holders(self) -> str:
        """Who holds batches: a line per field of each, with size and age; with LOADERS_DEBUG=slots also from where."""
        if self._pool is None or self._pid != os.getpid():
            return ""
        self._pool.reclaim()
        return self._pool.holders()

    def __getstate__(self) -> dict[str, Any]:
        # Workers and buffers stay here; a copy makes its own.
        own = ("_pool", "_dispatch", "_iterator", "_reader", "_measures")
        return {**self.__dict__, **dict.fromkeys(own), "_pid": -1}

    def _is_torchs(self) -> bool:
        """Whether torch's own iterator does the work: datapipes it seeds and shards by private means."""
        disabled = os.environ.get("LOADERS_DISABLE") == "1"
        return disabled or isinstance(self.dataset, (torch.utils.data.IterDataPipe, torch.utils.data.MapDataPipe))

    def _check_has_state(self) -> None:
        if self._is_torchs():
            raise StateError(
                "torch's own DataLoader does the work here (LOADERS_DISABLE=1, or a datapipe): it has no state."
            )

    def _make_plan(self) -> None:
        """Plan anew if what a plan is made of has changed: torch lets these attributes be set at any time."""
        workers = self.num_workers if self._tuner is None else self._most_workers
        made_of = (self.collate_fn, workers, self._depth, registered_collation())
        if made_of != self._planned:
            self._planned = made_of
            depth = 1 if workers == 0 else self._depth and self._depth * workers
            batched = self.batch_sampler is not None
            self._plan = Plan(self.dataset, self.collate_fn, self.batch_size, batched, depth)

    def _new_engine(self, seed: int) -> Engine:
        processes = self.num_workers > 0 and self.worker_method == "process"
        shared = processes or self._reader is not None
        if self._pool is not None and self._pool.arena.shared != shared:
            self._pool.trim()  # an iterator may still use it
            self._pool = None
        if self._pool is None:
            ceiling = self.max_buffer_bytes
            if ceiling is None:
                ceiling = int(available_nbytes() * _DEFAULT_SHARE)
            arena = Arena(ceiling * _VIRTUAL_FACTOR + (1 << 24), shared=shared)
            self._pool = SlotPool(arena, ceiling_nbytes=ceiling)
            weakref.finalize(self, _release, self._pool, os.getpid())
        job = Job(
            dataset=self.dataset,
            fetch=self._plan.fetch,
            collate=self._plan.collate,
            batched=self._plan.batched,
            fields=dict(self.fields or {}),
            keep_going=self.on_error != "raise",
            batch_rows=self._plan.room,
            drop_last=self.drop_last,
            num_workers=max(self.num_workers, self._most_workers),
            seed=seed,
            init=self.worker_init_fn,
            indexed=self.return_index,
        )
        if self.num_workers == 0:
            return InlineEngine(job, self._pool)
        if not processes:
            return ThreadEngine(job, self._pool, self.num_workers)
        context = self.multiprocessing_context or torch.multiprocessing.get_context()
        return ProcessEngine(job, self._pool, context, self.num_workers)

    def _let_go_of_engine(self) -> None:
        """The next epoch starts new workers. An iterator that still goes on keeps those that it has."""
        if self._dispatch is not None and not self._dispatch.is_wanted:
            self._dispatch.close(())
        self._dispatch = None

    def _forget_engine(self) -> None:
        """The workers could not be kept: the next epoch starts new ones."""
        if self._dispatch is not None:
            self._dispatch.close(())
            self._dispatch = None


def _release(pool: SlotPool, pid: int) -> None:
    # Batches that outlive the loader keep the mapping alive; everything else of it ends here.
    if pid == os.getpid():
        pool.close()
