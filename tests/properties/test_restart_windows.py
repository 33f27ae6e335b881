"""Windows decoded from their own segments equal those cut from the decoded whole, bit for bit."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.photo_zoo import SAMPLINGS, exif, jpeg, photo, with_exif

from examples.demo.photos import read_photo
from loaders.images.decode import image, read_image, restart
from loaders.images.decode.header import read_header
from loaders.images.decode.jpeg import read_jpeg_header
from loaders.images.decode.region import Region
from loaders.images.decode.restart import find_restarts

MCU_WIDTH = {"444": 8, "422": 16, "420": 16, "440": 8, "411": 32, "grey": 8}
# Odd and prime sides, some smaller than an MCU, some of whole MCUs.
SIZES = [(131, 97), (1, 1), (7, 3), (5, 211), (223, 6), (16, 16), (17, 33), (64, 48), (127, 113), (320, 64), (250, 188)]


def intervals(width, sampling):
    per_row = -(-width // MCU_WIDTH[sampling])
    return [number for number in range(1, per_row + 1) if per_row % number == 0]


def encoded(width, height, sampling, interval, quality=90, name="coffee"):
    bgr = photo(width, height, name)
    picture = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY) if sampling == "grey" else bgr
    return jpeg(picture, "420" if sampling == "grey" else sampling, restart=interval, quality=quality)


def random_region(rng, width, height):
    left, top = int(rng.integers(width)), int(rng.integers(height))
    return Region(left, top, int(rng.integers(1, width - left + 1)), int(rng.integers(1, height - top + 1)))


@pytest.fixture
def splices(monkeypatch):
    """Lists the windows that were decoded from segments; here also those that are nearly all of a photo."""
    monkeypatch.setattr(image, "_MOST", 2)
    made, splice = [], restart.Restarts.splice

    def noted(self, window, pieces):
        made.append(splice(self, window, pieces))
        return made[-1]

    monkeypatch.setattr(restart.Restarts, "splice", noted)
    return made


@pytest.mark.parametrize("anchors_nbytes", [1, 300, 2048])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
def test_random_windows_of_every_sampling_and_size(sampling, anchors_nbytes, splices, monkeypatch):
    monkeypatch.setattr(restart, "_ANCHORS_NBYTES", anchors_nbytes)
    rng, count = np.random.default_rng(anchors_nbytes), 0
    for width, height in SIZES:
        for interval in intervals(width, sampling):
            data = encoded(width, height, sampling, interval, quality=int(rng.integers(10, 100)))
            whole = {mode: read_image(data, mode) for mode in ("RGB", "GRAY")}
            for number in range(12):
                mode = ("RGB", "GRAY")[number % 2]
                region = random_region(rng, width, height)
                part = read_image(data, mode, region=region, backend="restarts")
                np.testing.assert_array_equal(part, region.of(whole[mode]), str((width, height, interval, region)))
                count += 1
    assert len(splices) == count > 250
    assert None not in splices


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
def test_reduced_scales_are_those_of_decoding_everything(sampling, scale, splices):
    rng, count = np.random.default_rng(scale), 0
    for width, height in SIZES:
        for interval in intervals(width, sampling):
            data = encoded(width, height, sampling, interval)
            for number in range(6):
                mode, region = ("RGB", "GRAY")[number % 2], random_region(rng, width, height)
                part = read_image(data, mode, region=region, scale=scale)
                expected = read_image(data, mode, region=region, scale=scale, backend="opencv")
                np.testing.assert_array_equal(part, expected, str((width, height, interval, region)))
                count += 1
    assert len(splices) == count
    assert None not in splices


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
def test_single_pixels_at_every_place(sampling, scale):
    data = encoded(63, 45, sampling, 1)
    for left in range(63):
        region = Region(left, left * 44 // 62, 1, 1)
        expected = read_image(data, region=region, scale=scale, backend="opencv")
        np.testing.assert_array_equal(read_image(data, region=region, scale=scale), expected, str(region))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_windows_lie_in_the_upright_picture(orientation, splices):
    rng = np.random.default_rng(orientation)
    data = with_exif(encoded(131, 97, "420", 3), exif(orientation))
    whole = read_image(data)
    for scale in (1, 1, 1, 2, 4, 8) * 4:
        region = random_region(rng, whole.shape[1], whole.shape[0])
        part = read_image(data, region=region, scale=scale)
        expected = read_image(data, region=region, scale=scale, backend="opencv")
        np.testing.assert_array_equal(part, expected)
    assert len(splices) == 24


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_size_interval_and_window(data):
    sampling = data.draw(st.sampled_from([*SAMPLINGS, "grey"]))
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 200))
    interval = data.draw(st.sampled_from(intervals(width, sampling)))
    file = encoded(
        width, height, sampling, interval, data.draw(st.integers(1, 100)), data.draw(st.sampled_from(["cat", "retina"]))
    )
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    region = Region(left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    scale = data.draw(st.sampled_from([1, 1, 2, 4, 8]))
    assert find_restarts(file, read_jpeg_header(file)) is not None
    part = read_image(file, region=region, scale=scale, backend="restarts")
    np.testing.assert_array_equal(part, read_image(file, region=region, scale=scale, backend="opencv"))


def test_a_window_of_a_large_photo_is_made_of_few_of_its_bytes():
    width, height = 4000, 3000
    data = jpeg(np.tile(read_photo("retina"), (3, 3, 1))[:height, :width], restart=5)
    restarts, whole = find_restarts(data, read_header(data).jpeg), read_image(data)
    assert restarts.anchors.nbytes < len(data) / 200
    rng = np.random.default_rng(1)
    for _ in range(30):
        region = Region(int(rng.integers(width - 223)), int(rng.integers(height - 223)), 224, 224)
        starts, ends = restarts.ranges(restarts.window(region, 1))
        assert sum(ends) - sum(starts) < 0.06 * len(data)
        np.testing.assert_array_equal(read_image(data, region=region), region.of(whole))
