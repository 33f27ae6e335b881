"""The numbers of a report: where the time of one epoch went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.report.statistics import SkippedSample


@dataclass(frozen=True)
class SlowSample:
    """One of the slowest samples that were timed, with all that its worker did for it."""

    index: Any
    source: str | None
    seconds: float


@dataclass(frozen=True)
class WorkerReport:
    """One worker: the samples it has read in this epoch, and the share of the time in which it was at work."""

    number: int
    samples: int
    busy_share: float


@dataclass(frozen=True)
class TransferReport:
    """The copies of a `DevicePrefetcher`.

    Attributes:
        batches, nbytes: copied to the device.
        again_nbytes: the part that was copied on the host first, since it was not page-locked or had gaps.
        enqueue_s: host time to start the copies. `wait_s`: host time until the device had read earlier batches.
        copy_s, compute_s: device time for one batch: for its copy, and for the work that the loop enqueued on it; from
            the device's own events, None without.
    """

    batches: int
    nbytes: int
    again_nbytes: int = 0
    enqueue_s: float = 0.0
    wait_s: float = 0.0
    copy_s: float | None = None
    compute_s: float | None = None


@dataclass(frozen=True)
class Figures:
    """Where the time of one epoch went, in plain numbers.

    The time until the first batch, such as the start of workers, is `first_batch_s`; everything else is counted from
    then on, until the end of the epoch or until now.

    Attributes:
        epoch: its number. `finished`: whether it has ended.
        batches, samples: handed out after the first batch, in `window_s` seconds.
        first_batch_s: from asking for the first batch to getting it.
        wait_s: the loop waited for data; `worked_s`: the part of it in which every worker had work.
        slot_s: the loop waited for memory that the device was still reading. `deliver_s`: it assembled batches from
            what workers had written. `compute_s`: the rest, between two calls of `next`.
        num_workers, worker_method: as they are now; with 0 workers the loop's own thread reads.
        service_s: time of one worker for one sample.
        stages_s: stage → its part of `service_s`, from the samples that were timed; see `loaders.stage`.
        occupancy: share of the time in which workers were at work, averaged over all of them.
        cpu_share: share of a worker's time at work in which it computed and did not wait; None where unknown.
        cores: usable by this process. `cores_busy`: used by the consumer and its workers, on average.
        depth: batches that should be open at once. `short`: batches opened late, since there was no memory for them.
        held_batches, held_nbytes: held by the caller now. `ceiling_nbytes`: the most that all batches may take.
        read_nbytes: read from files, estimated from the samples that were timed.
        written_nbytes: written by workers into the batch itself: the one host write.
        overflow_nbytes: of values that no slot could hold, copied again when the batch was made.
        transfer: the copies to the device, where a `DevicePrefetcher` iterates the loader.
        workers: each of them. `slowest`: slowest first. `skipped`: samples that `on_error` left out.
    """

    epoch: int = 0
    finished: bool = False
    batches: int = 0
    samples: int = 0
    window_s: float = 0.0
    first_batch_s: float = 0.0
    wait_s: float = 0.0
    worked_s: float = 0.0
    slot_s: float = 0.0
    deliver_s: float = 0.0
    compute_s: float = 0.0
    num_workers: int = 0
    worker_method: str = "process"
    service_s: float = 0.0
    stages_s: Mapping[str, float] = field(default_factory=dict)
    occupancy: float = 0.0
    cpu_share: float | None = None
    cores: float = 1.0
    cores_busy: float = 0.0
    depth: int = 1
    short: int = 0
    held_batches: int = 0
    held_nbytes: int = 0
    ceiling_nbytes: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    overflow_nbytes: int = 0
    transfer: TransferReport | None = None
    workers: tuple[WorkerReport, ...] = ()
    slowest: tuple[SlowSample, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()

    @property
    def samples_per_s(self) -> float:
        """Throughput of the whole loop."""
        return self.samples / self.window_s if self.window_s else 0.0

    @property
    def waiting_share(self) -> float:
        """Share of the time in which the loop waited for data, or for memory to put it in."""
        return (self.wait_s + self.slot_s) / self.window_s if self.window_s else 0.0
