"""Batches move to the device while the model computes on the ones before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from loaders.dataloader.epoch import Epoch
from loaders.dataloader.loader import DataLoader
from loaders.device.copies import Copies, StaticBuffers
from loaders.device.streams import Streams, open_streams
from loaders.errors import DeviceError
from loaders.randomness.streams import Domain, enter_sample, leave_sample
from loaders.report.statistics import Transfer


class DevicePrefetcher:
    """Iterates `loader` and hands its batches out on `device`, the next `depth` of them already on their way.

        for batch in DevicePrefetcher(loader, "cuda"):
            loss = model(batch["image"])

    Tensors move, wherever they sit in a batch of nested dicts, tuples, namedtuples, lists and dataclasses. Anything
    else passes as it is, ndarrays too. Of a `loaders.DataLoader` the copy engine reads the slots that the workers wrote
    into, which are page-locked for it. Other loaders' tensors are pinned first where they are not. On the CPU the
    loader's own batches come through, so one script serves both.

    Keep, change or drop a batch as you like. Only what you hand to a stream other than the one current in your loop
    needs `tensor.record_stream(that_stream)`, as always in torch. Each `iter()` starts the loader anew, and two
    iterators of one prefetcher are as independent as the loader's own. An error of the loader comes after the batches
    before it. Leaving the loop early waits for the copies under way.

    `state_dict()` counts the batches that were handed out, not those on their way, and is the loader's own: either
    may load it. It is there if the loader has it. Every other attribute that the prefetcher lacks, such as `dataset`,
    `batch_size`, `sampler` or `set_epoch`, is the loader's.

    Args:
        loader: any iterable of batches.
        device: "cuda", "cuda:1", "xpu", "mps", … or "cpu". Where torch has no streams for a device, each batch is
            copied when it is asked for.
        depth: how many batches are on their way while you work on one, at least 1. It also bounds how far the host
            gets ahead of the device: a loader with memory for `depth` + 2 batches never runs short, and the device
            holds `depth` batches beside those in your hands, at worst 2 * `depth` + 4 in all.
        transform: `batch = transform(batch)` with each batch on the device. It runs when the batch is handed out, on
            the stream of your loop: so it may use what training writes, and only the untransformed, usually smaller
            batches wait on the device. What it draws from `loaders.sample_rng()` is keyed by (seed, epoch, number of
            the batch); of loaders other than ours by torch's seed, the sampler's epoch or else the number
            of the iteration, and the number of the batch.
        static: True to copy into `depth` + 2 fixed sets of device buffers in turn, with no allocation and always at
            the same addresses, as CUDA graphs need it (a graph for each address of the batch). A batch is then valid
            until the next one is asked for, and what the current stream was given until then reads the right bytes.
            Whoever holds a part of it when its buffers are needed again gets a SlotStateError. On the CPU nothing is
            copied, and the argument means nothing.

    Raises:
        DeviceError: the device does not exist here.
        ValueError: `depth` is no positive integer.
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
        self._delivered: _Position | None = None  # where the loader would be if nothing were on its way
        self._open()

    def _open(self) -> None:
        # One side stream for life: freed blocks stay with the stream they came from, so a new one could not reuse them.
        self._streams = open_streams(self.device)
        self._buffers = StaticBuffers(self.depth + 2) if self.static else None

    def __iter__(self) -> Iterator[Any]:
        keys, self._iterations = _Keys(self.loader, self._iterations), self._iterations + 1
        if self._streams is None:
            self._delivered = None
            return self._pass_on(iter(self.loader), keys)
        if isinstance(self.loader, DataLoader) and self._streams.reader is not None:
            self.loader.page_lock_with(self._streams.reader)
        return self._prefetch(iter(self.loader), keys, self._streams)

    def _pass_on(self, batches: Iterator[Any], keys: _Keys) -> Iterator[Any]:
        if self.transform is None:
            return batches
        return (self._transformed(batch, keys.next()) for batch in batches)

    def _prefetch(self, batches: Iterator[Any], keys: _Keys, streams: Streams) -> Iterator[Any]:
        transfer = Transfer()
        if isinstance(batches, Epoch):
            batches.statistics.transfer = transfer  # for the loader's report
        copies = Copies(streams, self.depth, self._buffers, transfer)
        self._delivered = _Position(self.loader)
        end: Exception | None = None
        try:
            while True:
                while end is None and len(copies) <= self.depth:
                    try:
                        batch = next(batches)
                    except Exception as stop:  # noqa: BLE001  the end or an error: due after what came before
                        end = stop
                    else:
                        self._turn = _turn(self.loader)
                        copies.start(batch, (keys.next(), _Position(self.loader)))
                        del batch
                if not copies:
                    break
                yield self._hand_out(copies)
                copies.meter.is_worked_on()
            self._delivered = None
            if end is not None and not isinstance(end, StopIteration):
                raise end
        finally:
            end = None  # its traceback refers to this frame
            copies.close()

    def _hand_out(self, copies: Copies) -> Any:
        batch, (key, self._delivered) = copies.hand_out()
        return batch if self.transform is None else self._transformed(batch, key)

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
        own = ("_streams", "_buffers", "_delivered")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _delivered=None)
        self._open()


class _Position:
    """The loader's state as it was when this was made."""

    def __init__(self, loader: Any) -> None:
        self._error: Exception | None = None
        self._state: Any = None
        if hasattr(loader, "state_dict"):
            try:
                self._state = loader.state_dict()
            except Exception as error:  # noqa: BLE001  due when somebody asks for the state, if anybody does
                self._error = error

    def state(self) -> Any:
        if self._error is not None:
            raise self._error
        return copy.deepcopy(self._state)


def _turn(loader: Any) -> Any:
    """Which of its epochs a loader of ours has begun last; of others nothing is known."""
    return loader.turns if isinstance(loader, DataLoader) else None


class _Keys:
    """What the randomness of each batch's transform is keyed by: (seed, epoch, number of the batch)."""

    def __init__(self, loader: Any, iteration: int) -> None:
        self._loader = loader
        epoch = getattr(getattr(loader, "sampler", None), "epoch", iteration)
        self._key = (torch.initial_seed(), epoch if isinstance(epoch, int) else iteration, 0)

    def next(self) -> tuple[int, int, int]:
        """The key of the batch that the loader gave last."""
        if isinstance(self._loader, DataLoader) and (own := self._loader.batch_key()) is not None:
            return own
        seed, epoch, number = self._key
        self._key = (seed, epoch, number + 1)
        return seed, epoch, number
