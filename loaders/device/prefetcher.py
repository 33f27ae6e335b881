"""Batches move to the device while the model computes on the ones before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from loaders.device.streams import Streams, open_streams
from loaders.errors import DeviceError
from loaders.tree import leaves, map_tree


class DevicePrefetcher:
    """Iterates `loader` and hands its batches out on `device`, the next `depth` of them already on their way.

        for batch in DevicePrefetcher(loader, "cuda"):
            loss = model(batch["image"])

    Tensors move, wherever they sit in a batch of nested dicts, tuples, namedtuples, lists and dataclasses. Anything
    else passes as it is, ndarrays too. Tensors in pageable memory are pinned first; pinned ones are read where they
    lie. On the CPU the loader's own batches come through, so one script serves both.

    Keep, change or drop a batch as you like. Only what you hand to a stream other than the one current in your loop
    needs `tensor.record_stream(that_stream)`, as always in torch. Each `iter()` starts the loader anew, and two
    iterators of one prefetcher are as independent as the loader's own. An error of the loader comes after the batches
    before it. Leaving the loop early waits for the copies under way.

    Attributes that the prefetcher lacks, such as `dataset`, `batch_size`, `sampler` or `set_epoch`, are the loader's,
    but not `state_dict`: the loader counts batches that were never handed out.

    Args:
        loader: any iterable of batches.
        device: "cuda", "cuda:1", … or "cpu".
        depth: how many batches are on their way while you work on one, at least 1. It also bounds how far the host
            gets ahead of the device: a loader with memory for `depth` + 2 batches never runs short, and the device
            holds `depth` batches beside those in your hands, at worst 2 * `depth` + 4 in all.
        transform: `batch = transform(batch)` with each batch on the device. It runs when the batch is handed out, on
            the stream of your loop: so it may use what training writes, its random draws are the same at any depth,
            and only the untransformed, usually smaller batches wait on the device.

    Raises:
        DeviceError: the device does not exist here, or torch has no streams for it.
        ValueError: `depth` is no positive integer.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: str | int | torch.device,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
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
        # One side stream for life: freed blocks stay with the stream they came from, so a new one could not reuse them.
        self._streams = open_streams(self.device)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        if self._streams is not None:
            return self._prefetch(batches, _Copies(self._streams, self.depth))
        return batches if self.transform is None else map(self.transform, batches)

    def _prefetch(self, batches: Iterator[Any], copies: _Copies) -> Iterator[Any]:
        end: Exception | None = None
        try:
            while True:
                while end is None and len(copies) <= self.depth:
                    try:
                        copies.start(next(batches))
                    except Exception as stop:  # noqa: BLE001  the end or an error: due after what came before
                        end = stop
                if not copies:
                    break
                yield copies.hand_out() if self.transform is None else self.transform(copies.hand_out())
            if end is not None and not isinstance(end, StopIteration):
                raise end
        finally:
            end = None  # its traceback refers to this frame
            copies.release_sources(keep=0)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises its own TypeError

    def __getattr__(self, name: str) -> Any:
        # Only for what was not found. Copying and unpickling ask for private names before there is a loader.
        if name.startswith("_") or name in ("loader", "state_dict", "load_state_dict"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_streams"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _streams=open_streams(state["device"]))


class _Copies:
    """The copies of one iteration: first in, first handed out."""

    def __init__(self, streams: Streams, depth: int) -> None:
        self._streams = streams
        self._depth = depth
        self._ahead: deque[tuple[Any, torch.Event]] = deque()  # device batches not yet handed out
        self._sources: deque[tuple[Any, torch.Event]] = deque()  # what the device may still read

    def __len__(self) -> int:
        return len(self._ahead)

    def start(self, source: Any) -> None:
        """Enqueue the copy of a batch, and keep the batch until the device has read it."""
        source = _map_tensors(self._streams.pin, source)
        # The copies may land in memory that the consumer has freed: the kernels that read it there go first.
        self._streams.side_waits_for_compute()
        try:
            batch = _map_tensors(self._streams.copy, source)
        finally:  # also when the copy of a later tensor fails: those of the earlier ones are under way
            event = self._streams.record_event()
            self._sources.append((source, event))
        self._ahead.append((batch, event))
        self.release_sources(keep=self._depth + 1)

    def hand_out(self) -> Any:
        """The oldest batch, safe to read on the current stream from here on and to free at any time."""
        batch, event = self._ahead.popleft()
        self._streams.compute_waits_for(event)
        for _, leaf in leaves(batch):
            if isinstance(leaf, torch.Tensor):
                self._streams.record_stream(leaf)
        return batch

    def release_sources(self, keep: int) -> None:
        """Drop the source batches that were read; while more than `keep` remain, wait for the device."""
        while self._sources and (len(self._sources) > keep or self._sources[0][1].query()):
            # The event, not the tensor, tells that the device has finished reading.
            self._sources[0][1].synchronize()
            self._sources.popleft()


def _map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    return map_tree(lambda leaf: fn(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)
