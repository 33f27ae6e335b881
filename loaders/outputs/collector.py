"""`OutputCollector`: a model's outputs as ndarrays in dataset order, with one wait for all of them."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loaders.bridge.arrays import as_array, require_dense
from loaders.bridge.dtypes import numpy_dtype
from loaders.device.side_stream import SideStream, open_side_stream
from loaders.errors import CollectError, ConversionError
from loaders.memory.accelerator import has_pinned_memory
from loaders.nested import children, leaves, map_tree
from loaders.outputs.gather import gather_rows, rank_and_ranks, together
from loaders.outputs.stores import FileStore, LengthStore, MemoryStore, Rows, ScratchStore, Store

_RING = 4  # batches under way: the copies of three hide the host's work on the fourth
_NAMES_SHOWN = 5


class Readback:
    """Copies from one accelerator into page-locked memory of the host. Tests simulate it.

    All but `empty` only enqueue, and return at once. Any number of threads may use it at a time.

    Args:
        side: the stream that copies.
    """

    def __init__(self, side: SideStream) -> None:
        self._side = side

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory to copy into."""
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)

    def wait_for_compute(self) -> None:
        """Copies from now on read after the work enqueued on the current stream so far."""
        self._side.wait_for(self._side.current())

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Both contiguous. Neither may be touched until a later event is reached."""
        with self._side.entered():
            target.copy_(source, non_blocking=True)

    def record_event(self) -> torch.Event:
        """An event after all copies enqueued so far."""
        return self._side.record_event()


@functools.cache
def _open_readback(device: torch.device) -> Readback | None:
    side = open_side_stream(device)
    return Readback(side) if side is not None and has_pinned_memory() else None


def readback_of(tensor: torch.Tensor) -> Readback | None:
    """The readback that copies the tensor to the host, one per device and process; None where a plain copy does."""
    return None if tensor.device.type == "cpu" else _open_readback(tensor.device)


@dataclass
class _Batch:
    """One batch on its way: as many hosts as sources, the last of both the index."""

    sources: list[torch.Tensor]  # kept until the device has read them
    hosts: list[torch.Tensor]
    events: list[Any]
    buffers: dict[int, torch.Tensor]  # page-locked, by position; the hosts may be parts of them

    def is_there(self) -> bool:
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()


class OutputCollector:
    """Collects a model's outputs batch by batch while the device keeps working; `result()` has them in dataset order.

        collector = OutputCollector(len(dataset))
        for batch, index in DevicePrefetcher(DataLoader(dataset, 256, return_index=True), "cuda"):
            collector.add({"logits": net(batch["image"])}, index)
        logits = collector.result()["logits"]

    Outputs are copied into page-locked memory on a side stream. It holds four batches, however long the dataset, so
    `add` waits only where the device is that far behind. You may drop an output at once; do not write into its memory
    before `result()`: if it is changed in place, or overwritten by a CUDA graph, add a clone.

    bfloat16 and float8 come as float32, complex32 as complex64, each value exact; they are cast on the host, so that
    only their own bytes cross the bus. Everything is detached. On the CPU, `add` copies at once.

    With more than one rank in torch.distributed, `result()` gathers all rows on rank 0: every rank has to call it, the
    others get None, and indices are required. Make the collector after `init_process_group`.

    Args:
        length: of the dataset. Then the result has exactly the rows 0 … `length` - 1, and a missing one is an error.
            Without it, what was collected is in memory twice while `result` puts it in order.
        path: write the result to memory-mapped `.npy` files, which needs `length`: a file for a single tensor, a
            folder with `<name>.npy` each for named ones. Memory is then bounded by the batches under way. A file of
            that name is replaced when the new one is whole.

    Raises:
        CollectError: `path` without `length`, or a `length` below 0.
    """

    def __init__(self, length: int | None = None, path: str | os.PathLike[str] | None = None) -> None:
        if length is not None and (not isinstance(length, int) or length < 0):
            raise CollectError(f"length={length!r}: expected how many samples the dataset has, 0 or more.")
        if path is not None and length is None:
            raise CollectError("path= needs length=: files have their size from the start. Pass len(dataset).")
        self._length = length
        self._path = None if path is None else Path(path)
        self._rank, self._ranks = rank_and_ranks()
        self._readback_of = readback_of
        self._structure: Any = None
        self._dtypes: list[torch.dtype] = []
        self._kinds: list[Rows] = []
        self._store: Store | None = None
        self._is_indexed: bool | None = None
        self._added = 0  # rows
        self._under_way: deque[_Batch] = deque()
        self._idle: list[dict[int, torch.Tensor]] = []  # buffers
        self._is_finished = False
        self._result: Any = None

    def add(self, outputs: Any, index: Any = None) -> None:
        """Start the copy of a batch of outputs.

        Args:
            outputs: a tensor (B, …), or nested dicts, tuples, lists and dataclasses of such; B may differ from batch
                to batch, all else may not. On any device.
            index: the B dataset indices as ints, ndarray or tensor, as `DataLoader(return_index=True)` gives them.
                If an index is given twice, as when a sampler pads the last batch, the first row counts. Without
                indices, the rows keep the order of adding.

        Raises:
            CollectError: outputs do not fit those before, or the index does not fit the outputs.
            ArrayKindError, DtypeError: an output is no tensor, or of a kind or dtype that NumPy lacks.
        """
        if self._is_finished:
            raise CollectError("add() after result(): what is collected is complete. Make a new OutputCollector.")
        # Not only for speed: buffers made in a caller's inference_mode could not be written outside of it.
        with torch.inference_mode():
            tensors, kinds = _parts(outputs)
            self._require_same(outputs, tensors, kinds)
            tensors.append(self._index_of(index, len(tensors[0])))
            self._drain(keep=_RING - 1)
            self._start(tensors)
            self._added += len(tensors[-1])
            self._drain(keep=_RING)

    def result(self) -> Any:
        """Everything that was added: ndarrays in the structure of the outputs, sorted by index.

        With `path`, they are the files, mapped read-only.

        Raises:
            CollectError: rows are missing, or nothing was added; with several ranks, any of them failed.
        """
        if self._is_finished:
            return self._result
        if rank_and_ranks() != (self._rank, self._ranks):
            raise CollectError(
                "torch.distributed was initialised or ended since this collector was made.\n"
                "  Make it after init_process_group, and call result() before destroy_process_group."
            )
        with torch.inference_mode():
            if self._ranks == 1:
                self._drain(keep=0)
                self._result = self._finish()
            else:
                with together():
                    self._drain(keep=0)
                gather_rows(self._store, self._kinds)
                with together():
                    self._result = self._finish() if self._rank == 0 else None
        self._is_finished = True
        self._store = None
        self._idle.clear()
        return self._result

    def _require_same(self, outputs: Any, tensors: list[torch.Tensor], kinds: list[Rows]) -> None:
        dtypes = [tensor.dtype for tensor in tensors]
        if self._store is None:
            self._store = self._open_store(outputs, kinds)
            self._kinds, self._dtypes = kinds, dtypes
            self._structure = map_tree(lambda _: None, outputs)
            return
        names, before = [kind.name for kind in kinds], [kind.name for kind in self._kinds]
        if names != before:
            raise CollectError(f"outputs {_listed(names)}, but {_listed(before)} in the batches before.")
        for new, dtype, old, old_dtype in zip(kinds, dtypes, self._kinds, self._dtypes, strict=True):
            if (new.shape, dtype) != (old.shape, old_dtype):
                raise CollectError(
                    f"{_called(new.name)}: {_plain(dtype)} rows of shape {new.shape}, but {_plain(old_dtype)} of shape "
                    f"{old.shape} in the batches before.\n  Pad or cast them: an output is one array in the end."
                )

    def _open_store(self, outputs: Any, kinds: list[Rows]) -> Store:
        if self._length is None:
            return MemoryStore(kinds)
        if self._path is None:
            return LengthStore(kinds, self._length) if self._rank == 0 else MemoryStore(kinds)
        if children(outputs) is None:
            folder, files = self._path.parent, [self._path]
        else:
            folder, files = self._path, [self._path / f"{kind.name}.npy" for kind in kinds]
            for kind in kinds:
                if Path(kind.name).name != kind.name:
                    raise CollectError(f"{_called(kind.name)}: its name cannot be that of a file. Choose another.")
        return FileStore(kinds, self._length, files) if self._rank == 0 else ScratchStore(kinds, folder)

    def _index_of(self, index: Any, rows: int) -> torch.Tensor:
        if self._is_indexed not in (None, index is not None):
            raise CollectError("some batches came with an index and some without: give one with all, or with none.")
        if index is None and self._ranks > 1:
            raise CollectError("several ranks need an index with each batch: DataLoader(return_index=True) gives one.")
        if isinstance(index, torch.Tensor):
            tensor = index.detach()
            are_integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        else:
            array = np.arange(self._added, self._added + rows) if index is None else np.asarray(index)
            are_integers = array.dtype.kind in "iu" or array.size == 0  # an empty list is an array of float64
            tensor = torch.from_numpy(array.astype(np.int64)) if are_integers else torch.empty(array.shape)
        if not are_integers or tuple(tensor.shape) != (rows,):
            raise CollectError(
                f"index of shape {tuple(tensor.shape)}{'' if are_integers else ', not of integers'}, but the outputs "
                f"have {rows} rows.\n  Give the dataset index of each row, as DataLoader(return_index=True) does."
            )
        if self._readback_of(tensor) is None and tensor.device.type == "cpu":  # else once it has arrived
            self._require_within(tensor.numpy())
        self._is_indexed = index is not None
        return tensor

    def _require_within(self, index: np.ndarray[Any, Any]) -> None:
        wrong = index[(index < 0) | (index >= self._length if self._length is not None else False)]
        if len(wrong):
            end = "0 or more" if self._length is None else f"0 … {self._length - 1}, for length={self._length}"
            raise CollectError(f"index {wrong[0]}: expected {end}.")

    def _start(self, tensors: list[torch.Tensor]) -> None:
        readbacks = [self._readback_of(tensor) for tensor in tensors]
        used = list({id(readback): readback for readback in readbacks if readback is not None}.values())
        if not used and not self._under_way:
            self._under_way.append(_Batch(tensors, tensors, [], {}))  # drained before the caller can write into them
            return
        # Everything that may run out of memory comes before the first copy: nothing may be freed while it is read.
        sources = [tensor.resolve_conj().resolve_neg().contiguous() for tensor in tensors]
        buffers = self._idle.pop() if self._idle else {}
        hosts = []
        for position, (source, readback) in enumerate(zip(sources, readbacks, strict=True)):
            if readback is None:
                hosts.append(source.to("cpu", copy=True))
                continue
            buffer = buffers.get(position)
            if buffer is None or buffer.dtype != source.dtype or len(buffer) < len(source):
                buffer = buffers[position] = readback.empty(source.shape, source.dtype)
            hosts.append(buffer[: len(source)])
        for readback in used:
            readback.wait_for_compute()
        for source, host, readback in zip(sources, hosts, readbacks, strict=True):
            if readback is not None:
                readback.copy(source, host)
        self._under_way.append(_Batch(sources, hosts, [readback.record_event() for readback in used], buffers))

    def _drain(self, keep: int) -> None:
        """Store the batches that have arrived; while more than `keep` are under way, wait for the oldest."""
        if self._under_way and keep == 0:
            self._under_way[-1].wait()  # and so for those before it
        while self._under_way and (len(self._under_way) > keep or self._under_way[0].is_there()):
            self._under_way[0].wait()
            batch = self._under_way.popleft()
            assert self._store is not None
            *arrays, index = (as_array(host, copy=self._store.wants_copies or None) for host in batch.hosts)
            index = index.astype(np.int64)  # a copy, from any width
            self._require_within(index)
            self._store.put(index, arrays)
            if batch.buffers:
                self._idle.append(batch.buffers)

    def _finish(self) -> Any:
        if self._store is None:
            raise CollectError("nothing was added: there is no output to name, shape or type a result after.")
        assert not isinstance(self._store, ScratchStore)
        if self._length is not None:
            missing = np.setdiff1d(np.arange(self._length), self._store.indices(), assume_unique=True)
            if len(missing):
                shown = ", ".join(map(str, missing[:_NAMES_SHOWN]))
                raise CollectError(
                    f"{len(missing):,} of {self._length:,} rows are missing: "
                    f"{shown}{' …' if len(missing) > _NAMES_SHOWN else ''}.\n"
                    "  Does the loader drop the last batch, or skip samples? Without length= and path= the rows that "
                    "are there would do."
                )
        arrays = iter(self._store.arrays())
        return map_tree(lambda _: next(arrays), self._structure)


def _parts(outputs: Any) -> tuple[list[torch.Tensor], list[Rows]]:
    """The tensors of the outputs, detached, and what their rows are."""
    tensors: list[torch.Tensor] = []
    kinds: list[Rows] = []
    for name, leaf in leaves(outputs):
        try:
            tensor = require_dense(leaf)
            dtype = numpy_dtype(tensor)
        except ConversionError as error:
            raise type(error)(f"{_called(name)}: {error}") from error.__cause__
        if tensor.dim() == 0:
            raise CollectError(f"{_called(name)} has no rows: expected (B, …). Averages of a batch go to ScalarLog.")
        if tensors and len(tensor) != len(tensors[0]):
            raise CollectError(
                f"{_called(name)} has {len(tensor)} rows, but {_called(kinds[0].name)} has {len(tensors[0])}."
            )
        tensors.append(tensor)
        kinds.append(Rows(name, tuple(tensor.shape[1:]), dtype))
    if not tensors:
        raise CollectError("outputs without a tensor: there is nothing to collect.")
    if len({kind.name for kind in kinds}) < len(kinds):
        raise CollectError(f"two outputs have the same name: {_listed([kind.name for kind in kinds])}.")
    return tensors, kinds


def _called(name: str) -> str:
    return f'output "{name}"' if name else "the output"


def _listed(names: list[str]) -> str:
    return ", ".join(f'"{name}"' if name else "one tensor" for name in names)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
