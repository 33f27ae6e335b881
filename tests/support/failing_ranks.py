"""One of two ranks whose loaders skip or substitute failing samples; they meet in an all_reduce after each batch.

python failing_ranks.py RANK POLICY FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from loaders import DataLoader, ShardedSampler

BROKEN = {1, 6, 7, 13, 14, 15}


class Numbers:
    def __len__(self):
        return 48

    def __getitem__(self, index):
        if index in BROKEN:
            raise ValueError(f"sample {index} is broken")
        return {"index": index, "data": np.full((4, 4), index, np.uint8)}


def main(rank, policy, folder):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sampler = ShardedSampler(48, num_replicas=2, rank=rank, seed=3, batch_size=4)
    loader = DataLoader(Numbers(), 4, sampler=sampler, num_workers=1, on_error=policy, max_errors=48)
    batches = []
    for batch in loader:
        batches.append(batch["index"].tolist())
        met = torch.ones(())
        torch.distributed.all_reduce(met)  # a rank with fewer batches would leave the other waiting forever
        assert met == 2
    failed = [entry.index for entry in loader.errors]
    (folder / f"{rank}.json").write_text(json.dumps({"batches": batches, "failed": failed}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
