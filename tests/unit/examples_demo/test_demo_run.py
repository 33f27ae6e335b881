"""The demo as `make demo` runs it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from examples.demo.__main__ import main

ROOT = Path(__file__).parents[3]
EPOCHS = 10


def demo_command(*options: object) -> list[str]:
    return [sys.executable, "-m", "examples.demo", *map(str, options)]


@pytest.fixture(scope="module")
def runs(few_photos, tmp_path_factory):
    """Two small runs of the demo with the same settings: what each printed, and the folder with its results."""
    done = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        command = demo_command("--data", few_photos, "--out", folder / "demo.png", "--epochs", EPOCHS, "--workers", 2)
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        done.append((run, folder))
    return done


def test_the_demo_reports_every_epoch_in_plain_lines_when_piped(runs):
    run, _ = runs[0]
    lines = re.findall(
        rf"^epoch +(\d+)/{EPOCHS} +[\d,]+ samples/s  waiting +\d+%  loss \d\.\d+  accuracy +[\d.]+%$",
        run.stdout,
        re.MULTILINE,
    )
    assert lines == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    assert "\x1b" not in run.stdout
    assert run.stderr == ""


def test_the_demo_leaves_a_picture_and_a_network_and_says_where(runs):
    run, folder = runs[0]
    network = next(folder.glob("cache/loaders/*/network.pt"))
    assert f"Picture: {folder / 'demo.png'}\nNetwork: {network}\n" in run.stdout
    assert cv2.imread(str(folder / "demo.png")).shape == (800, 1400, 3)


def test_the_demo_learns(runs):
    run, _ = runs[0]
    accuracy = re.findall(r"^([\d.]+)% of the validation photographs", run.stdout, re.MULTILINE)
    assert float(accuracy[0]) > 60  # chance is 33


def test_equal_settings_give_equal_losses_and_accuracies(runs):
    losses = [re.findall(r"loss (\S+)  accuracy +(\S+)", run.stdout) for run, _ in runs]
    assert len(losses[0]) == EPOCHS
    assert losses[0] == losses[1]


def test_a_folder_without_photographs_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "nowhere")]) == 1
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert told.count("\n") == 1


def test_classes_that_differ_between_train_and_val_are_refused(few_photos, tmp_path, capsys):
    (tmp_path / "train").symlink_to(few_photos / "train")
    (tmp_path / "val" / "coffee").mkdir(parents=True)
    file = next((few_photos / "val" / "coffee").iterdir())
    (tmp_path / "val" / "coffee" / file.name).symlink_to(file)
    assert main(["--data", str(tmp_path)]) == 1
    assert "folders of the same names" in capsys.readouterr().err


def test_a_missing_extra_is_named_before_anything_is_trained(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert main([]) == 1
    told = capsys.readouterr()
    assert "pip install 'loaders[demo]'" in told.err
    assert "Training" not in told.out
