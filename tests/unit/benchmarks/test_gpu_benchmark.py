"""What the GPU benchmark does apart from the GPU: arguments, what is kept and shown, models and feeds on the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_scenarios, harness
from benchmarks.feeds import FEEDS, MEAN, STD
from benchmarks.gpu import PARTS, Ratio, file_name, main, markdown, ratios, sections
from benchmarks.photos import JpegCrops, ReadyImages, _smooth_noise, write_jpegs
from benchmarks.resnet import resnet50

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0", "nbytes": 1, "multiprocessors": 132}
MACHINE = {"cores": 16, "processor": "a processor", "torch": "2.11.0", "python": "3.12.3"}
GB_PER_S = [{"slot": 54.0, "pinned": 55.0, "pageable": 9.0}, {"slot": 55.0, "pinned": 55.0, "pageable": 11.0}]
RATE = {"resident, ready": 10.0, "ours, ready": 9.95, "torch, ready": 8.0, "timm, ready": 8.0}
TAKEN = {"pss_nbytes": 3e9, "machine_nbytes": 1e9, "device_nbytes": 2e10, "device_reserved_nbytes": 3e10}
FIGURES = {
    "h2d": {"38535168": GB_PER_S},
    "overlap": {"ours": [0.99], "torch": [0.0], "timm": [0.9]},
    "train": [{**RATE, "ours, jpeg": 9.0, "torch, jpeg": 6.0, "timm, jpeg": 4.5}],
    "memory": {"ours, ready": TAKEN},
}
ABOUT = {"workers": 14, "batch": 256, "source": "photographs"}


def content(*parts):
    kept = {part: {**ABOUT, "figures": FIGURES[part]} for part in parts}
    return {"device": DEVICE, "machine": MACHINE, **kept}


# -- arguments and what is kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device here")
def test_without_a_gpu_one_line_says_so(capsys):
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "needs a CUDA device" in err


def test_a_part_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "h2d,speed"])
    assert "no part is called speed" in capsys.readouterr().err


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """Runs give what FIGURES has, in the folder that is returned."""
    (tmp_path / "README.md").write_text("# Benchmarks\n")
    monkeypatch.setattr(harness, "HERE", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "device_of_this_machine", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.photos.write_jpegs", lambda folder, count: "photographs")
    calls = []

    def run_fresh(module, function, **arguments):
        calls.append(function)
        known = {"train": FIGURES["train"][0], "memory": TAKEN}
        return known.get(function, FIGURES.get(function))

    monkeypatch.setattr(gpu, "run_fresh", run_fresh)
    return tmp_path, calls


def test_a_run_keeps_and_shows_everything(a_gpu, capsys):
    folder, calls = a_gpu
    assert main([]) == 0
    kept = json.loads((folder / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert calls == ["h2d", "overlap", *["train"] * 3, *["memory"] * 7]
    assert all(kept[part]["figures"] for part in PARTS)
    assert "Ratios and goals" in capsys.readouterr().out
    assert "## On a GPU" in (folder / "README.md").read_text()


def test_parts_that_are_not_run_again_stay_and_a_quick_run_touches_neither_them_nor_the_tables(a_gpu):
    folder, calls = a_gpu
    main(["--only", "h2d"])
    main(["--only", "overlap"])
    file = folder / "gpu-nvidia-h100-80gb-hbm3.json"
    before, tables = file.read_text(), (folder / "README.md").read_text()
    assert [part for part in PARTS if part in json.loads(before)] == ["h2d", "overlap"]
    main(["--quick", "--only", "h2d"])
    assert calls == ["h2d", "overlap", "h2d"]
    assert file.read_text() == before
    assert (folder / "README.md").read_text() == tables
    assert (folder / "gpu-nvidia-h100-80gb-hbm3-quick.json").exists()


def test_each_round_is_kept_when_it_is_there_and_a_part_that_fails_leaves_the_others(a_gpu, monkeypatch, capsys):
    folder, calls = a_gpu
    run_fresh = gpu.run_fresh

    def fails_in_the_third_round(module, function, **arguments):
        if function == "train" and calls.count("train") == 2:
            raise RuntimeError("no shared memory")
        return run_fresh(module, function, **arguments)

    monkeypatch.setattr(gpu, "run_fresh", fails_in_the_third_round)
    assert main(["--only", "train,h2d"]) == 1
    kept = json.loads((folder / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert len(kept["train"]["figures"]) == 2
    assert kept["h2d"]["figures"] == FIGURES["h2d"]
    assert "failed: train: no shared memory" in capsys.readouterr().err


def test_kept_results_can_be_shown_again(a_gpu, capsys):
    folder, calls = a_gpu
    file = folder / "from-elsewhere.json"
    file.write_text(json.dumps(content("h2d")))
    assert main(["--show", str(file)]) == 0
    assert calls == []
    assert "38.5 MB" in capsys.readouterr().out
    assert "38.5 MB" in (folder / "README.md").read_text()


def test_a_file_is_named_after_its_device():
    assert file_name("NVIDIA H100 80GB HBM3", quick=False) == "gpu-nvidia-h100-80gb-hbm3"
    assert file_name("NVIDIA RTX™ A2000 (12 GB)", quick=True) == "gpu-nvidia-rtx-a2000-12-gb-quick"


# -- what is shown


def test_ratios_are_those_of_a_round():
    found = {ratio.what: ratio for ratio in ratios(content(*PARTS))}
    slot = found["H2D of 38.5 MB: slot : memory that torch has pinned"]
    assert slot.values == [54 / 55, 1.0]
    assert slot.goal == 0.97
    assert slot.is_met
    assert found["share of copying hidden behind computing: ours"].is_met
    assert found["share of copying hidden behind computing: timm's recipe"].is_met is None
    assert found["training from ready arrays: ours : one resident batch"].values == pytest.approx([0.995])
    assert found["training from JPEG files: ours : timm's recipe"].values == [2.0]
    assert len(found) == 11


def test_a_goal_that_is_missed_is_called_so():
    assert Ratio("x", [0.96, 0.98, 0.96], 0.97).is_met is False
    missed = {**FIGURES["train"][0], "ours, ready": 9.0}
    kept = content("train")
    kept["train"]["figures"] = [missed]
    [goals] = [section for section in sections(kept) if section.title == "Ratios and goals"]
    assert [
        "training from ready arrays: ours : one resident batch",
        "0.900 (0.900 to 0.900)",
        "≥ 0.99",
        "no",
    ] in goals.rows


@pytest.mark.parametrize("parts", [(), ("h2d",), ("overlap",), ("train",), ("memory",), PARTS], ids=str)
def test_only_what_was_measured_is_shown(parts):
    text = markdown(content(*parts))
    for part, shows in {
        "h2d": "GB/s",
        "overlap": "hidden",
        "train": "images/s",
        "memory": "PSS",
    }.items():
        assert (shows in text) == (part in parts), part
    assert "nan" not in text
    assert "None" not in text


# -- what is measured with


def test_the_network_is_resnet_50():
    net = resnet50()
    assert sum(parameter.numel() for parameter in net.parameters()) == 25_557_032  # as torchvision counts them
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == 53
    net.eval()
    with torch.inference_mode():
        features = net[:-3](torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 2048, 2, 2)


@pytest.fixture(scope="module")
def jpegs(demo_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    assert write_jpegs(folder, 12) == "photographs"
    return folder


def test_crops_of_jpegs_differ_from_sample_to_sample_and_not_from_read_to_read(jpegs):
    dataset = JpegCrops(sorted(map(str, jpegs.iterdir())), 1000, 32)
    first, again, other = dataset[0], dataset[0], dataset[12]  # 0 and 12 are of the same file
    assert first["image"].shape == (32, 32, 3)
    assert first["image"].dtype == np.uint8
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


def test_without_the_photographs_there_is_something_of_their_size():
    image = _smooth_noise(0)
    assert image.shape == (375, 500, 3)
    assert 20 < image.std() < 80
    steps = np.abs(np.diff(image.astype(int), axis=1)).mean()
    assert steps < image.std() / 2  # of white noise it would be more


@pytest.mark.parametrize("name", [name for name in FEEDS if name != "resident"])
def test_every_feed_brings_the_same_batches(name):
    dataset, cpu = ReadyImages(6, 8), torch.device("cpu")
    batches = list(FEEDS[name](dataset, 2, 0, cpu))
    assert len(batches) == 3
    for number, batch in enumerate(batches):
        images = np.stack([dataset[2 * number + row]["image"] for row in range(2)])
        expected = (images / 255 - MEAN) / STD
        assert batch["image"].dtype == torch.bfloat16
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_allclose(batch["image"].float().permute(0, 2, 3, 1), expected, rtol=0.02, atol=0.04)
        assert batch["label"].tolist() == [2 * number, 2 * number + 1]
    resident = next(FEEDS["resident"](dataset, 2, 0, cpu))
    assert torch.allclose(batches[0]["image"].float(), resident["image"].float(), rtol=0.02, atol=0.04)


def test_training_and_its_memory_are_measured(jpegs, monkeypatch):
    small = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # noqa: E731
    monkeypatch.setattr(gpu_scenarios, "resnet50", small)
    monkeypatch.setattr("benchmarks.photos.CLASSES", 4)
    variants = [["resident", "ready", 0, 1], ["ours", "jpeg", 0, 1]]
    figures = gpu_scenarios.train(variants, 2, 32, 0, str(jpegs), device="cpu")
    assert list(figures) == ["resident, ready", "ours, jpeg"]
    assert all(rate > 0 for rate in figures.values())
    figures = gpu_scenarios.memory("torch", "jpeg", 2, 32, 0, 1, str(jpegs), device="cpu")
    assert figures["pss_nbytes"] > 50e6
