"""`ScalarLog`: running means of losses and accuracies, read from the device once in many steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from loaders.outputs.collector import readback_of


class ScalarLog:
    """Means of the scalars of each step, without making the host wait for the device each step.

        log = ScalarLog(every=50)
        for batch in batches:
            ...
            means = log.add({"loss": loss, "accuracy": accuracy}, weight=len(batch["label"]))
            if means is not None:
                print(means)

    Weighted sums grow on the device. Every `every` steps they are sent to the host by one copy that nobody waits for:
    the first later `add` that finds them arrived returns the means of those steps; on the CPU that is at once.

    Args:
        every: how many calls of `add` make one mean, at least 1.
    """

    def __init__(self, every: int = 50) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected how many steps make one mean, 1 or more.")
        self.every = every
        self._steps = 0  # of the open sums
        self._open = _Sums()
        self._sent: deque[_Sums] = deque()

    def add(self, scalars: Mapping[str, torch.Tensor | float], weight: float = 1) -> dict[str, float] | None:
        """Count one step. Call it on the stream that the tensors are made on, always the same.

        Args:
            scalars: tensors of one element on any device, detached here, or numbers. Names may differ from step to
                step: each has the mean of the steps that had it.
            weight: of this step, such as the samples in its batch, so that a short last batch counts by its size.

        Returns:
            The means of the oldest `every` steps that have arrived and were not returned yet, or None.

        Raises:
            ValueError: a tensor of more or less than one element, a complex one, or a weight below 0.
            TypeError: a value that is neither tensor nor number, or a weight that is not a host number.
        """
        if not isinstance(weight, (int, float, np.integer, np.floating)):
            raise TypeError(f"weight of type {type(weight).__name__}: expected a number that the host knows.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight={weight!r}: expected 0 or more.")
        checked = {name: _checked(name, value) for name, value in scalars.items()}
        # Sums made in a caller's inference_mode could not be added to outside of it.
        with torch.inference_mode():
            for name, value in checked.items():
                self._open.add(name, value, weight)
            self._steps += 1
            if self._steps == self.every:
                self._send()
        return self._sent.popleft().means() if self._sent and self._sent[0].is_there() else None

    def flush(self) -> dict[str, float] | None:
        """The means of all that was not returned yet, after a wait for it; None if there is nothing."""
        if self._steps:
            with torch.inference_mode():
                self._send()
        whole = _Sums()
        while self._sent:
            whole.include(self._sent.popleft())
        return whole.means() or None

    def _send(self) -> None:
        self._open.send()
        self._sent.append(self._open)
        self._open, self._steps = _Sums(), 0


class _Sums:
    """The weighted sums of some steps: those on the host at once, and one vector per device under way."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}  # in the order in which the names first appeared
        self._on_host: dict[str, float] = {}
        self._on_device: dict[torch.device, dict[str, torch.Tensor]] = {}
        self._arriving: list[tuple[list[str], torch.Tensor, torch.Tensor, Any]] = []  # names, source, host, event

    def add(self, name: str, value: torch.Tensor | float, weight: float) -> None:
        self._weights[name] = self._weights.get(name, 0.0) + weight
        if not isinstance(value, torch.Tensor) or _is_on_host(value):
            self._on_host[name] = self._on_host.get(name, 0.0) + float(value) * weight
            return
        sums = self._on_device.setdefault(value.device, {})
        if name in sums:
            sums[name].add_(value, alpha=weight)
        else:
            sums[name] = value.to(_wide(value.device)) * weight

    def send(self) -> None:
        """Enqueue the copies to the host."""
        for sums in self._on_device.values():
            source = torch.stack(list(sums.values()))
            readback = readback_of(source)
            if readback is None:  # a device without streams
                self._arriving.append((list(sums), source, source.cpu(), None))
                continue
            host = readback.empty(source.shape, source.dtype)
            readback.wait_for_compute()
            readback.copy(source, host)
            self._arriving.append((list(sums), source, host, readback.record_event()))
        self._on_device.clear()

    def is_there(self) -> bool:
        return all(event is None or event.query() for *_, event in self._arriving)

    def include(self, other: _Sums) -> None:
        """Add the sums of other steps, after a wait for them."""
        other._arrive()
        for name, weight in other._weights.items():
            self._weights[name] = self._weights.get(name, 0.0) + weight
            self._on_host[name] = self._on_host.get(name, 0.0) + other._on_host[name]

    def means(self) -> dict[str, float]:
        self._arrive()
        return {name: self._on_host[name] / weight if weight else math.nan for name, weight in self._weights.items()}

    def _arrive(self) -> None:
        for names, _, host, event in self._arriving:
            if event is not None:
                event.synchronize()
            for name, value in zip(names, host.tolist(), strict=True):
                self._on_host[name] = self._on_host.get(name, 0.0) + value
        self._arriving.clear()


def _checked(name: str, value: Any) -> torch.Tensor | float:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            found = f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
            raise ValueError(f'scalar "{name}" is a {found}: expected one real number, such as its mean().')
        return value.detach().reshape(())
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'scalar "{name}" is of type {type(value).__name__}: expected a tensor of one element, or a number.'
        ) from error


def _is_on_host(value: torch.Tensor) -> bool:
    return value.device.type == "cpu"


def _wide(device: torch.device) -> torch.dtype:
    # Not every accelerator has float64.
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
