"""Batches move to the device while the model computes on the ones before."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch

from loaders.dataloader.epoch import Epoch
from loaders.dataloader.loader import DataLoader
from loaders.device.copies import Copied, Copies, StaticBuffers, tensors_of
from loaders.device.streams import Streams, open_streams
from loaders.errors import DeviceError, StateError
from loaders.randomness.streams import Domain, enter_sample, leave_sample
from loaders.report.statistics import Transfer


class DevicePrefetcher:
    """Iterates `loader` and hands its batches out on `device`, the next `depth` of them already on their way.

        for batch in DevicePrefetcher(loader, "cuda"):
            loss = model(batch["image"])

    Tensors move, wherever they sit in a batch of nested dicts, tuples, namedtuples, lists and dataclasses. Anything
    else, ndarrays included, passes unchanged. With a `loaders.DataLoader` the copy engine reads the slots that the
    workers wrote into, which are page-locked for it. Other loaders' tensors are pinned first where they are not. On the
    CPU the loader's own batches come through, so one script serves both.

    Keep, change or drop a batch as you like. Only what you hand to a stream other than the one current in your loop
    needs `tensor.record_stream(that_stream)`, as always in torch. Each `iter()` starts the loader anew, and two
    iterators of one prefetcher are as independent as the loader's own. Threads may share an iterator: each batch goes
    to one of them. An error of the loader is raised after the batches before it, and the next call continues as the
    loader does; likewise after an interrupt. Leaving the loop early waits for the copies under way.

    `state_dict()` counts the batches that were handed out, not those on their way, and is the loader's own: either may
    load it. It exists if the loader has it. Every other attribute that the prefetcher lacks, such as `dataset`,
    `batch_size`, `sampler` or `set_epoch`, is the loader's.

    Args:
        loader: any iterable of batches.
        device: "cuda", "cuda:1", "xpu", "mps", … or "cpu". Where torch has no streams for a device, each batch is
            copied when it is asked for.
        depth: how many batches are on their way while you work on one, at least 1. It also bounds how far the host
            gets ahead of the device: a loader with memory for `depth` + 2 batches never runs short, and the device
            holds `depth` batches besides those you hold, at worst 2 * `depth` + 4 in all.
        transform: `batch = transform(batch)` with each batch on the device. It runs when the batch is handed out, on
            the stream of your loop: so it may use what training writes, and only the untransformed, usually smaller
            batches wait on the device. What it draws from `loaders.sample_rng()` is keyed by (seed, epoch, number of
            the batch); for other loaders by torch's seed, the sampler's epoch or else the number of the iteration, and
            the number of the batch.
        static: True to copy into `depth` + 2 fixed sets of device buffers in turn, with no allocation and always at the
            same addresses, as CUDA graphs need it (a graph for each address of the batch). A batch is then valid until
            the next one is asked for, and work enqueued on the current stream until then reads the right bytes. If a
            part of it is still held when its buffers are needed again, a SlotStateError is raised. Iterators that run
            at the same time have separate buffers. On the CPU nothing is copied, and the argument has no effect.

    Raises:
        DeviceError: the device does not exist here.
        ValueError: `depth` is not a positive integer.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: str | int | torch.device,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
        static: bool = False,
    ) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth={depth!r}: expected how many batches to have on their way, 1 or more.")
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise DeviceError(f"device {device!r} is unknown here: {error}") from error
        self.loader = loader
        self.depth = depth
        self.transform = transform
        self.static = static
        self._iterations = 0
        self._turn = 0
        self._delivered: _Position | None = None  # the loader's position without the batches under way
        self._open()

    def _open(self) -> None:
        # One side stream for life: freed blocks stay with the stream they came from, so a new one could not reuse them.
        self._streams = open_streams(self.device)
        self._readers: set[Any] = set()  # the streams that batches were handed to
        self._idle: list[StaticBuffers] = []  # of iterators that have ended

    def __iter__(self) -> Iterator[Any]:
        keys, self._iterations = _Keys(self.loader, self._iterations), self._iterations + 1
        if self._streams is None:
            self._delivered = None
            batches = iter(self.loader)
            if self.transform is None:
                return batches
            return map(self._transformed, batches, map(keys.of, count()))  # a generator would end once it raised
        if isinstance(self.loader, DataLoader) and self._streams.page_locker is not None:
            self.loader.page_lock_with(self._streams.page_locker)
        return _Prefetched(self, iter(self.loader), keys, self._streams)

    def _transformed(self, batch: Any, key: tuple[int, int, int]) -> Any:
        assert self.transform is not None
        enter_sample(*key, Domain.DEVICE)
        try:
            return self.transform(batch)
        finally:
            leave_sample()

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises its own TypeError

    def _state_dict(self) -> dict[str, Any]:
        position = self._delivered
        went_on = position is None or self._turn != _turn(self.loader)  # by itself, since
        return self.loader.state_dict() if went_on else position.state()  # type: ignore

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state)  # type: ignore
        self._delivered = None

    def __getattr__(self, name: str) -> Any:
        # Only for what was not found. Copying and unpickling ask for private names before there is a loader.
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.loader, name)
        return {"state_dict": self._state_dict, "load_state_dict": self._load_state_dict}.get(name, found)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_streams", "_readers", "_idle", "_delivered")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _delivered=None)
        self._open()


