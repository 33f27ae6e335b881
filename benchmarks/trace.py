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
    """The same time in spans that are in order and apart."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """How long it all takes; of spans that are apart."""
    return sum(end - begin for begin, end in spans)


def common(ours: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The time that is in both, each in order and apart."""
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
    """The share of the time in which the device copies from the host that kernels of other streams cover.

    Args:
        lead_in: the share of the trace, by time, whose copies are not counted: a profiler that starts interrupts what
            it watches.

    Raises:
        ValueError: there is no kernel, or no copy behind the lead-in.
    """
    if not any(activity.kernels.values()):
        raise ValueError("the trace has no kernel: nothing was computed while it was taken.")
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
        raise ValueError("the trace has no copy from the host to the device behind its lead-in.")
    return hidden / copied


def activity_of(events: Iterable[Mapping[str, Any]]) -> Activity:
    """What torch's profiler writes under "traceEvents", in microseconds."""
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
    """What the CUDA device does during `work()`, which waits for it in the end."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's, about what is left out on purpose
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return activity_of(json.loads(file.read_text(errors="replace"))["traceEvents"])
