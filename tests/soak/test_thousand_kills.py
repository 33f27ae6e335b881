"""A thousand workers are killed at random moments, and not one byte differs."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saboteurs import Drawn
from support.waiting import Killer, assert_no_workers, assert_nothing_is_held

from loaders.batch.spec import Field
from loaders.dataloader.loader import DataLoader

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
KILLS = 1000
EPOCH = 3000


def loader_of(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(
        # Short samples: one that is long is likely to be met three times by accident, and is then at fault by rule.
        Drawn(EPOCH, work_s=0.0002),
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
        fields={"boxes": Field(pad=-1.0)},
        **arguments,
    )


def digest(batch: dict[str, Any]) -> str:
    """Every byte of a batch."""
    found = hashlib.sha256(repr(batch["name"]).encode())
    for tensor in (batch["noise"], batch["index"], *batch["boxes"]):
        found.update(repr((tensor.dtype, tensor.shape)).encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("method", "mean_s"), [("fork", 0.02), ("forkserver", 0.15)])
def test_a_thousand_random_kills_change_no_byte(method: str, mean_s: float) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed of the kills: {seed}")
    rng, killed, epochs = random.Random(seed), 0, 0
    reference, loader = loader_of(), loader_of(num_workers=2, multiprocessing_context=method)
    descriptors = None
    while killed < KILLS:
        want = [digest(batch) for batch in reference]
        iterator = iter(loader)
        with Killer(iterator, rng, mean_s, at_most=KILLS - killed) as killer:
            found = [digest(batch) for batch in iterator]
        killed += killer.killed
        epochs += 1
        assert found == want, f"epoch {epochs}, after {killed} kills"
        del iterator, killer
        assert_nothing_is_held(loader)
        assert_no_workers()
        descriptors = descriptors or count_descriptors()
        assert count_descriptors() <= descriptors
    print(f"{killed} kills in {epochs} epochs of {EPOCH} samples")


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
