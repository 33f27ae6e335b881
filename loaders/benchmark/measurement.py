"""`measure(loader)`: passes over a loader, a dataset or any iterable of batches, and figures for each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loaders.benchmark.alone import Alone, is_dataset
from loaders.benchmark.processes import cpu_s, memory_nbytes
from loaders.benchmark.spread import Spread
from loaders.benchmark.tables import plain_table
from loaders.errors import DatasetError
from loaders.nested import leaves

# The share of a pass's first batches that the rate leaves out: workers fill their queues, or have just started.
_LEAD_IN = 0.25
# A pass is not cut off before it has had more batches than this: it must not count only those that were ready when
# the first one came. After this many times its time it is cut off anyway.
_LEAST_BATCHES = 24
_PATIENCE = 10
# Between two readings of the memory of all processes: each takes milliseconds.
_LOOK_S = 0.1


@dataclass(frozen=True)
class Pass:
    """One pass over a loader, in plain numbers.

    Attributes:
        batches, samples, nbytes: of the whole pass.
        samples_per_s, gb_per_s: after the lead-in, the first quarter of the batches; a GB is 10^9 bytes.
        first_batch_s: from requesting an iterator to the first batch.
        turn_s: from the last batch of the previous pass to the first of this one, with all work in between;
            None if the previous pass did not reach its end.
        cpu_cores: CPU seconds of all processes per second, after the first batch.
    """

    batches: int
    samples: int
    nbytes: int
    samples_per_s: float
    gb_per_s: float
    first_batch_s: float
    turn_s: float | None
    cpu_cores: float


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`.

    Attributes:
        name: the name of what was measured.
        first_batch: seconds to the first batch of the very first pass: workers start, files are read cold.
        memory_nbytes: the peak of all processes while iterating, each shared page counted once (PSS), less what the
            process had taken before; None if the platform does not report it. See `processes.memory_nbytes`.
        passes: one for each round.
    """

    name: str
    first_batch: Spread
    memory_nbytes: int | None
    passes: tuple[Pass, ...]

    @property
    def samples_per_s(self) -> Spread:
        """Over the rounds."""
        return Spread.of([each.samples_per_s for each in self.passes])

    @property
    def gb_per_s(self) -> Spread:
        """Over the rounds."""
        return Spread.of([each.gb_per_s for each in self.passes])

    @property
    def cpu_cores(self) -> Spread:
        """Over the rounds."""
        return Spread.of([each.cpu_cores for each in self.passes])

    @property
    def turn_s(self) -> Spread | None:
        """Over the rounds in which an epoch followed a complete one; None if there is none."""
        turns = [each.turn_s for each in self.passes if each.turn_s is not None]
        return Spread.of(turns) if turns else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-compatible values, with medians and quartiles."""
        turn = self.turn_s
        return {
            "name": self.name,
            "samples_per_s": self.samples_per_s._asdict(),
            "gb_per_s": self.gb_per_s._asdict(),
            "first_batch_s": self.first_batch._asdict(),
            "turn_s": turn._asdict() if turn is not None else None,
            "cpu_cores": self.cpu_cores._asdict(),
            "memory_nbytes": self.memory_nbytes,
            "passes": [asdict(each) for each in self.passes],
        }

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Measurement:
        """The inverse of `to_dict`."""
        passes = tuple(Pass(**each) for each in kept["passes"])
        return cls(kept["name"], Spread(**kept["first_batch_s"]), kept["memory_nbytes"], passes)

    @classmethod
    def merged(cls, parts: Sequence[Measurement]) -> Measurement:
        """Rounds that were measured separately, such as in different processes, as one measurement."""
        memory = [part.memory_nbytes for part in parts if part.memory_nbytes is not None]
        return cls(
            parts[0].name,
            Spread.of([part.first_batch.median for part in parts]),
            int(statistics.median(memory)) if memory else None,
            tuple(each for part in parts for each in part.passes),
        )

    def __str__(self) -> str:
        return plain_table([self])


def measure(
    loader: Any,
    *,
    name: str | None = None,
    rounds: int = 5,
    seconds: float = 2.0,
    each: Callable[[Any], Any] | None = None,
) -> Measurement:
    """Iterate a loader and measure how fast it is.

    There is one more pass than rounds: the first one warms up, and measures the memory. Nothing but `each` is done
    with the batches: this is what the loader can do, not what a training run gets.

    Args:
        loader: a `loaders.DataLoader`, torch's, a `DevicePrefetcher`, or any iterable of batches that can be iterated
            again. Anything with `__getitem__` and `__len__` is a dataset: its samples are read one by one in this
            thread, each under its key, with OpenCV's own threads off.
        name: for tables; the name of the type by default.
        rounds: how many passes are counted, at least 1.
        seconds: a pass ends with its epoch, or this long after its first batch if it has had two dozen. `turn_s` is
            measured only where epochs reach their end.
        each: called with every batch, such as a training step; its time counts.

    Raises:
        DatasetError: there are no batches.
        TypeError: the loader can be iterated only once, or not at all.
    """
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds={rounds}, seconds={seconds}: expected at least one round of more than no time.")
    name = name or type(loader).__name__
    source: Any = Alone(loader) if is_dataset(loader) else loader
    if not isinstance(source, Iterable):
        raise TypeError(f"{name} is no iterable of batches and no dataset: it has neither __iter__ nor __getitem__.")
    if isinstance(source, Iterator):
        raise TypeError(f"{name} can be iterated only once: pass the loader itself, or a list of its batches.")
    single = isinstance(source, Alone) or _gives_samples(source)
    before = memory_nbytes()
    run = _Passes(source, name, seconds, each, single)
    first = run.go_through(look=True)
    passes = tuple(run.go_through() for _ in range(rounds))
    memory = run.most_nbytes - before if run.most_nbytes is not None and before is not None else None
    return Measurement(name, Spread.of([first.first_batch_s]), memory, passes)


class _Passes:
    """Iterates a loader several times, and keeps how the previous pass ended."""

    def __init__(
        self, source: Iterable[Any], name: str, seconds: float, each: Callable[[Any], Any] | None, single: bool
    ) -> None:
        self._source = source
        self._name = name
        self._seconds = seconds
        self._each = each
        self._single = single
        self._ended_at: float | None = None  # when the last batch of an epoch came, less the time measuring took
        self.most_nbytes: int | None = None

    def go_through(self, look: bool = False) -> Pass:
        """One pass; `look` measures the memory, which takes time that is not subtracted."""
        arrivals: list[tuple[float, int, int]] = []
        looked, cpu_began, counted_from, ended = 0.0, 0.0, 0.0, True
        began = now = time.perf_counter()
        for batch in self._source:
            now = time.perf_counter()
            arrivals.append((now, *self._size(batch)))
            if len(arrivals) == 1:
                cpu_began, counted_from = cpu_s(), time.perf_counter()
            if self._each is not None:
                self._each(batch)
            if look and now - looked > _LOOK_S:
                self._look()
                looked = time.perf_counter()
            elapsed_s = now - arrivals[0][0]
            if elapsed_s > self._seconds and (len(arrivals) > _LEAST_BATCHES or elapsed_s > _PATIENCE * self._seconds):
                ended = False
                break
        if not arrivals:
            raise DatasetError(f"{self._name} gave not one batch: there is nothing to measure.")
        del batch
        _wait_for_device()
        finished = time.perf_counter()
        turn = arrivals[0][0] - self._ended_at if self._ended_at is not None else None
        cpu = (cpu_s() - cpu_began) / max(finished - counted_from, 1e-9)
        rate, byte_rate = _rates(began, arrivals)
        self._ended_at = now + (time.perf_counter() - finished) if ended else None
        samples, nbytes = sum(arrival[1] for arrival in arrivals), sum(arrival[2] for arrival in arrivals)
        return Pass(len(arrivals), samples, nbytes, rate, byte_rate / 1e9, arrivals[0][0] - began, turn, cpu)

    def _size(self, batch: Any) -> tuple[int, int]:
        """Samples and bytes in a batch."""
        samples, nbytes = None, 0
        for _, leaf in leaves(batch):
            nbytes += int(getattr(leaf, "nbytes", 0))
            shape: Any = getattr(leaf, "shape", ())
            if samples is None and len(shape) > 0:
                samples = int(shape[0])
        return (1 if self._single or samples is None else samples), nbytes

    def _look(self) -> None:
        found = memory_nbytes()
        if found is not None:
            self.most_nbytes = max(found, self.most_nbytes or 0)


def _rates(began: float, arrivals: list[tuple[float, int, int]]) -> tuple[float, float]:
    """Samples and bytes per second between the end of the lead-in and the last arrival."""
    first = int(len(arrivals) * _LEAD_IN)
    counted = arrivals[first + 1 :]
    start = arrivals[first][0]
    if not counted:  # a single batch
        counted, start = arrivals, began
    elapsed_s = max(counted[-1][0] - start, 1e-9)
    return sum(arrival[1] for arrival in counted) / elapsed_s, sum(arrival[2] for arrival in counted) / elapsed_s


def _gives_samples(loader: Any) -> bool:
    """Whether a loader was made with `batch_size=None` and so gives single samples."""
    return hasattr(loader, "batch_sampler") and hasattr(loader, "batch_size") and loader.batch_sampler is None


def _wait_for_device() -> None:
    """Wait for queued copies and kernels, which have not been done yet."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "accelerator") and torch.accelerator.is_available():
        torch.accelerator.synchronize()
