import numpy as np
import pytest
import torch

from examples.demo.network import MEAN, STD, SmallNet, load, normalise, save


def test_normalise_takes_mean_and_deviation_out_and_keeps_the_other_fields():
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    label = torch.tensor([1, 2])
    batch = normalise({"image": torch.from_numpy(pixels), "label": label})
    expected = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert batch["label"] is label
    assert batch["image"].dtype == torch.float32
    np.testing.assert_allclose(batch["image"].numpy(), expected, atol=1e-5)


def test_normalise_leaves_the_bytes_alone_and_gives_channels_last():
    pixels = torch.full((2, 4, 5, 3), 7, dtype=torch.uint8)
    image = normalise({"image": pixels})["image"]
    assert (pixels == 7).all()
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_a_kept_network_comes_back_with_its_weights_and_classes(tmp_path):
    net = SmallNet(3).to(memory_format=torch.channels_last).eval()
    save(tmp_path / "new folder" / "network.pt", net, ["a", "b", "c"])
    again, classes = load(tmp_path / "new folder" / "network.pt")
    image = torch.rand(2, 3, 32, 32)
    assert classes == ["a", "b", "c"]
    assert not again.training
    torch.testing.assert_close(again(image), net(image))
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["network.pt"]


def test_a_missing_network_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m examples\.demo"):
        load(tmp_path / "network.pt")
