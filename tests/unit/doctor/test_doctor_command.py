"""`loaders doctor` as a person starts it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loaders.cli import app

FAULTY = """
import numpy as np
class Faulty:
    generator = None
    def __init__(self):
        self.generator = np.random.default_rng(0)
    def __len__(self):
        return 9
    def __getitem__(self, index):
        return {"image": self.generator.random((index + 1, 3))}
"""


def doctor(*arguments, cwd):
    command = [sys.executable, "-m", "loaders", "doctor", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_demos_folder_is_sound_and_the_status_says_so(few_photos, tmp_path):
    found = doctor(few_photos / "train", "--samples", 8, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "This machine"
    assert any(line.startswith("  ✓ reading") and "8 samples read" in line for line in lines)
    assert any(line.startswith("  ✓ a spawned worker") for line in lines)
    assert lines[-1].startswith("no problems, ")
    assert "\x1b" not in found.stdout


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_of_this_test.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "faulty_of_this_test:Faulty"
    sys.modules.pop("faulty_of_this_test", None)


def test_problems_come_with_remedies_and_a_status_for_scripts(faulty):
    found = CliRunner().invoke(app, ["doctor", faulty, "--no-spawn"])
    assert found.exit_code == 1
    assert "✗ shapes" in found.output
    assert "✗ determinism" in found.output
    assert "✗ augmentation in workers" in found.output
    assert "→ Draw from loaders.sample_rng()" in found.output


def test_findings_as_json_are_for_programs(faulty):
    found = CliRunner().invoke(app, ["doctor", faulty, "--no-spawn", "--json"])
    kept = json.loads(found.stdout)
    assert kept["exit_status"] == found.exit_code == 1
    shapes = next(finding for finding in kept["dataset"] if finding["check"] == "shapes")
    assert set(shapes) == {"check", "severity", "what", "remedy"}
    assert shapes["severity"] == "problem"
    assert {finding["check"] for finding in kept["machine"]} >= {"cores", "/dev/shm", "open files"}


def test_without_a_target_the_machine_alone_is_looked_at():
    found = CliRunner().invoke(app, ["doctor", "--json"])
    assert set(json.loads(found.stdout)) == {"machine", "exit_status"}


def test_a_target_that_is_none_is_one_message():
    found = CliRunner().invoke(app, ["doctor", "nowhere"])
    assert found.exit_code == 1
    assert found.output.startswith('"nowhere" is no folder')
