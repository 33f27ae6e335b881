"""What limits an epoch, and what to change: one sentence, from what was measured.

The model: W workers, each of which takes `service` seconds per sample, give W / service samples per second as long as
there are cores for them; the loop takes a batch whenever it is done with the last one. The slower sets the period.
"""

from __future__ import annotations

import math

from loaders.report.figures import Figures
from loaders.report.units import nbytes, percent, seconds

# Fewer batches than this are too few for a verdict.
FEWEST = 3
# Below this share of waiting, no change is worth it.
LITTLE = 0.03
# Workers that are at work for at least this share of the time are the limit.
SATURATED = 0.8
# A loader this many times as fast as the model has workers to spare.
SPARE = 1.5

_DOING = {
    "read": "reading",
    "decode": "decoding",
    "augment": "augmentation",
    "collate": "collate_fn",
    "write": "writing into the batch",
    "sample": "the dataset's own code",
}
_REMEDIES = {
    "read": "DecodedCache keeps samples in memory, or put the files on a faster disk",
    "decode": "crop= decodes only what the model sees, DecodedCache decodes once",
    "augment": "leave normalisation and mixing to the device (Normalize, MixUp), or use cheaper transforms",
    "collate": "without a collate_fn workers write straight into the batch",
    "write": "smaller samples help, such as uint8 in place of float32",
    "sample": 'mark its parts with `with loaders.stage("decode"):` to see which',
}


def model_s(report: Figures) -> float:
    """Seconds that the loop needs for one batch without waiting; from the device's own events where there are any."""
    own = report.compute_s / report.batches
    transfer = report.transfer
    if transfer is None:
        return own
    own += transfer.enqueue_s / report.batches
    if transfer.compute_s is None:
        return own + transfer.wait_s / report.batches
    return max(own, transfer.compute_s)


def waiting_share(report: Figures) -> float:
    """Share of the time in which the model has nothing to do."""
    period = report.window_s / report.batches
    transfer = report.transfer
    if transfer is None or transfer.compute_s is None:
        return report.waiting_share
    # While the host waits, the device may still work on what it was given.
    return max(0.0, 1 - (model_s(report) + report.deliver_s / report.batches) / period)


def needed_workers(report: Figures) -> float:
    """How many workers, at work all the time, would keep up with the loop."""
    consumed_s = model_s(report) + report.deliver_s / report.batches
    return report.service_s * report.samples / report.batches / max(consumed_s, 1e-9)


def predicted_share(report: Figures, workers: int) -> float:
    """Share of the time in which the model would wait with `workers` workers, each as fast as now."""
    return max(0.0, 1 - workers / needed_workers(report)) if report.service_s else 0.0


def room_for_workers(report: Figures) -> int:
    """How many more workers there are cores for."""
    per_worker = max(0.05, 1.0 if report.cpu_share is None else report.cpu_share)
    free = report.cores - report.cores_busy
    if report.num_workers == 0:
        free += per_worker * report.occupancy  # the loop's own thread no longer reads then
    return max(0, int(free / per_worker + 0.25))


def verdict_on(report: Figures) -> str:
    """The verdict: one sentence."""
    if report.batches < FEWEST or report.window_s <= 0:
        return f"too few batches to tell: {report.batches} so far, not counting the first."
    if (found := _slow_transfer(report)) is not None:
        return found
    waits = waiting_share(report)
    if waits < LITTLE:
        return _fast_enough(report, waits)
    head = f"the model waits {percent(waits)} of the time"
    at_work = f"workers are at work {percent(report.occupancy)} of it"
    if report.num_workers > 0 and report.occupancy < SATURATED:
        if report.short >= 0.2 * report.batches:
            return (
                f"{head}: memory for batches limits, {at_work}; {report.held_batches} batches are held "
                f"({nbytes(report.held_nbytes)}), and all may take {nbytes(report.ceiling_nbytes)}: let go of some, or "
                "raise max_buffer_bytes."
            )
        slowest = report.slowest[0] if report.slowest else None
        period_s = report.window_s / report.batches
        if slowest is not None and slowest.seconds > max(10 * report.service_s, 0.5 * period_s):
            name = f' ("{slowest.source}")' if slowest.source else ""
            return (
                f"{head}: single slow samples limit, {at_work}; sample {slowest.index}{name} took "
                f"{seconds(slowest.seconds)}, the average is {seconds(report.service_s)}: more batches ahead "
                f"(prefetch_factor) or in_order=False hide them."
            )
        if waits < 0.1 and report.occupancy < 0.5:
            return f"{head}, though {at_work}: neither limits for long, and nothing stands out."
        if report.worked_s > 0.5 * report.wait_s:
            # Every worker had something to do, and yet they were not at work.
            return (
                f"{head}: other programs take the cores; {at_work}, though there is work for each: try fewer workers, "
                f"or a machine with more than {report.cores:g} cores to itself."
            )
        return (
            f"{head}: too few batches are open, {at_work}; raise prefetch_factor, so that more than {report.depth} are "
            "made at once."
        )
    return _slow_workers(report, head)


