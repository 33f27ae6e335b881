"""A training run, killed at random and restarted until it finishes, has the losses of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume.py"
STEPS = 63  # 650 samples in batches of 32, three times
_LINE = re.compile(r"step (\d+): loss (\S+)")


def losses_of(lines: list[str]) -> dict[int, str]:
    """The loss of each step, with every digit that was printed."""
    found = [_LINE.fullmatch(line.strip()) for line in lines]
    return {int(match[1]): match[2] for match in found if match is not None}


def start(checkpoint: Path, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), "--checkpoint", str(checkpoint), "--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run_until(process: subprocess.Popen[str], lines_wanted: int, delay_s: float) -> tuple[list[str], bool]:
    """What the run printed until it ended, or was killed `delay_s` after line `lines_wanted`; and whether it ended."""
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []
    with process:
        while len(lines) < lines_wanted and (line := process.stdout.readline()):
            lines.append(line)
        is_to_die = 0 < lines_wanted <= len(lines)
        if is_to_die:
            select.select([], [], [], delay_s)  # at any instruction: also in the middle of writing a checkpoint
            os.kill(process.pid, signal.SIGKILL)
        # Not communicate(): it would miss what readline() has already buffered.
        lines += process.stdout.readlines()
        status = process.wait(timeout=60)
        assert is_to_die or status == 0, process.stderr.read()
    # The last line may be incomplete.
    return [line for line in lines if line.endswith("\n")], status == 0


@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_at_random_times_has_the_losses_of_an_undisturbed_one(seed: int, tmp_path: Path) -> None:
    undisturbed, ended = run_until(start(tmp_path / "alone.pt", workers=2), 0, 0)
    assert ended
    reference = losses_of(undisturbed)
    assert sorted(reference) == list(range(1, STEPS + 1))

    rng, seen, deaths, ended = random.Random(seed), dict[int, str](), 0, False
    while not ended:
        # Each time with another number of workers.
        process = start(tmp_path / "killed.pt", workers=rng.choice([0, 1, 2]))
        lines, ended = run_until(process, rng.randint(8, 20) if deaths < 4 else STEPS + 1, rng.uniform(0, 0.02))
        deaths += not ended
        for step, loss in losses_of(lines).items():
            assert loss == reference[step], f"step {step} after death {deaths}"
            assert seen.setdefault(step, loss) == loss
    assert seen == reference
    assert deaths >= 3
    last = torch.load(tmp_path / "killed.pt")
    alone = torch.load(tmp_path / "alone.pt")
    assert last["loader"] == alone["loader"]
    assert all(torch.equal(last["net"][name], alone["net"][name]) for name in alone["net"])
