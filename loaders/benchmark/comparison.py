"""`loaders bench`: loaders compared with each other and with their ceilings, every run in its own process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loaders.benchmark.measurement import Measurement
from loaders.benchmark.run import READY
from loaders.benchmark.setups import Setup
from loaders.benchmark.spread import Spread
from loaders.errors import DatasetError
from loaders.system.limits import whole_cores

# From this share on a loader counts as reaching its ceiling: the rest is measurement noise.
_NEAR = 0.85
_LEAST_BATCHES = 24  # in an epoch: `measure` does not cut off an epoch this short
_MOST_SAMPLES = 1 << 20
# Processes that read the dataset alone at the same time; each holds a whole program in memory.
_MOST_READERS = 16
_TIMEOUT_S = 900
_ALONE = "the dataset alone"


@dataclass(frozen=True)
class Ceiling:
    """A rate that no loader can exceed on this machine.

    Attributes:
        name: what sets the limit: "decoding", "copying", ….
        samples_per_s: over the rounds.
        how: what was measured.
    """

    name: str
    samples_per_s: Spread
    how: str


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        target: as given.
        cores: how many this process may use.
        batch_size, samples: samples in a batch and in an epoch.
        measurements: in the order of the setups.
        setups: what was measured.
        ceilings: lowest first.
    """

    target: str
    cores: int
    batch_size: int
    samples: int
    setups: tuple[Setup, ...]
    measurements: tuple[Measurement, ...]
    ceilings: tuple[Ceiling, ...]

    def best(self) -> Measurement:
        """The fastest of our loaders, or of the loader that was given."""
        ours = [each for setup, each in self._pairs() if setup.whose != "torch"]
        return max(ours or self.measurements, key=lambda each: each.samples_per_s.median)

    def ratios(self) -> dict[str, Spread]:
        """Name of our loader → its rate divided by that of torch's with as many workers, within each round."""
        torchs = {setup.workers: each for setup, each in self._pairs() if setup.whose == "torch"}
        return {
            each.name: Spread.of(
                [
                    mine.samples_per_s / theirs.samples_per_s
                    for mine, theirs in zip(each.passes, torchs[setup.workers].passes, strict=True)
                ]
            )
            for setup, each in self._pairs()
            if setup.whose == "ours" and setup.workers in torchs
        }

    def sentence(self) -> str:
        """What limits the best loader, and what to do about it."""
        best = self.best()
        rate = f"{best.name}: {best.samples_per_s.median:,.0f} samples/s"
        if not self.ceilings:
            return f"{rate}. The target has no dataset that could be read alone, so no ceiling was measured."
        lowest = self.ceilings[0]
        share = best.samples_per_s.median / lowest.samples_per_s.median
        at = f"at {share:.0%} of what" if share < 1 else "at what"
        told = f"{rate}: you are {at} {lowest.name} allows here ({lowest.how})."
        setup = next(setup for setup, each in self._pairs() if each is best)
        if share >= _NEAR:
            return f"{told} {_WAYS_OUT[lowest.name]}"
        if setup.workers < self.cores:
            return f"{told} There are {self.cores} cores: try --workers {self.cores}."
        return (
            f"{told} The rest goes to starting, to waiting and to this process; a second run tells how steady that is."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-compatible values."""
        return {
            "target": self.target,
            "cores": self.cores,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "sentence": self.sentence(),
            "ceilings": [{**asdict(each), "samples_per_s": each.samples_per_s._asdict()} for each in self.ceilings],
            "loaders": [{**asdict(setup), **each.to_dict()} for setup, each in self._pairs()],
            "ours_to_torch": {name: ratio._asdict() for name, ratio in self.ratios().items()},
        }

    def _pairs(self) -> list[tuple[Setup, Measurement]]:
        return list(zip(self.setups, self.measurements, strict=True))


_DECODING, _DATASET, _COPYING, _DELIVERY, _DEVICE = (
    "decoding",
    "the dataset",
    "copying",
    "the delivery of ready samples",
    "the copy to the device",
)
_WAYS_OUT = {
    _DECODING: "No loader gets more out of these cores: decode less of each image (crop=), keep decoded samples "
    "(DecodedCache), or use more cores.",
    _DATASET: "No loader gets more out of these cores: make samples cheaper to read, or use more cores.",
    _COPYING: "Memory is the limit: make samples smaller, such as uint8 in place of float32.",
    _DELIVERY: "Samples cost next to nothing here: make batches larger, or hold the data on the device.",
    _DEVICE: "The bus is the limit: send uint8 and normalise on the device (loaders.Normalize).",
}


def compare(
    target: str,
    setups: Callable[[bool], Sequence[Setup]],
    *,
    batch_size: int = 64,
    crop: int = 0,
    rounds: int = 3,
    seconds: float = 1.0,
    samples: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure all setups over a target, and its ceilings: one after another in each round, in alternating order.

    Args:
        target: as for `load_target`.
        setups: whether the target is a loader → the setups to measure.
        seconds: the epoch is sized so that reading the dataset alone, on all cores, takes about this long.
        samples: the length of an epoch, in place of `seconds`.
        tell: called with a line before each run.

    Raises:
        DatasetError: the target is invalid, or a process failed; the message has its last output.
    """
    tell(f"looking at {target}")
    common: dict[str, Any] = {"target": target, "crop": crop}
    cores = whole_cores()
    kind = _run("probe", seconds=min(seconds, 1.0), **common)
    chosen = list(setups(kind["is_loader"]))
    has_length = kind["length"] is not None
    if not has_length and any(setup.whose != "as it is" for setup in chosen):
        raise DatasetError(f'"{target}" gave no dataset with a length: only the loader as it is can be measured.')
    batch_size = kind["batch_size"] or batch_size
    if samples is None:
        wanted = kind.get("per_s", 0) * cores * seconds
        samples = int(min(max(wanted, _LEAST_BATCHES * batch_size), _MOST_SAMPLES))
    parts: dict[str, Callable[[], Any]] = {
        setup.name: lambda setup=setup: _run(  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            "loader", setup=asdict(setup), samples=samples, batch_size=batch_size, seconds=seconds, **common
        )
        for setup in chosen
    }
    if has_length:
        readers = min(cores, _MOST_READERS)
        parts[_ALONE] = lambda: _run_together(
            readers, "alone", samples=samples, seconds=seconds, together=True, **common
        )
    found: dict[str, list[Any]] = {name: [] for name in parts}
    for number in range(rounds):
        for name in parts if number % 2 == 0 else reversed(parts):
            tell(f"round {number + 1} of {rounds}: {name}")
            found[name].append(parts[name]())
    measurements = tuple(
        Measurement.merged([Measurement.from_dict(each["loader"]) for each in found[setup.name]]) for setup in chosen
    )
    whole = Comparison(target, cores, batch_size, samples, tuple(chosen), measurements, ())
    if not has_length:
        return whole
    best = whole.best().name
    ceilings = [*_of_the_dataset(found[_ALONE], cores, kind["kind"]), *_of_delivery(found[best], best)]
    return replace(whole, ceilings=tuple(sorted(ceilings, key=lambda ceiling: ceiling.samples_per_s.median)))


def _of_the_dataset(alone: Sequence[dict[str, list[float | None]]], cores: int, kind: str) -> list[Ceiling]:
    readers = min(cores, _MOST_READERS)
    on_cores = "one core" if cores == 1 else f"{cores} cores at once"
    if readers < cores:
        on_cores = f"{readers} of {cores} cores at once and extrapolated"
    name = _DECODING if kind in ("ImageFolder", "ImageFiles") else _DATASET
    reading, copying = ([_total(each[what], cores) for each in alone] for what in ("reading_per_s", "copying_per_s"))
    one = statistics.median(rate for rate in reading if rate is not None) / cores
    return _known(
        (name, reading, f"read by {on_cores}, {one:,.0f} a core, nothing delivered"),
        (_COPYING, copying, f"copied into batches by {on_cores}"),
    )


def _of_delivery(runs: Sequence[dict[str, float | None]], name: str) -> list[Ceiling]:
    return _known(
        (_DELIVERY, [each["delivery_per_s"] for each in runs], f"of one sample again and again; {name}"),
        (_DEVICE, [each["device_per_s"] for each in runs], "from page-locked memory, nothing else"),
    )


def _known(*ceilings: tuple[str, list[float | None], str]) -> list[Ceiling]:
    """The ceilings that were measured in every round."""
    found = []
    for name, rates, how in ceilings:
        known = [rate for rate in rates if rate is not None]
        if known and len(known) == len(rates):
            spread = Spread.of(known)
            found.append(Ceiling(name, spread, f"{spread.median:,.0f} samples/s {how}"))
    return found


def _total(rates: Sequence[float | None], cores: int) -> float | None:
    """The rate of all cores, from the rates of processes that ran at the same time, one per core."""
    known = [rate for rate in rates if rate is not None]
    return sum(known) * cores / len(known) if known else None


def _command(part: str, file: Path, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "loaders.benchmark.run", json.dumps({"part": part, **arguments}), str(file)]


def _run(part: str, **arguments: Any) -> dict[str, Any]:
    """Run one part in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found"
        command = _command(part, file, arguments)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise DatasetError(f"measuring took longer than {_TIMEOUT_S} s and was given up: {arguments}.") from error
        return _found(file, done.returncode, done.stderr)


def _run_together(count: int, part: str, **arguments: Any) -> dict[str, list[Any]]:
    """Run the same part in several fresh processes at the same time; the results of each, by name."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(count)]
        errors = [file.with_suffix(".err").open("w+", encoding="utf-8") for file in files]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running = [
            subprocess.Popen(_command(part, file, arguments), stderr=error, **pipes)
            for file, error in zip(files, errors, strict=True)
        ]
        try:
            for _ in range(2):  # they synchronize before each of the two measurements
                for process in running:
                    while process.stdout and (line := process.stdout.readline()) and line != READY:
                        pass  # output of the target itself
                for process in running:
                    _let_go(process)
            for process in running:
                process.communicate(timeout=_TIMEOUT_S)
            results = []
            for process, file, error in zip(running, files, errors, strict=True):
                error.seek(0)
                results.append(_found(file, process.returncode, error.read()))
        finally:
            for process, error in zip(running, errors, strict=True):
                process.kill()
                process.wait()
                error.close()
        return {name: [each[name] for each in results] for name in results[0]}


def _let_go(process: subprocess.Popen[str]) -> None:
    try:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    except OSError:
        pass  # it has failed; its last output says why


def _found(file: Path, status: int, errors: str) -> dict[str, Any]:
    if status != 0 or not file.exists():
        raise DatasetError(errors.strip() or f"a process that measured ended with status {status} and said nothing.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
