"""Each example runs as a program, on few photographs, and leaves the picture it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from examples.demo.network import SIZE, SmallNet, load, normalise, save
from examples.demo.photos import read_photo
from loaders import ImageFolder, __version__

EXAMPLES = Path(__file__).parents[1] / "examples"

# Stands for torchvision, with a network small enough to keep in a test and the real names of the real module.
TORCHVISION = """
import torch

class ResNet18_Weights:
    class IMAGENET1K_V1:
        url = "https://nowhere.invalid/models/resnet18-0123abcd.pth"
        meta = {"categories": ["tench", "goldfish", "shark"]}

def resnet18():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
"""


@pytest.fixture
def environment(demo_cache, tmp_path):
    """Variables for an example that runs in an empty folder with a cache that has the photographs, and no network."""
    ours = cache_of(tmp_path)
    ours.mkdir(parents=True)
    (ours / "photos").symlink_to(next((demo_cache / "loaders").iterdir()) / "photos")
    # Threads that wait for one another would take more time than the training.
    return {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "1"}


def cache_of(folder: Path) -> Path:
    return folder / "cache" / "loaders" / f"demo-{__version__}"


def save_network(folder: Path) -> None:
    save(cache_of(folder) / "network.pt", SmallNet(10), [f"class {number}" for number in range(10)])


@pytest.fixture
def run(environment, tmp_path):
    """Runs an example as a program."""

    def run(name: str, *options: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment | more, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def run_here(environment, tmp_path, monkeypatch):
    """Runs an example in this process, which has imported what a program of its own would import for seconds.

    Returns what it gave to `sys.exit`, None if it came to its end: Python prints a text to stderr and exits with 1.
    """

    def run_here(name: str, *options: object) -> object:
        monkeypatch.chdir(tmp_path)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run_here


def assert_is_picture(path: Path, height: int, width: int) -> None:
    image = cv2.imread(str(path))
    assert image.shape == (height, width, 3)
    assert image.std() > 20
    # Something is drawn in each half.
    assert image[:, : width // 2].std() > 10
    assert image[:, width // 2 :].std() > 10


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_train_learns_and_keeps_the_network(run, few_photos, tmp_path):
    done = run("train.py", few_photos, "--epochs", 8, "--workers", 1, "--out", "kept.pt")
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"^epoch \d+: loss \d\.\d+, validation accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert len(accuracies) == 8
    assert float(accuracies[-1]) > 45  # chance is 33
    _, classes = load(tmp_path / "kept.pt")
    assert classes == ["coffee", "galaxies", "pagoda"]


def test_train_device_learns_with_few_readings_of_the_device(run, few_photos):
    done = run("train_device.py", few_photos, "--epochs", 8, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert re.match(r"training on (cpu|cuda)", done.stdout)
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss (\d\.\d+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    accuracy = re.search(r"^validation accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert float(accuracy[1]) > 45  # chance is 33


def test_patches_prepares_photos_and_learns_from_windows_of_them(run, tmp_path):
    for name in ("coffee", "galaxies", "pagoda"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, photo in enumerate((read_photo(name), read_photo(name)[::-1])):
            cv2.imwrite(str(tmp_path / "photos" / name / f"{number}.jpg"), cv2.resize(photo, (600, 400)))
    done = run("patches.py", "photos", "--per-photo", 24, "--epochs", 3, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 JPEGs have restart markers.")
    told = re.findall(r"^epoch \d: 144 patches, ([\d.]+)% classified correctly in training$", done.stdout, re.MULTILINE)
    assert len(told) == 3
    assert float(told[-1]) > 60  # chance is 33
    assert re.search(r"^patches per second: [\d,]+ prepared, [\d,]+ original$", done.stdout, re.MULTILINE)


def test_detect_learns_where_the_discs_are(run_here, capsys):
    assert run_here("detect.py", "--epochs", 6, "--workers", 1) is None
    lines = capsys.readouterr().out
    told = re.findall(r"^epoch \d: loss (\d\.\d+), (\d+)% of cells on discs", lines, re.MULTILINE)
    assert len(told) == 6
    assert float(told[-1][0]) < float(told[0][0]) / 2
    assert float(told[-1][1]) > 65  # chance is 33


def test_evaluate_keeps_what_the_network_finds_in_dataset_order(run, few_photos, tmp_path):
    torch.manual_seed(0)
    net = SmallNet(3).eval()
    save(tmp_path / "network.pt", net, ["coffee", "galaxies", "pagoda"])
    done = run("evaluate.py", few_photos / "val", "--batch-size", 1, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(at|the rest of) (\d+) photographs: loss", done.stdout, re.MULTILINE) == [
        ("at", "10"),
        ("at", "20"),
        ("the rest of", "24"),
    ]
    dataset = ImageFolder(few_photos / "val")
    images = torch.stack([torch.from_numpy(cv2.resize(dataset[n]["image"], (SIZE, SIZE))) for n in range(24)])
    with torch.inference_mode():
        features = net.features(normalise({"image": images})["image"]).mean(dim=(2, 3))
        scores = net.head(features).softmax(dim=1)
    np.testing.assert_allclose(np.load(tmp_path / "found" / "features.npy"), features, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "found" / "scores.npy"), scores, atol=1e-5)


def test_evaluate_names_the_command_that_trains_a_network(run_here, few_photos):
    assert "train.py --out network.pt" in run_here("evaluate.py", few_photos / "val")


def test_classify_image_plots_a_photograph_with_its_most_probable_classes(run, few_photos, tmp_path):
    save_network(tmp_path)
    photo = next((few_photos / "val" / "pagoda").iterdir())
    done = run("classify_image.py", photo, "--out", "out.png")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{photo.name}: class \d, \d+%\. Picture: out\.png$", done.stdout, re.MULTILINE)
    assert_is_picture(tmp_path / "out.png", 400, 900)


def test_classify_image_uses_resnet_18_where_torchvision_and_its_weights_are_at_hand(run, tmp_path):
    (tmp_path / "modules" / "torchvision").mkdir(parents=True)
    (tmp_path / "modules" / "torchvision" / "__init__.py").touch()
    (tmp_path / "modules" / "torchvision" / "models.py").write_text(TORCHVISION)
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    weights = {"2.weight": torch.zeros(3, 3), "2.bias": torch.tensor([0.0, 0.0, 9.0])}
    torch.save(weights, checkpoints / "resnet18-0123abcd.pth")
    done = run("classify_image.py", PYTHONPATH=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    assert ": shark, 100%. Picture: classified.png" in done.stdout


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_classify_image_does_without_a_torchvision_that_cannot_be_imported(run_here, tmp_path, monkeypatch, error):
    save_network(tmp_path)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        f"import os\nos.mkdir('asked')\nraise {error}('for another torch')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert run_here("classify_image.py") is None
    assert (tmp_path / "asked").exists()
    assert_is_picture(tmp_path / "classified.png", 400, 900)


@pytest.mark.parametrize("name", ["classify_image.py", "feature_maps.py"])
def test_without_a_trained_network_the_command_that_makes_one_is_named(run_here, name):
    assert "python -m examples.demo" in run_here(name)


def test_classify_image_names_a_file_that_is_no_photograph(run_here, tmp_path):
    save_network(tmp_path)
    (tmp_path / "notes.txt").write_text("no photograph")
    assert 'cannot read "notes.txt"' in run_here("classify_image.py", "notes.txt")


def test_feature_maps_plots_what_a_layer_puts_out(run, tmp_path):
    save_network(tmp_path)
    done = run("feature_maps.py", "--layer", 0)
    assert done.returncode == 0, done.stderr
    assert "24 maps of 40 by 40" in done.stdout
    assert_is_picture(tmp_path / "feature_maps.png", 400, 1300)


def test_feature_maps_plots_the_last_layer_too(run_here, tmp_path, capsys):
    save_network(tmp_path)
    assert run_here("feature_maps.py", "--layer", 4) is None
    assert "128 maps of 5 by 5" in capsys.readouterr().out
    assert_is_picture(tmp_path / "feature_maps.png", 400, 1300)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_distributed_reads_every_sample_once_over_two_ranks(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, str(EXAMPLES / "distributed.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert told == [f"epoch {epoch}: [160, 160] samples read, each once: True" for epoch in (0, 1)]