class _Prefetched:
    """One iteration over a loader: the next batches are under way when one is handed out.

    A call that an exception interrupts is continued by the next call. With several threads, each batch is given once.
    """

    def __init__(self, prefetcher: DevicePrefetcher, batches: Iterator[Any], keys: _Keys, streams: Streams) -> None:
        self._prefetcher = prefetcher
        self._batches = batches
        self._numbered = zip(batches, count())
        self._keys = keys
        self._streams = streams
        self._depth = prefetcher.depth if streams.copies_ahead else 0
        # At most one batch of the loader and its number, whose copy is to be started; and its note.
        self._fetched: deque[tuple[Any, int]] = deque()
        self._note: tuple[tuple[int, int, int], _Position] | None = None
        self._end: Exception | None = None  # what the loader raised, due after the batches before it
        self._is_over = False
        self._loss: DeviceError | None = None  # of a batch, to be raised by the next call
        self._lock = threading.Lock()
        self._thread: int | None = None  # the one that has the lock
        self._copies: Copies | None = None
        self.close: Callable[[], Any] = lambda: None

    def __iter__(self) -> _Prefetched:
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            RuntimeError: called from within itself, such as by a signal handler.
            DeviceError: the call before was interrupted in a transform that changes its batch in place.
        """
        if self._thread == threading.get_ident() and self._lock.locked():
            raise RuntimeError("next() of a DevicePrefetcher's iterator was called while it runs, in the same thread.")
        taken, before = None, None
        try:
            with self._lock:
                self._thread = threading.get_ident()
                try:
                    taken, batch, position = self._take()
                finally:
                    self._thread = None
                before = self._prefetcher._delivered
                taken.batch, self._prefetcher._delivered = None, position
            return batch
        except BaseException:
            if taken is not None and taken.batch is None:  # taken by a signal handler, and nobody has the batch
                taken.batch, self._prefetcher._delivered = batch, before
            raise

    def _take(self) -> tuple[Copied, Any, _Position]:
        """The oldest batch, still ours to hand out again; transformed; and the state once it is the caller's."""
        if self._is_over:
            raise StopIteration
        if self._loss is not None:
            loss, self._loss = self._loss, None
            raise loss
        copies = self._copies if self._copies is not None else self._begin()
        copies.timer.is_worked_on()
        if self._fetched and self._note is not None and copies.newest_note is self._note:
            self._fetched.clear()  # its copy was started, and the call interrupted
        copies.drop_taken()
        while self._end is None and len(copies) <= self._depth:
            self._start_next(copies)
        if copies:
            return self._transformed(copies)
        assert self._end is not None
        if isinstance(self._end, StopIteration):
            copies.close()
            self._prefetcher._delivered = None
            self._is_over = True
            self.close()
            raise StopIteration
        error, self._end = self._end, None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def _begin(self) -> Copies:
        prefetcher, transfer = self._prefetcher, Transfer()
        if isinstance(self._batches, Epoch):
            self._batches.statistics.transfer = transfer  # for the loader's report
        buffers = None
        if prefetcher.static:
            # Each epoch reuses them; iterators that run at the same time have separate ones.
            buffers = prefetcher._idle.pop() if prefetcher._idle else StaticBuffers(prefetcher.depth + 2)
        copies = Copies(self._streams, self._depth, buffers, transfer, prefetcher._readers)
        close = weakref.finalize(self, _close, copies, buffers, prefetcher._idle)
        close.atexit = False
        prefetcher._delivered = _Position(prefetcher.loader)
        self.close, self._copies = close, copies
        return copies

    def _start_next(self, copies: Copies) -> None:
        """Fetch a batch of the loader and start its copy, or record that there is none."""
        if not self._fetched:
            self._note = None
            try:
                self._fetched.extend(
                    islice(self._numbered, 1)
                )  # taken and kept in one step, which no signal interrupts
            except Exception as error:  # noqa: BLE001  raised after the batches before it
                # Without this frame, which would keep the iterator alive.
                self._end = error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
                return
            if not self._fetched:
                self._end = StopIteration()
                return
        batch, number = self._fetched[0]
        if self._note is None:
            loader = self._prefetcher.loader
            self._prefetcher._turn = _turn(loader)
            self._note = self._keys.of(number), _Position(loader)
        copies.start(batch, self._note)
        self._fetched.clear()

    def _transformed(self, copies: Copies) -> tuple[Copied, Any, _Position]:
        copied = copies.first()
        key, position = copied.note
        if self._prefetcher.transform is None:
            return copied, copied.batch, position
        before, copied.tries = _versions(copied.batch), copied.tries + 1
        try:
            return copied, self._prefetcher._transformed(copied.batch, key), position
        except BaseException as error:
            # A signal handler may have raised it; then the batch is still due, unless it was partly changed. An error
            # that is raised twice is the transform's own.
            is_spoiled = before is None or _versions(copied.batch) != before
            if is_spoiled or (isinstance(error, Exception) and copied.tries > 1):
                copied.batch = None
            if is_spoiled and not isinstance(error, Exception):
                self._loss = DeviceError(
                    "a batch is lost: its transform was interrupted when it had changed the batch in place.\n"
                    "  The next call goes on with the batch after it. A transform that makes new tensors loses none."
                )
            raise


