"""What the README and the documents say is true: their code runs, their claims hold, their links lead somewhere."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from examples.demo.photos import read_photo
from loaders import DataLoader, DevicePrefetcher, as_array, as_tensor, numpy_collate, shares_memory, to_image, to_numpy
from loaders.cli import app
from loaders.errors import ShareError

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_training_loop_runs_as_it_stands(few_photos, tmp_path):
    loop = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    (tmp_path / "train.py").write_text(loop, encoding="utf-8")
    (tmp_path / "photos").symlink_to(few_photos)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d{3}\n", done.stdout)


def test_the_crop_and_the_cache_give_the_same_pixels(few_photos, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "photos").symlink_to(few_photos)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    exact = dataclasses.replace(names["crop"], exact=True)  # at the same scale, that is
    names["photos"].crop = names["kept"].crop = exact
    for dataset in (names["photos"], names["kept"]):
        batches = [batch["image"] for batch in DataLoader(dataset, batch_size=8, seed=0)]
        names.setdefault("seen", []).append(torch.cat(batches))
    assert names["seen"][0].shape[1:] == (96, 96, 3)
    assert torch.equal(*names["seen"])


def test_the_observed_loop_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/observe.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert names["report"].verdict in capsys.readouterr().out
    assert (tmp_path / "run.json").stat().st_size > 1000


def test_the_way_to_the_device_and_back_runs_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/device.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    features, photos, normalize = names["features"], names["photos"], names["normalize"]
    assert features.shape == (256, 8)
    for number in range(0, 256, 64):  # mixed with the one before it
        pair = [normalize(photos[number - step][0]).float().flatten()[:8].numpy() for step in (0, -63)]
        low, high = np.minimum(*pair), np.maximum(*pair)
        assert ((features[number] >= low - 0.02) & (features[number] <= high + 0.02)).all()


def test_the_datasets_of_prepared_photos_are_as_they_stand(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/decoding.md").read_text(encoding="utf-8"), re.DOTALL)
    for name in ("coffee", "retina"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "photos" / name / "1.jpg"), cv2.resize(read_photo(name), (400, 300)))
    monkeypatch.chdir(tmp_path)
    assert (
        CliRunner().invoke(app, ["prepare", "photos", "prepared", "--quality", "90", "--workers", "1"]).exit_code == 0
    )
    names = {}
    exec(code, names)
    assert [len(names[name]) for name in ("patches", "stacks", "imagenet")] == [16, 2, 2]
    shapes = [names[name][1]["image"].shape for name in ("patches", "stacks", "imagenet")]
    assert shapes == [(224, 224, 3), (8, 224, 224, 3), (224, 224, 3)]


def test_the_way_to_measure_runs_as_it_stands(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/benchmarking.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.splitlines()[1].startswith("DataLoader ")
    assert names["rate"] > 0
    assert names["alone"].passes[0].samples > 0


def test_the_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"\bmake (\w+)", README))
    assert named == {"demo", "test"}
    assert named <= set(targets)


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_link_leads_to_a_file(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    explained = re.findall(r"^\| (\S+) ≥ (\S+) \|", (ROOT / "docs/dependencies.md").read_text("utf-8"), re.MULTILINE)
    assert {f"{name}>={version}" for name, version in explained} == {
        line.partition(";")[0] for group in groups for line in group if not line.startswith("loaders[")
    }


def test_the_table_is_right_about_conversions():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = torch.arange(6.0)
    assert shares_memory(array, as_tensor(array))
    assert shares_memory(tensor, as_array(tensor))
    assert not shares_memory(array[::-1], as_tensor(array[::-1]))
    with pytest.raises(ShareError, match="negative strides"):
        as_tensor(array[::-1], copy=False)
    assert not shares_memory(array, as_tensor(array, copy=True))
    assert not shares_memory(tensor, as_array(tensor, copy=True))
    weights = torch.zeros(3, requires_grad=True)
    assert shares_memory(weights, as_array(weights))
    assert not as_array(weights).flags.writeable


def test_the_table_is_right_about_copies_you_own():
    tensor = torch.zeros(3)
    assert not shares_memory(tensor, to_numpy({"boxes": [tensor]})["boxes"][0])
    pixels = torch.zeros((3, 4, 4), dtype=torch.uint8)
    assert not shares_memory(pixels, to_image(pixels))
    assert to_image(torch.zeros(3, 4, 5)).shape == (4, 5, 3)


def test_the_table_is_right_about_batches():
    rows = [np.full(3, row, np.float32) for row in range(2)]
    batch = numpy_collate([{"row": row} for row in rows])
    assert not any(shares_memory(row, batch["row"]) for row in rows)
    (same,) = DevicePrefetcher([batch], "cpu")
    assert same is batch
