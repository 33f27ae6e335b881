"""`loaders.progress`: a bar for a loop over batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from loaders.nested import leaves
from loaders.report.units import percent

# How often a line is written where there is no terminal.
_EVERY_S = 10.0


def progress(loader: Iterable[Any], label: str = "", *, console: Console | None = None) -> Iterator[Any]:
    """Iterate `loader`, and show the progress: `for batch in loaders.progress(loader): …`.

    It shows samples per second, the share of the time in which the loop waits for batches, the time left, and the
    position: the batch from which `state_dict()` resumes. In a terminal it is a bar; where the output is piped, a line
    every ten seconds and one at the end.

    Args:
        loader: of this package or any other iterable of batches.
        label: shown in front.
        console: where to write; standard error by default.
    """
    console = console or Console(stderr=True)
    pace = Pace.of(loader)
    if not console.is_terminal:
        return _with_lines(loader, pace, label, console)
    return _with_bar(loader, pace, label, console)


@dataclass
class Pace:
    """The progress of a loop.

    Attributes:
        epoch: None where the loader reports none. `total`: the number of batches, None where unknown.
        batch: the next one, as `state_dict()` counts them. `first`: the first one of this loop.
    """

    epoch: int | None
    total: int | None
    first: int = 0
    batch: int = 0
    samples: int = 0
    began_s: float = 0.0
    now_s: float = 0.0
    waited_s: float = 0.0

    @classmethod
    def of(cls, loader: Any) -> Pace:
        """The progress before the loop begins."""
        try:
            total = len(loader)
        except TypeError:
            total = None
        return cls(None, total)

    def _locate(self, loader: Any) -> None:
        """Read the position, after the first batch: before, the state may be that of an epoch that was left."""
        try:
            state = loader.state_dict()
            self.epoch, self.batch = state["epoch"], state["batches"]
        except Exception:  # noqa: BLE001  another kind of loader, or without a state now: only for display
            return
        self.first = self.batch - 1

    def follow(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches, and count them."""
        batches = iter(loader)
        self.began_s = self.now_s = time.perf_counter()
        while True:
            asked_s = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                self.now_s = time.perf_counter()
                return
            self.now_s = time.perf_counter()
            self.waited_s += self.now_s - asked_s
            self.batch += 1
            if self.batch == 1:
                self._locate(loader)
            self.samples += _rows_of(batch) if getattr(loader, "batch_sampler", "") is not None else 1
            yield batch
            del batch  # not held while the next one is made

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / max(1e-9, self.now_s - self.began_s)

    @property
    def waits(self) -> float:
        """Share of the time in which the loop waited."""
        return self.waited_s / max(1e-9, self.now_s - self.began_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end; None where unknown."""
        done = self.batch - self.first
        if self.total is None or not done:
            return None
        return (self.now_s - self.began_s) / done * max(0, self.total - self.batch)

    def where(self) -> str:
        """`epoch 3, batch 120 of 400`."""
        epoch = "" if self.epoch is None else f"epoch {self.epoch}, "
        return f"{epoch}batch {self.batch:,}" + ("" if self.total is None else f" of {self.total:,}")

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", {_clock(self.left_s)} left"
        return f"{self.where()}: {self.rate:,.0f} samples/s, waits {percent(self.waits)}{left}"


def _with_lines(loader: Iterable[Any], pace: Pace, label: str, console: Console) -> Iterator[Any]:
    told_s = time.perf_counter()

    def tell() -> None:
        console.print(f"{label} {pace}".strip(), highlight=False, markup=False, soft_wrap=True)

    try:
        for batch in pace.follow(loader):
            yield batch
            del batch
            if time.perf_counter() - told_s >= _EVERY_S:
                told_s = time.perf_counter()
                tell()
    finally:
        tell()


def _with_bar(loader: Iterable[Any], pace: Pace, label: str, console: Console) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
    bar = Progress(*columns, TextColumn("{task.fields[pace]}", markup=False), console=console)
    task: TaskID = bar.add_task(label, total=pace.total, completed=pace.batch, pace=str(pace))
    try:
        bar.start()
    except LiveError:  # another bar is shown around this one
        yield from _with_lines(loader, pace, label, console)
        return
    try:
        for batch in pace.follow(loader):
            bar.update(task, completed=pace.batch, pace=str(pace))
            yield batch
            del batch
    finally:
        bar.update(task, completed=pace.batch, pace=str(pace))
        bar.stop()


def _rows_of(batch: Any) -> int:
    """Samples of a batch: the length of the first array or tensor in it; 0 where there is none."""
    for _, leaf in leaves(batch):
        shape = getattr(leaf, "shape", None)
        if shape is not None and len(shape):
            return int(shape[0])
    return 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