def _slow_transfer(report: Figures) -> str | None:
    transfer = report.transfer
    if transfer is None or not transfer.batches:
        return None
    period_s = report.window_s / report.batches
    if transfer.copy_s is None:
        # The device did not time the copies; where they are synchronous, the host did.
        copy_s, limits = transfer.enqueue_s / transfer.batches, transfer.enqueue_s > 0.25 * report.window_s
    else:
        copy_s = transfer.copy_s
        limits = copy_s > 0.8 * period_s and copy_s > model_s(report)
    if not limits or copy_s * report.batches < report.wait_s:
        return None
    size = transfer.nbytes / transfer.batches
    again = ", after a copy on the host, as it is not page-locked" if transfer.again_nbytes else ""
    return (
        f"copying to the device limits: {nbytes(size)} a batch take {seconds(copy_s)} of {seconds(period_s)}, "
        f"{nbytes(size / copy_s)}/s{again}: copy uint8 and finish it on the device (Normalize)."
    )


def _fast_enough(report: Figures, waits: float) -> str:
    head = "the model never waits" if waits < 0.005 else f"the model waits {percent(waits)} of the time"
    deliver = report.deliver_s / report.window_s
    if deliver > 0.1:
        return f"{head}, but making batches of full slots takes {percent(deliver)} of it: larger batches help."
    ratio = 1 / report.occupancy if report.occupancy > 0 else math.inf
    enough = max(1, math.ceil(1.15 * report.occupancy * report.num_workers))
    if report.num_workers > 1 and ratio >= SPARE and enough < report.num_workers:
        times = f"{ratio:.1f}" if ratio < 100 else "over 100"
        return f"{head}: the loader is {times} times as fast as the model; {_workers(enough)} would do."
    return f"{head}: the loader keeps up, and the model limits."


def _slow_workers(report: Figures, head: str) -> str:
    stage = max(report.stages_s, key=lambda name: report.stages_s[name]) if report.stages_s else "sample"
    share = report.stages_s[stage] / sum(report.stages_s.values()) if report.stages_s else 1.0
    limit = f"{head}: {_DOING[stage]} limits ({percent(share)} of the workers' time)"
    threads = report.num_workers if report.worker_method == "thread" else 0
    cpu = report.cpu_share
    if threads > 1 and cpu is not None and cpu < 0.75 and 0.7 < cpu * threads * report.occupancy < 1.3:
        return f'{limit}; together the threads use one core, so they hold the GIL: use worker_method="process".'
    needed = needed_workers(report)
    wanted = math.ceil(needed) - report.num_workers
    more = min(wanted, room_for_workers(report))
    if more <= 0:
        why = f"all {report.cores:g} cores are busy" if wanted > 0 else "more workers would not help"
        return f"{limit}, and {why}: {_REMEDIES[stage]}."
    after = percent(predicted_share(report, report.num_workers + more))
    added = f"{_workers(more)} more" if report.num_workers else f"num_workers={more}"
    bound = "" if more == wanted else f", as many as there are cores for ({report.cores:g}),"
    also = "" if more == wanted else f"; {_REMEDIES[stage]}"
    return f"{limit}; {added}{bound} would bring it to about {after}{also}."


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"
