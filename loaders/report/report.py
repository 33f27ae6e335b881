"""`DataLoader.report()`: where the time of an epoch went, in plain numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loaders.dataloader.failures import SkippedSample
from loaders.datasets.wrapped import describe
from loaders.report.statistics import Measures, Transfer
from loaders.report.verdict import verdict_on
from loaders.system.limits import usable_cores
from loaders.timing.stages import STAGES

if TYPE_CHECKING:
    from loaders.dataloader.loader import DataLoader


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
class Report:
    """Where the time of one epoch went. `print` it, show it in a notebook, or read the numbers.

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
        verdict: what limits, and what to change, in one sentence.
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

    @property
    def verdict(self) -> str:
        """What limits, and what to change, in one sentence."""
        return verdict_on(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, texts, lists and dicts, fit for JSON."""
        derived = ("verdict", "samples_per_s", "waiting_share")
        plain = {name: getattr(self, name) for name in derived} | dataclasses.asdict(self)
        for sample in (*plain["slowest"], *plain["skipped"]):
            if not isinstance(sample["index"], (int, str, type(None))):
                sample["index"] = str(sample["index"])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def __str__(self) -> str:
        from loaders.report.rendering import plain_text

        return plain_text(self)

    def __rich__(self) -> Any:
        from loaders.report.rendering import rich_page

        return rich_page(self)

    def _repr_html_(self) -> str:
        from loaders.report.rendering import html_page

        return html_page(self)


def report_of(loader: DataLoader[Any]) -> Report:
    """The report of the epoch that runs, or ran last; an empty one before the first."""
    measures = loader._measures
    if measures is None:
        return Report(num_workers=loader.num_workers, worker_method=loader.worker_method, cores=usable_cores())
    measures.settle()
    now_ns = time.perf_counter_ns()
    window_s = measures.window_ns(now_ns) / 1e9
    sums = [measures.workers[number] for number in sorted(measures.workers)]
    busy_s = sum(each.busy_ns for each in sums) / 1e9
    seen_ns = sum(each.seen_ns for each in sums)
    cpu_share = min(1.0, sum(each.cpu_ns for each in sums) / seen_ns) if seen_ns else None
    workers = max(1, loader.num_workers)
    in_slots = loader._pool.leased_count if loader._pool is not None else 0
    stages_ns = sum(measures.stages_ns)
    service_s = measures.busy_ns / measures.samples / 1e9 if measures.samples else 0.0
    return Report(
        epoch=measures.epoch,
        finished=measures.finished,
        batches=measures.batches,
        samples=measures.rows,
        window_s=window_s,
        first_batch_s=measures.first_ns / 1e9,
        wait_s=measures.wait_ns / 1e9 if measures.given_ns else 0.0,
        worked_s=measures.worked_ns / 1e9,
        slot_s=measures.slot_ns / 1e9,
        deliver_s=measures.deliver_ns / 1e9,
        compute_s=_compute_s(measures, now_ns),
        num_workers=loader.num_workers,
        worker_method=loader.worker_method,
        service_s=service_s,
        stages_s={name: service_s * ns / stages_ns for name, ns in zip(STAGES, measures.stages_ns, strict=True) if ns},
        occupancy=min(1.0, busy_s / window_s / workers) if window_s else 0.0,
        cpu_share=cpu_share,
        cores=usable_cores(),
        cores_busy=_cores_busy(loader, measures, window_s, busy_s * (cpu_share or 0.0)),
        depth=loader._plan.depth(workers),
        short=measures.short,
        held_batches=in_slots // max(1, sum(size > 0 for size in loader._plan.sizes())),
        held_nbytes=loader._pool.leased_nbytes if loader._pool is not None else 0,
        ceiling_nbytes=loader._pool.ceiling_nbytes if loader._pool is not None else 0,
        read_nbytes=measures.read_nbytes * measures.samples // measures.looked_at if measures.looked_at else 0,
        written_nbytes=measures.written_nbytes,
        overflow_nbytes=measures.overflow_nbytes,
        transfer=_transfer_report(measures.transfer) if measures.transfer is not None else None,
        workers=tuple(
            WorkerReport(number, each.samples, min(1.0, each.busy_ns / 1e9 / window_s) if window_s else 0.0)
            for number, each in sorted(measures.workers.items())
        ),
        slowest=tuple(
            SlowSample(key, describe(loader.dataset, key), ns / 1e9)
            for ns, _, key in sorted(measures.slowest, key=lambda entry: -entry[0])
        ),
        skipped=tuple(loader.errors),
    )


def _compute_s(measures: Measures, now_ns: int) -> float:
    """Between two calls of `next`, the one that goes on counted as well; without what the prefetcher does there."""
    running_ns = 0 if measures.ended_ns or not measures.given_ns else now_ns - measures.given_ns
    transfer = measures.transfer or Transfer()
    return max(0, measures.compute_ns + running_ns - transfer.enqueue_ns - transfer.wait_ns) / 1e9


def _cores_busy(loader: DataLoader[Any], measures: Measures, window_s: float, workers_cpu_s: float) -> float:
    if not window_s:
        return 0.0
    host_s = ((measures.host_end_ns or time.process_time_ns()) - measures.host_ns) / 1e9
    apart = loader.num_workers > 0 and loader.worker_method == "process"
    return (host_s + (workers_cpu_s if apart else 0.0)) / window_s


def _transfer_report(transfer: Transfer) -> TransferReport:
    timed = transfer.timed
    return TransferReport(
        transfer.batches,
        transfer.nbytes,
        transfer.again_nbytes,
        transfer.enqueue_ns / 1e9,
        transfer.wait_ns / 1e9,
        transfer.copy_ns / timed / 1e9 if timed else None,
        transfer.compute_ns / timed / 1e9 if timed else None,
    )