def _versions(batch: Any) -> list[int] | None:
    """How often each tensor was changed in place; None where torch does not count."""
    tensors = tensors_of(batch)
    return None if any(tensor.is_inference() for tensor in tensors) else [tensor._version for tensor in tensors]


def _close(copies: Copies, buffers: StaticBuffers | None, idle: list[StaticBuffers]) -> None:
    copies.close()
    if buffers is not None:
        idle.append(buffers)


class _Position:
    """The loader's state as it was when this was made."""

    def __init__(self, loader: Any) -> None:
        self._refusal: str | None = None
        self._state: Any = None
        if hasattr(loader, "state_dict"):
            try:
                self._state = loader.state_dict()
            except Exception as error:  # noqa: BLE001  raised when the state is asked for, if ever
                # Only its words: the frames in its traceback hold the iterator, which would never be collected.
                self._refusal = str(error)

    def state(self) -> Any:
        if self._refusal is not None:
            raise StateError(self._refusal)
        return copy.deepcopy(self._state)


def _turn(loader: Any) -> Any:
    """The epoch that a loader of ours has begun last; unknown for other loaders."""
    return loader.turns if isinstance(loader, DataLoader) else None


class _Keys:
    """What the randomness of each batch's transform is keyed by: (seed, epoch, number of the batch)."""

    def __init__(self, loader: Any, iteration: int) -> None:
        self._loader = loader
        epoch = getattr(getattr(loader, "sampler", None), "epoch", iteration)
        self._seed, self._epoch = torch.initial_seed(), epoch if isinstance(epoch, int) else iteration

    def of(self, number: int) -> tuple[int, int, int]:
        """The key of the batch that the loader returned last, which has this number."""
        own = self._loader.batch_key() if isinstance(self._loader, DataLoader) else None
        return (self._seed, self._epoch, number) if own is None else own
