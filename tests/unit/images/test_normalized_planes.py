import pickle

import numpy as np
import pytest

from loaders.images.normalize import NormalizedPlanes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


def reference(image, mean=MEAN, std=STD):
    """By the formula, in float64, rounded once."""
    return np.moveaxis(((image / 255 - np.array(mean)) / np.array(std)).astype(np.float32), 2, 0)


def test_every_value_of_every_channel_is_the_nearest_to_the_formula():
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for image in (values, IMAGE, IMAGE[:1, :1]):
        planes = NormalizedPlanes(MEAN, STD)(image)
        assert (planes.dtype, planes.flags.c_contiguous) == (np.float32, True)
        np.testing.assert_array_equal(planes, reference(image))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_there_are_as_many_channels_as_means(channels):
    image = np.random.default_rng(1).integers(0, 256, (5, 6, channels), np.uint8)
    mean, std = np.linspace(0.1, 0.9, channels), np.linspace(0.5, -2, channels)
    np.testing.assert_array_equal(NormalizedPlanes(mean, std)(image), reference(image, mean, std))


@pytest.mark.parametrize("image", [IMAGE[::2], IMAGE[:, ::-1], np.asfortranarray(IMAGE)])
def test_images_of_any_layout_are_taken_as_they_are(image):
    np.testing.assert_array_equal(NormalizedPlanes(MEAN, STD)(image), reference(image))


def test_planes_are_written_where_they_are_wanted():
    rows = np.full((3, 3, 37, 53), 7, np.float32)
    row = rows[1, ...]
    assert NormalizedPlanes(MEAN, STD)(IMAGE, row) is row
    np.testing.assert_array_equal(rows[1], reference(IMAGE))
    assert (rows[[0, 2]] == 7).all()
    gaps = np.zeros((3, 37, 106), np.float32)
    NormalizedPlanes(MEAN, STD)(IMAGE, gaps[..., ::2])
    np.testing.assert_array_equal(gaps[..., ::2], reference(IMAGE))
    assert not gaps[..., 1::2].any()


@pytest.mark.parametrize(
    "image", [IMAGE[..., 0], IMAGE[..., :2], IMAGE.astype(np.float32), IMAGE[None], np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 pixels of shape \(H, W, 3\)"):
        NormalizedPlanes(MEAN, STD)(image)


@pytest.mark.parametrize("out", [np.zeros((37, 53, 3), np.float32), np.zeros((3, 37, 53))])
def test_a_row_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"the planes are float32 of shape \(3, 37, 53\)"):
        NormalizedPlanes(MEAN, STD)(IMAGE, out)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), (1.0,), "one number per channel in both"),
        ((), (), "one number per channel in both"),
        ((0.5,), (0,), "no std of 0"),
        ((float("nan"),), (1,), "finite"),
    ],
)
def test_mean_and_std_must_make_sense(mean, std, message):
    with pytest.raises(ValueError, match=message):
        NormalizedPlanes(mean, std)


def test_pickled_copies_write_the_same():
    planes = pickle.loads(pickle.dumps(NormalizedPlanes(MEAN, STD)))
    np.testing.assert_array_equal(planes(IMAGE), reference(IMAGE))
    assert repr(planes) == f"NormalizedPlanes(mean={MEAN}, std={STD})"
