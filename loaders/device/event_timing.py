"""`transfer_time`: how long a copy or a conversion takes where it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from loaders.errors import DeviceError


class TransferTime(NamedTuple):
    """What `transfer_time` measured."""

    median_s: float
    fastest_s: float
    slowest_s: float
    times_s: tuple[float, ...]
    nbytes: int | None = None

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second in the median run.

        Raises:
            ValueError: `transfer_time` was not passed the `nbytes` of a run.
        """
        if self.nbytes is None:
            raise ValueError("nbytes is unknown: pass transfer_time(…, nbytes=…).")
        return self.nbytes / self.median_s / 1e9


def transfer_time(
    fn: Callable[[], Any],
    *,
    device: str | torch.device | None = None,
    warm_up: int = 3,
    runs: int = 20,
    nbytes: int | None = None,
) -> TransferTime:
    """Time `fn()`, such as `lambda: target.copy_(source, non_blocking=True)`.

    On an accelerator: the time between two events on its current stream, one before and one after what `fn` enqueues
    there. Each run starts on an idle device, so the host's time to enqueue counts where the device waits for it. Work
    that `fn` enqueues on other streams counts only if it makes the current stream wait for them.

    On the CPU: the time of the call by `time.perf_counter`.

    Args:
        device: default: the accelerator if there is one, else the CPU.
        warm_up: runs beforehand that are not counted: the first ones allocate and compile.
        runs: how many are counted, at least 1.
        nbytes: what one run moves; then the result has `gb_per_s`.

    Raises:
        DeviceError: torch cannot use the device, or has no events with times for it.
    """
    if runs < 1 or warm_up < 0:
        raise ValueError(f"runs={runs}, warm_up={warm_up}: expected at least 1 and 0.")
    place = torch.device(device) if device is not None else _default_device()
    run = _timed_by_host if place.type == "cpu" else _timed_by_events
    for _ in range(warm_up):
        run(fn, place)
    times_s = tuple(run(fn, place) for _ in range(runs))
    return TransferTime(statistics.median(times_s), min(times_s), max(times_s), times_s, nbytes)


def _default_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _timed_by_host(fn: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _timed_by_events(fn: Callable[[], Any], device: torch.device) -> float:
    try:
        stream = torch.accelerator.current_stream(device)
        before, after = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize(device)
        before.record(stream)
    except Exception as error:
        raise _cannot_time(device, error) from error
    fn()
    after.record(stream)
    after.synchronize()
    try:
        return before.elapsed_time(after) / 1e3
    except RuntimeError as error:
        raise _cannot_time(device, error) from error


def _cannot_time(device: torch.device, error: Exception) -> DeviceError:
    return DeviceError(f"device {str(device)!r} cannot time what it runs: {error}")
