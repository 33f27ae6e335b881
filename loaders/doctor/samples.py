"""Samples read on trial, and what they show."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.benchmark.alone import Alone
from loaders.datasets.wrapped import describe
from loaders.doctor.finding import Finding
from loaders.errors import describe_sample
from loaders.nested import leaves
from loaders.system.limits import available_nbytes

_SLOW = 10.0  # times the median
_SLOW_S = 0.005
_OPEN_BATCHES = 4  # those a loader has in flight, and one held by the model
_SHOWN = 3


@dataclass(frozen=True)
class Read:
    """One sample that was read, or the exception raised instead.

    Attributes:
        fields: path → leaf, such as "image" or "meta.boxes"; empty after an error.
    """

    index: int
    source: str | None
    seconds: float
    fields: dict[str, Any]
    error: Exception | None = None

    @property
    def name(self) -> str:
        """The name used in all messages."""
        return describe_sample(self.index, self.source)


def read_samples(dataset: Any, indices: Sequence[int]) -> list[Read]:
    """Read each sample, or keep its error."""
    found = []
    for index in indices:
        source, began = describe(dataset, index), time.perf_counter()
        try:
            (sample,) = Alone(dataset, [index])
        except Exception as error:
            found.append(Read(index, source, time.perf_counter() - began, {}, error))
        else:
            found.append(Read(index, source, time.perf_counter() - began, dict(leaves(sample))))
    return found


def check_reading(reads: Sequence[Read]) -> Finding:
    """Whether samples can be read at all."""
    failed = [read for read in reads if read.error is not None]
    if not failed:
        return Finding("reading", "fine", f"{len(reads)} samples read")
    first = failed[0]
    return Finding(
        "reading",
        "problem",
        f"{len(failed)} of {len(reads)} samples raise; {first.name}: {type(first.error).__name__}: {first.error}",
        'Mend or remove them, or let the loader go on without them: on_error="skip".',
    )


def check_fields(reads: Sequence[Read]) -> Finding:
    """Whether all samples have the same fields."""
    good = _good(reads)
    kinds: dict[tuple[str, ...], Read] = {}
    for read in good:
        kinds.setdefault(tuple(read.fields), read)
    if len(kinds) > 1:
        told = "; ".join(f"{read.name}: {', '.join(names) or 'none'}" for names, read in list(kinds.items())[:_SHOWN])
        return Finding(
            "fields", "problem", f"samples differ in their fields: {told}", "Give every sample the same fields."
        )
    names = ", ".join(
        f"{name or 'the sample'}: {_kind(value)}" for name, value in (good[0].fields if good else {}).items()
    )
    return Finding("fields", "fine", names)


def check_shapes(reads: Sequence[Read], declared: Sequence[str] = ()) -> Finding:
    """Whether each field has one shape; declared fields may vary."""
    for name, values in _columns(reads).items():
        shapes: dict[tuple[int, ...], Read] = {}
        for read, value in values:
            if hasattr(value, "shape"):
                shapes.setdefault(tuple(value.shape), read)
        if len(shapes) > 1 and name not in declared:
            (one, first), (other, second) = list(shapes.items())[:2]
            return Finding(
                "shapes",
                "problem",
                f'field "{name}" has {len(shapes)} shapes: {one} in {first.name}, {other} in {second.name}',
                "Resize in the dataset (ImageFolder(crop=…)), or declare it: "
                f'DataLoader(fields={{"{name}": Field(pad=0)}}), or Field(ragged=True).',
            )
    return Finding("shapes", "fine", "the same in all samples, or declared")


def check_dtypes(reads: Sequence[Read]) -> Finding:
    """Whether each field has one dtype, and none larger than needed."""
    for name, values in _columns(reads).items():
        kinds: dict[str, Read] = {}
        for read, value in values:
            if isinstance(value, np.ndarray):
                kinds.setdefault(str(value.dtype), read)
        if len(kinds) > 1:
            told = ", ".join(f"{kind} in {read.name}" for kind, read in list(kinds.items())[:_SHOWN])
            return Finding("dtypes", "problem", f'field "{name}" has several: {told}', "Convert it in the dataset.")
        first = values[0][1]
        if not isinstance(first, np.ndarray):
            continue
        if first.dtype == object:
            return Finding(
                "dtypes",
                "warning",
                f'field "{name}" holds Python objects, which travel by pickle',
                "Give arrays of numbers, or strings as they are.",
            )
        if first.dtype == np.float64:
            return Finding(
                "dtypes",
                "warning",
                f'field "{name}" is float64: twice the bytes of float32, and models take float32',
                "Convert it in the dataset: .astype(np.float32).",
            )
        if first.dtype == np.float32 and first.ndim == 3 and 3 in (first.shape[0], first.shape[2]):
            return Finding(
                "dtypes",
                "warning",
                f'field "{name}" is an image of float32: four times the bytes of uint8',
                "With an accelerator leave it uint8, and finish it there: DevicePrefetcher(transform=Normalize(…)).",
            )
    return Finding("dtypes", "fine", "the same in all samples")


def check_tensors(reads: Sequence[Read]) -> Finding:
    """Whether samples hold tensors, which makes workers import torch."""
    for name, values in _columns(reads).items():
        if type(values[0][1]).__module__.partition(".")[0] == "torch":
            return Finding(
                "tensors",
                "warning",
                f'field "{name}" is a tensor: every worker imports torch, some 200 MB each and seconds to start',
                "Leave ToTensor and torch.from_numpy out of the dataset: batches become tensors by themselves.",
            )
    return Finding("tensors", "fine", "none: samples are NumPy's")


def check_contiguity(reads: Sequence[Read]) -> Finding:
    """Whether arrays are contiguous, so that writing them is one copy at full speed."""
    for name, values in _columns(reads).items():
        for read, value in values:
            if isinstance(value, np.ndarray) and not value.flags.c_contiguous and value.nbytes > 4096:
                return Finding(
                    "contiguity",
                    "warning",
                    f'field "{name}" of {read.name} has strides {value.strides} for shape {value.shape}: writing it '
                    "into the batch takes several times as long",
                    "Turn with cv2.flip in place of [::-1], and leave (H, W, C) as it is: the device transposes.",
                )
    return Finding("contiguity", "fine", "arrays lie in one run of bytes")


def check_sizes(reads: Sequence[Read], batch_size: int, available: int | None = None) -> Finding:
    """Whether the batches in flight at once fit into memory."""
    available = available_nbytes() if available is None else available
    sizes = [sum(int(getattr(value, "nbytes", 0)) for value in read.fields.values()) for read in _good(reads)]
    if not sizes:
        return Finding("sizes", "fine", "not known")
    largest = max(sizes)
    needed = largest * batch_size * _OPEN_BATCHES
    told = (
        f"{statistics.mean(sizes) / 1e3:,.1f} KB a sample, {largest * batch_size / 1e6:,.1f} MB a batch of "
        f"{batch_size}, about {needed / 1e6:,.0f} MB for {_OPEN_BATCHES} of them"
    )
    if needed > available / 2:
        return Finding(
            "sizes",
            "problem",
            f"{told}, and half of {available / 1e6:,.0f} MB is what a loader takes",
            "Use a smaller batch_size or smaller samples.",
        )
    return Finding("sizes", "fine", told)


def check_slow_samples(reads: Sequence[Read]) -> Finding:
    """Whether a few samples take far longer than the others. The first one also pays for lazy loading."""
    timed = [read for read in reads if read.error is None][1:]
    if len(timed) < 4:
        return Finding("slow samples", "fine", "too few samples to tell")
    usual = statistics.median(read.seconds for read in timed)
    slow = sorted(
        (read for read in timed if read.seconds > max(_SLOW * usual, _SLOW_S)), key=lambda read: -read.seconds
    )
    if not slow:
        return Finding(
            "slow samples", "fine", f"{usual * 1e3:.2f} ms in the median, none takes {_SLOW:.0f} times as long"
        )
    share = sum(read.seconds for read in slow) / sum(read.seconds for read in timed)
    told = ", ".join(f"{read.name} {read.seconds * 1e3:,.0f} ms" for read in slow[:_SHOWN])
    return Finding(
        "slow samples",
        "warning",
        f"{len(slow)} of {len(timed)} take {share:.0%} of the time: {told}; the median is {usual * 1e3:.2f} ms",
        "Look at these files: often they are far larger than the others. Workers share each batch, so one of them "
        "holds up little as long as there are two workers.",
    )


def _good(reads: Sequence[Read]) -> list[Read]:
    return [read for read in reads if read.error is None]


def _columns(reads: Sequence[Read]) -> dict[str, list[tuple[Read, Any]]]:
    """Field → (sample, value) of all samples that have it."""
    columns: dict[str, list[tuple[Read, Any]]] = {}
    for read in _good(reads):
        for name, value in read.fields.items():
            columns.setdefault(name, []).append((read, value))
    return columns


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
