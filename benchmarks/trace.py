"""How much of the copying to a device is hidden behind its computing, from a profiler's trace."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Span = tuple[float, float]  # begin and end, in any unit


class Activity(NamedTuple):
    """What a device did: the spans of copies from the host and of kernels, by stream."""

    copies: Mapping[int, Sequence[Span]]
    kernels: Mapping[int, Sequence[Span]]


def union(spans: Iterable[Span]) -> list[Span]:
    """The union of the spans, as sorted, disjoint spans."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """The total length of disjoint spans."""
    return sum(end - begin for begin, end in spans)


def common(ours: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The intersection of two lists of sorted, disjoint spans."""
    found, mine, other = [], 0, 0
    while mine < len(ours) and other < len(others):
        begin, end = max(ours[mine][0], others[other][0]), min(ours[mine][1], others[other][1])
        if begin < end:
            found.append((begin, end))
        if ours[mine][1] < others[other][1]:
            mine += 1
        else:
            other += 1
    return found


def hidden_share(activity: Activity, lead_in: float = 0.0) -> float:
    """The share of the time of copies from the host during which kernels run on other streams.

    Args:
        lead_in: the share of the trace, from its start, whose copies are not counted: a starting profiler disturbs what
            it measures.

    Raises:
        ValueError: there is no kernel, or no copy after the lead-in.
    """
    if not any(activity.kernels.values()):
        raise ValueError("the trace has no kernel: nothing was computed while it was recorded.")
    spans = [span for kind in activity for each in kind.values() for span in each]
    first, last = min(begin for begin, _ in spans), max(end for _, end in spans)
    begins = first + lead_in * (last - first)
    copied = hidden = 0.0
    for stream, copies in activity.copies.items():
        counted = union(span for span in copies if span[0] >= begins)
        elsewhere = union(span for other, each in activity.kernels.items() if other != stream for span in each)
        copied += length(counted)
        hidden += length(common(counted, elsewhere))
    if copied == 0:
        raise ValueError("the trace has no copy from the host to the device after its lead-in.")
    return hidden / copied


def activity_of(events: Iterable[Mapping[str, Any]]) -> Activity:
    """The activity in the "traceEvents" of torch's profiler, in microseconds."""
    copies: dict[int, list[Span]] = defaultdict(list)
    kernels: dict[int, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        kind, begin = event.get("cat"), float(event["ts"])
        span = (begin, begin + float(event.get("dur", 0)))
        if kind == "kernel":
            kernels[_stream(event)].append(span)
        elif kind == "gpu_memcpy" and "HtoD" in event["name"]:
            copies[_stream(event)].append(span)
    return Activity(dict(copies), dict(kernels))


def _stream(event: Mapping[str, Any]) -> int:
    return int(event["args"]["stream"])


def record(work: Callable[[], Any]) -> Activity:
    """The activity of the CUDA device during `work()`, which must wait for the device at its end."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns about activities that are left out on purpose
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return activity_of(json.loads(file.read_text(errors="replace"))["traceEvents"])
