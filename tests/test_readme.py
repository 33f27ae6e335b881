"""What the README says is true: its code runs, its commands exist, its figures are those that are kept."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from support.pages import PAGES, ROOT, blocks_of

from loaders import DataLoader

README = PAGES["README.md"].read_text(encoding="utf-8")
LOOP, CROPS = (block.code for block in blocks_of("README.md") if block.language == "python")


def test_the_training_loop_runs_as_it_stands(few_photos, tmp_path):
    (tmp_path / "train.py").write_text(LOOP, encoding="utf-8")
    (tmp_path / "photos").symlink_to(few_photos)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d{3}\n", done.stdout)


def test_the_crop_and_the_cache_give_the_same_pixels(few_photos, tmp_path, monkeypatch):
    (tmp_path / "photos").symlink_to(few_photos)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(CROPS, names)
    exact = dataclasses.replace(names["crop"], exact=True)  # at the same scale, that is
    names["photos"].crop = names["kept"].crop = exact
    for dataset in (names["photos"], names["kept"]):
        batches = [batch["image"] for batch in DataLoader(dataset, batch_size=8, seed=0)]
        names.setdefault("seen", []).append(torch.cat(batches))
    assert names["seen"][0].shape[1:] == (96, 96, 3)
    assert torch.equal(*names["seen"])


def test_it_is_short():
    assert len(README.splitlines()) < 120


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_are_targets_of_the_makefile(page):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"\bmake ([\w-]+)\b(?= +#|`)", PAGES[page].read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named <= set(targets)


def test_the_figures_are_those_of_the_benchmarks():
    kept = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").replace(",", "")
    rows = re.findall(
        r"^\|(?! work| ---)[^|]+\|(.+)\|$", README[README.index("## Results") : README.index("## Doc")], re.M
    )
    assert len(rows) >= 5
    for row in rows:
        for figure in re.findall(r"\d[\d,.]*\d|\d", row):
            assert re.search(rf"(?<![\d.]){re.escape(figure.replace(',', ''))}(?![\d.])", kept), row
