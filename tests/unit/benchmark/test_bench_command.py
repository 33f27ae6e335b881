"""`loaders bench` as a person starts it, on a few of the demo's photographs."""

import json
import os
import re
import subprocess
import sys

import cv2
import pytest
from typer.testing import CliRunner

from loaders.cli import app

QUICK = ["--crop", "64", "--batch-size", "8", "--rounds", "1", "--seconds", "0.05", "--samples", "96"]


def run(*arguments, cwd):
    command = [sys.executable, "-m", "loaders", "bench", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(few_photos, tmp_path_factory):
    """A run with everything: what was printed, and the folder with its files."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", folder / "bench.json", "--plot", folder / "bench.png"]
    found = run(few_photos / "train", *QUICK, "--workers", "1", "--vs", "torch", *files, cwd=folder)
    assert found.returncode == 0, found.stderr
    return found, folder


def test_it_prints_a_table_the_ceilings_and_one_sentence_plainly_when_piped(done):
    found, _ = done
    lines = found.stdout.splitlines()
    assert lines[1].split()[:2] == ["samples/s", "GB/s"]
    assert lines[1].endswith("torch's times")
    assert lines[2].startswith("loaders, 1 process ")
    assert re.search(r" MB +\d+\.\d\d$", lines[2])
    assert lines[3].startswith("torch, 1 process ")
    assert any(line.startswith("decoding allows ") for line in lines)
    assert any(line.startswith("copying allows ") for line in lines)
    assert lines[-1].startswith("loaders, 1 process: ")
    assert re.search(r": you are at (\d+% of )?what .+ allows here \(", lines[-1])
    assert "\x1b" not in found.stdout
    assert found.stderr == ""


def test_the_json_has_every_figure(done):
    _, folder = done
    kept = json.loads((folder / "bench.json").read_text())
    ours, torchs = kept["loaders"]
    assert (ours["whose"], torchs["whose"]) == ("ours", "torch")
    assert ours["passes"][0]["samples_per_s"] == ours["samples_per_s"]["median"] > 0
    assert ours["turn_s"]["median"] > 0
    assert ours["memory_nbytes"] > 0
    assert {each["name"] for each in kept["ceilings"]} == {"decoding", "copying", "the delivery of ready samples"}
    assert kept["sentence"] in done[0].stdout


def test_the_plot_is_a_picture(done):
    assert cv2.imread(str(done[1] / "bench.png")).shape[1] == 900


def test_a_loader_of_ones_own_is_measured_as_it_is(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom loaders import ArrayDataset, DataLoader\n"
        "def loader():\n    print('hello')\n"
        "    return DataLoader(ArrayDataset({'x': np.zeros((64, 9), np.float32)}), batch_size=4)\n"
    )
    found = run("mine:loader", "--rounds", "1", "--seconds", "0.05", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "\nthe loader, as it is " in found.stdout
    assert ": you are at " in found.stdout
    assert "hello" not in found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], '"nowhere" is no folder'),
        (["nowhere", "--workers", "many"], "--workers many: expected numbers"),
        (["nowhere", "--workers", "-1"], "--workers -1: expected numbers"),
        (["nowhere", "--methods", "fork"], "--methods fork: expected process, thread"),
        (["nowhere", "--vs", "grain"], "--vs grain"),
    ],
)
def test_what_cannot_be_measured_is_one_message(options, message):
    found = CliRunner().invoke(app, ["bench", *options])
    assert found.exit_code == 1
    assert message in found.output
    assert "Traceback" not in found.output


def test_an_error_of_the_targets_own_is_shown(tmp_path):
    (tmp_path / "mine.py").write_text("def loader():\n    raise RuntimeError('the disk is gone')\n")
    found = run("mine:loader", cwd=tmp_path)
    assert found.returncode == 1
    assert "RuntimeError: the disk is gone" in found.stderr
