"""The numbers of a report: where the time of one epoch went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.report.statistics import SkippedSample


@dataclass(frozen=True)
class SlowSample:
    """One of the slowest samples that the clock looked at, with all that was done to it in its worker."""

    index: Any
    source: str | None
    seconds: float


@dataclass(frozen=True)
class WorkerReport:
    """One worker: the samples it has made in this epoch, and the share of the time in which it was at work."""

    number: int
    samples: int
    busy_share: float


@dataclass(frozen=True)
class TransferReport:
    """The copies of a `DevicePrefetcher`.

    Attributes:
        batches, nbytes: that were copied to the device.
        again_nbytes: of these, copied once more on the host first: they lay in no page-locked memory, or had gaps.
        enqueue_s: of the host, to start the copies. wait_s: of the host, until the device had read old batches.
        copy_s, compute_s: of the device, for one batch: its copy, and what the loop gave the device to do with it; by
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

    What happens before the first batch is there, such as the start of workers, is `first_batch_s`; everything else is
    counted from then on, until the end of the epoch or until now.

    Attributes:
        epoch: its number. `finished`: whether it has ended.
        batches, samples: handed out after the first batch, in `window_s` seconds.
        first_batch_s: from asking for the first batch to getting it.
        wait_s: the loop waited for data; `worked_s` of it while there was work for every worker.
        slot_s: the loop waited for memory that the device still read. `deliver_s`: … for batches to be made of what
            workers had written. `compute_s`: what is left, between two calls of `next`.
        num_workers, worker_method: as they are now; 0 workers read in the loop's own thread.
        service_s: time of one worker for one sample.
        stages_s: stage → what that time went into, by the samples that were looked at; see `loaders.stage`.
        occupancy: share of the time in which workers were at work, all of them together.
        cpu_share: of a worker's time at work, in which its core computed and did not wait; None where unknown.
        cores: usable by this process. `cores_busy`: by its consumer and its workers, on average.
        depth: batches that are to be open at once. `short`: batches opened late, since there was no memory for them.
        held_batches, held_nbytes: in the caller's hands now. `ceiling_nbytes`: what all batches together may take.
        read_nbytes: from files, estimated from the samples that were looked at.
        written_nbytes: by workers, into the batch itself: the one host write.
        overflow_nbytes: of values that no slot could hold, copied again when the batch was made.
        transfer: to the device, where a `DevicePrefetcher` iterates the loader.
        workers: each of them. `slowest`: slowest first. `skipped`: what a policy left out.
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
