import numpy as np
import pytest
import torch

from loaders.bridge import shares_memory, to_image
from loaders.errors import ArrayKindError, DtypeError, ImageShapeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def normalised(photo):
    return torch.from_numpy(((photo / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1))


def test_undoes_normalisation_exactly(photo):
    np.testing.assert_array_equal(to_image(normalised(photo), MEAN, STD), photo)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_mean_and_std_in_any_form(photo, kind):
    np.testing.assert_array_equal(to_image(normalised(photo), mean=kind(MEAN), std=kind(STD)), photo)
    constants = np.array(STD)
    constants.flags.writeable = False  # torch.as_tensor would warn about it
    np.testing.assert_array_equal(to_image(normalised(photo), mean=MEAN, std=constants), photo)


def test_mean_or_std_alone_or_as_one_number():
    tensor = torch.full((3, 1, 1), 0.25)
    assert to_image(tensor, mean=0.25).ravel().tolist() == [128] * 3  # 127.5 rounds to the even neighbour
    assert to_image(tensor, std=2.0).ravel().tolist() == [128] * 3
    assert to_image(tensor).ravel().tolist() == [64] * 3


def test_batches_come_as_nhwc(photo):
    batch = torch.stack([normalised(photo), normalised(photo[::-1].copy())])
    images = to_image(batch, MEAN, STD)
    np.testing.assert_array_equal(images, np.stack([photo, photo[::-1]]))
    assert to_image(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_channels_and_memory_formats(channels, memory_format, dtype):
    tensor = (torch.rand(2, channels, 4, 5) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    image = to_image(tensor.to(memory_format=memory_format))
    assert image.shape == (2, 4, 5, channels)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    expected = tensor if dtype == torch.uint8 else (tensor * 255).round()
    np.testing.assert_array_equal(image, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_float_dtypes_are_computed_in_float32_or_better(dtype):
    tensor = torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 2, 2).to(dtype)
    assert to_image(tensor).ravel().tolist() == [0, 64, 128, 255]
    # In bfloat16 and float8 neither 0.3 + 1/255 nor 127.5 / 255 could be told from its neighbours.
    dark = torch.full((1, 1, 1), 0.5, dtype=dtype)
    assert [to_image(dark, mean=n / 255).item() for n in (0.6, 1.6, 2.6)] == [128, 129, 130]


def test_values_out_of_range_are_clipped_and_nan_is_black():
    inf = float("inf")
    tensor = torch.tensor([-0.1, 1.1, 300.0, -inf, inf, float("nan")]).reshape(1, 2, 3)
    assert to_image(tensor).ravel().tolist() == [0, 255, 255, 0, 255, 0]
    assert tensor.isnan().sum() == 1  # the input is not written to


def test_uint8_pixels_are_taken_as_they_are_and_copied(photo):
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    image = to_image(tensor, MEAN, STD)
    np.testing.assert_array_equal(image, photo)
    assert not shares_memory(image, photo)
    assert image.flags.writeable


def test_tracked_tensors_and_parameters_are_fine():
    assert to_image(torch.nn.Parameter(torch.ones(3, 2, 2))).min() == 255


@pytest.mark.parametrize("shape", [(4, 5), (5, 4, 3), (2, 5, 4), (1, 5, 4, 3), (1, 2, 3, 4, 5), (3,), ()])
def test_other_shapes_are_refused_with_the_remedy(shape):
    with pytest.raises(ImageShapeError, match=r"is no image: expected \(C, H, W\).*\n  Add the channel axis"):
        to_image(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint16])
def test_other_dtypes_are_refused_with_the_remedy(dtype):
    with pytest.raises(DtypeError, match=r"uint8, or a float from 0 to 1\.\n  Call"):
        to_image(torch.zeros(3, 2, 2, dtype=dtype))


def test_constants_of_another_length_are_refused():
    with pytest.raises(ImageShapeError, match="std has 2 values for 3 channels"):
        to_image(torch.zeros(3, 2, 2), std=(1.0, 2.0))


def test_arrays_are_refused():
    with pytest.raises(ArrayKindError):
        to_image(np.zeros((3, 2, 2), np.float32))
