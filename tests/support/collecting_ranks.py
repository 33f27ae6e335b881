"""Three ranks that collect together; each writes what it got to a file in the given folder."""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from loaders import OutputCollector
from loaders.outputs import gather

RANKS = 3
LENGTH = 50
X = torch.arange(3.0 * LENGTH).reshape(LENGTH, 3)


def collect(collector, rows, name="x"):
    for start in range(0, len(rows), 4):
        index = torch.tensor(rows[start : start + 4])
        outputs = {name: X[index], "wide": X[index].bfloat16()}
        collector.add(outputs, index)
        for tensor in (*outputs.values(), index):
            tensor.fill_(-1)
    return collector


def refusal(fn):
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return "nothing was refused"


def results(rank, folder):
    early = OutputCollector()
    early.add(X[:1], [0])
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=40))
    gather.ROUND_NBYTES = 400  # a few rows a round
    share = [*range(LENGTH)[rank::RANKS], 0, 1]  # the last two are padding, as of a sampler
    for name, path in (("memory", None), ("file", folder / "out")):
        result = collect(OutputCollector(LENGTH, path), share[::-1]).result()
        yield f"{name} {result and all(np.array_equal(array, X) for array in result.values())}"
    dist.barrier()
    yield f"scratch files {[file.name for file in (folder / 'out').iterdir() if file.suffix != '.npy']}"
    # Rank 1 adds nothing here.
    yield refusal(collect(OutputCollector(7), [[0, 1, 2], [], [3, 4, 5]][rank]).result)
    yield refusal(collect(OutputCollector(), [rank], "other" if rank == 1 else "x").result)
    late = collect(OutputCollector(5), [rank])
    if rank == 2:
        late._under_way.append(late_batch())
    yield refusal(late.result)
    yield refusal(lambda: OutputCollector().add(X))
    yield refusal(early.result)
    dist.destroy_process_group()


def late_batch():
    """A batch as of a device: its index is known only once it has arrived."""
    from loaders.outputs.collector import _Batch

    hosts = [X[:1], X[:1].bfloat16(), torch.tensor([99])]
    return _Batch(hosts, hosts, [], {})


def run(rank, folder):
    (folder / f"rank{rank}.txt").write_text("\n".join(results(rank, folder)))


if __name__ == "__main__":
    # Forked, so that torch is imported only once.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, Path(sys.argv[1]))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
