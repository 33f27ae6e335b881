"""Two ranks share an epoch: together they read every sample once, and each global batch is that of a single rank.

python -m torch.distributed.run --nproc-per-node 2 examples/distributed.py
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from loaders import DataLoader, ShardedSampler, sample_rng

GLOBAL_BATCH = 32


class Line:
    """Points of a noisy line."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = np.float32([index / self.count])
        return {"index": index, "x": x, "y": 3 * x + sample_rng().normal(0, 0.1, 1).astype(np.float32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size = GLOBAL_BATCH // world_size
    dataset = Line(options.samples)
    # It finds the rank and the number of ranks itself. With batch_size, the epoch is the same on any number of ranks.
    sampler = ShardedSampler(len(dataset), seed=0, batch_size=batch_size)
    loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=1, seed=0)
    net = DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

    for epoch in range(options.epochs):
        loader.set_epoch(epoch)
        read: list[int] = []
        for batch in loader:
            loss = F.mse_loss(net(batch["x"]), batch["y"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            read += batch["index"].tolist()
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, read)
        if rank == 0:
            whole = sorted(index for share in shares for index in share) == list(range(len(dataset)))
            print(f"epoch {epoch}: {[len(share) for share in shares]} samples read, each once: {whole}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":  # workers may be started by importing this file
    main()
