"""`DataLoader.report()`: where the time of an epoch went, and what limits it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from loaders.datasets.wrapped import describe
from loaders.report import rendering
from loaders.report.figures import Figures, SlowSample, TransferReport, WorkerReport
from loaders.report.statistics import EpochStatistics, SkippedSample, Transfer
from loaders.report.verdict import verdict_on
from loaders.system.limits import usable_cores
from loaders.timing.stages import STAGES


class Report(Figures):
    """Where the time of one epoch went. `print` it, show it in a notebook, or read the numbers, which are attributes.

    Attributes:
        verdict: what limits, and what to change, in one sentence.
    """

    @property
    def verdict(self) -> str:
        """What limits, and what to change, in one sentence."""
        return verdict_on(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, fit for JSON."""
        derived = ("verdict", "samples_per_s", "waiting_share")
        plain = {name: getattr(self, name) for name in derived} | dataclasses.asdict(self)
        for sample in (*plain["slowest"], *plain["skipped"]):
            if not isinstance(sample["index"], (int, str, type(None))):
                sample["index"] = str(sample["index"])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def __str__(self) -> str:
        return rendering.plain_text(self, self.verdict)

    def __rich__(self) -> Any:
        return rendering.rich_page(self, self.verdict)

    def _repr_html_(self) -> str:
        return rendering.html_page(self, self.verdict)


@dataclass(frozen=True)
class Snapshot:
    """The state of a loader, from which a report is made.

    Attributes:
        statistics: of the current or latest epoch; None before the first.
        dataset: names the slowest samples.
        depth: batches that should be open at once. `blocks_per_batch`: fields with memory of their own.
        held_blocks, held_nbytes: held by the caller. `ceiling_nbytes`: the most that all batches may take.
    """

    statistics: EpochStatistics | None
    dataset: Any
    num_workers: int
    worker_method: str
    depth: int
    blocks_per_batch: int
    held_blocks: int
    held_nbytes: int
    ceiling_nbytes: int
    skipped: tuple[SkippedSample, ...]


def report_of(snapshot: Snapshot) -> Report:
    """The report of the current or latest epoch; an empty one before the first."""
    statistics = snapshot.statistics
    if statistics is None:
        return Report(num_workers=snapshot.num_workers, worker_method=snapshot.worker_method, cores=usable_cores())
    statistics.settle()
    now_ns = time.perf_counter_ns()
    window_s = statistics.window_ns(now_ns) / 1e9
    sums = [statistics.workers[number] for number in sorted(statistics.workers)]
    busy_s = sum(each.busy_ns for each in sums) / 1e9
    seen_ns = sum(each.seen_ns for each in sums)
    cpu_share = min(1.0, sum(each.cpu_ns for each in sums) / seen_ns) if seen_ns else None
    workers = max(1, snapshot.num_workers)
    stages_ns = sum(statistics.stages_ns)
    service_s = statistics.busy_ns / statistics.samples / 1e9 if statistics.samples else 0.0
    return Report(
        epoch=statistics.epoch,
        finished=statistics.finished,
        batches=statistics.batches,
        samples=statistics.rows,
        window_s=window_s,
        first_batch_s=statistics.first_ns / 1e9,
        wait_s=statistics.wait_ns / 1e9 if statistics.given_ns else 0.0,
        worked_s=statistics.worked_ns / 1e9,
        slot_s=statistics.slot_ns / 1e9,
        deliver_s=statistics.deliver_ns / 1e9,
        compute_s=_compute_s(statistics, now_ns),
        num_workers=snapshot.num_workers,
        worker_method=snapshot.worker_method,
        service_s=service_s,
        stages_s={
            name: service_s * ns / stages_ns for name, ns in zip(STAGES, statistics.stages_ns, strict=True) if ns
        },
        occupancy=min(1.0, busy_s / window_s / workers) if window_s else 0.0,
        cpu_share=cpu_share,
        cores=usable_cores(),
        cores_busy=_cores_busy(snapshot, statistics, window_s, busy_s * (cpu_share or 0.0)),
        depth=snapshot.depth,
        short=statistics.short,
        held_batches=snapshot.held_blocks // max(1, snapshot.blocks_per_batch),
        held_nbytes=snapshot.held_nbytes,
        ceiling_nbytes=snapshot.ceiling_nbytes,
        read_nbytes=statistics.read_nbytes * statistics.samples // statistics.looked_at if statistics.looked_at else 0,
        written_nbytes=statistics.written_nbytes,
        overflow_nbytes=statistics.overflow_nbytes,
        transfer=_transfer_report(statistics.transfer) if statistics.transfer is not None else None,
        workers=tuple(
            WorkerReport(number, each.samples, min(1.0, each.busy_ns / 1e9 / window_s) if window_s else 0.0)
            for number, each in sorted(statistics.workers.items())
        ),
        slowest=tuple(
            SlowSample(key, describe(snapshot.dataset, key), ns / 1e9)
            for ns, _, key in sorted(statistics.slowest, key=lambda entry: -entry[0])
        ),
        skipped=snapshot.skipped,
    )


def _compute_s(statistics: EpochStatistics, now_ns: int) -> float:
    """Time between two calls of `next`, the current interval included, without the prefetcher's part of it."""
    running_ns = 0 if statistics.ended_ns or not statistics.given_ns else now_ns - statistics.given_ns
    transfer = statistics.transfer or Transfer()
    return max(0, statistics.compute_ns + running_ns - transfer.enqueue_ns - transfer.wait_ns) / 1e9


def _cores_busy(snapshot: Snapshot, statistics: EpochStatistics, window_s: float, workers_cpu_s: float) -> float:
    if not window_s:
        return 0.0
    host_s = ((statistics.host_end_ns or time.process_time_ns()) - statistics.host_ns) / 1e9
    apart = snapshot.num_workers > 0 and snapshot.worker_method == "process"
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
