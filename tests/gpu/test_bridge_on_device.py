import warnings

import numpy as np
import pytest
import torch

from loaders.bridge import as_array, shares_memory, to_image, to_numpy
from loaders.errors import ShareError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def refuse_implicit_waits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this debug mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_transfer_of_a_tree_waits_by_itself(refuse_implicit_waits):
    x = torch.arange(2.0**20, device="cuda").reshape(1024, 1024)
    conj = torch.full((1000,), 1 + 2j, device="cuda").conj()
    tree = {"x": x, "t": x.t(), "half": x[0].bfloat16(), "conj": conj, "neg": conj.imag, "wide": x[:1].expand(3, -1)[0]}
    result = to_numpy(tree)
    np.testing.assert_array_equal(result["x"], np.arange(2.0**20, dtype=np.float32).reshape(1024, 1024))
    np.testing.assert_array_equal(result["t"], result["x"].T)
    np.testing.assert_array_equal(result["wide"], result["x"][0])
    assert (result["conj"] == 1 - 2j).all()
    assert (result["neg"] == -2).all()
    assert result["half"].dtype == np.float32
    assert all(array.flags.owndata and array.flags.c_contiguous for array in result.values())


def test_device_tensors_are_copied_or_refused():
    tensor = torch.arange(3, device="cuda")
    assert as_array(tensor).tolist() == [0, 1, 2]
    with pytest.raises(ShareError, match="is on cuda:0"):
        as_array(tensor, copy=False)


def test_memory_is_compared_on_the_device():
    tensor = torch.zeros(10, device="cuda")
    assert shares_memory(tensor[::2], tensor)
    assert not shares_memory(tensor[::2], tensor[1::2])
    assert not shares_memory(tensor, tensor.cpu())


def test_images_come_from_the_device():
    tensor = torch.full((2, 3, 4, 5), 0.5, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    image = to_image(tensor, mean=[0.0, 0.5, 1.0], std=0.5)
    assert image.shape == (2, 4, 5, 3)
    assert image[0, 0, 0].tolist() == [64, 191, 255]
