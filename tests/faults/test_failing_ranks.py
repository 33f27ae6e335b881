"""Samples that fail on some ranks and not on others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "failing_ranks.py"
BROKEN = {1, 6, 7, 13, 14, 15}


@pytest.mark.parametrize("policy", ["skip", "substitute"])
def test_two_ranks_have_the_same_number_of_batches_whatever_fails(policy: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", SCRIPT, str(rank), policy, tmp_path], env=env)
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    found: list[Any] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    sizes = [[len(batch) for batch in each["batches"]] for each in found]
    assert len(sizes[0]) == len(sizes[1]) == 6
    indices = [index for each in found for batch in each["batches"] for index in batch]
    assert not BROKEN & set(indices)
    assert {index for each in found for index in each["failed"]} >= BROKEN
    if policy == "skip":
        assert sorted(indices) == sorted(set(range(48)) - BROKEN)  # every good sample once
    else:
        assert sizes[0] == sizes[1] == [4] * 6
