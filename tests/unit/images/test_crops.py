"""Crops: which part of a photo is seen, with which pixels, and where they are written."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.photo_zoo import encode, exif, jpeg, photo, with_exif, zoo

from examples.demo.photos import read_photo
from loaders import CenterCrop, DecodeError, RandomResizedCrop, Resize, image_size, read_image
from loaders.images.crops import Crop
from loaders.images.decode import nvimagecodec, opencv
from loaders.images.decode.image import EncodedImage
from loaders.images.decode.region import Region
from loaders.randomness.streams import enter_sample, leave_sample

CROPS = {
    "random": RandomResizedCrop(40, exact=True),
    "random, small parts": RandomResizedCrop((30, 50), scale=(0.01, 0.1), ratio=(0.5, 2), exact=True),
    "random, linear": RandomResizedCrop((20, 24), interpolation=cv2.INTER_LINEAR, exact=True),
    "center": CenterCrop(28, 32, exact=True),
    "center, larger than the photo": CenterCrop((200, 224), exact=True),
    "resized": Resize((33, 70), exact=True),
    "resized, in proportion": Resize(37, exact=True),
    "resized, stretched": Resize((500, 20), exact=True),
}
BACKENDS = [None, "opencv"]


@dataclass(frozen=True)
class Part(Crop):
    """A region that a test names."""

    size: tuple[int, int]
    part: tuple[int, int, int, int]

    @property
    def shape(self):
        return self.size

    def region(self, width, height, rng=None):
        return self.part  # a plain tuple, as a subclass of a user's may give


@pytest.fixture(autouse=True)
def in_a_sample():
    enter_sample(seed=1, epoch=2, position=3)
    yield
    leave_sample()


def resized(picture, height, width, interpolation=None):
    if interpolation is None:
        shrinks = picture.shape[0] >= height and picture.shape[1] >= width
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(picture, (width, height), interpolation=interpolation)


# -- pixels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_exact_pixels_are_those_of_decoding_everything_cropping_then_resizing(crop, backend):
    for number, (name, file) in enumerate(zoo().items()):
        whole = read_image(file, backend="opencv")
        enter_sample(0, 0, number)
        region = crop.region(whole.shape[1], whole.shape[0])
        enter_sample(0, 0, number)
        seen = crop.read(file, backend=backend)
        assert seen.shape[:2] == crop.shape or crop == CROPS["resized, in proportion"]
        expected = resized(region.of(whole), *seen.shape[:2], crop.interpolation)
        np.testing.assert_array_equal(seen, expected, err_msg=name)


def test_a_region_that_is_not_shrunk_much_is_exact_without_being_asked():
    file = jpeg(photo())
    part = Part((40, 40), (11, 7, 99, 90))
    np.testing.assert_array_equal(part.read(file), resized(Region(*part.part).of(read_image(file)), 40, 40))


def scales_of(monkeypatch):
    """The list to which each later read appends its (region, scale)."""
    seen, read = [], EncodedImage.read

    def noted(self, mode="RGB", region=None, scale=1):
        seen.append((region, scale))
        return read(self, mode, region, scale)

    monkeypatch.setattr(EncodedImage, "read", noted)
    return seen


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "flower", "retina"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_scales_stay_within_the_stated_tolerance(name, scale, orientation, monkeypatch):
    bgr = read_photo(name)
    bgr = bgr[: bgr.shape[0] // 8 * 8, : bgr.shape[1] // 8 * 8]  # so that blocks are the same seen from any side
    file = with_exif(jpeg(bgr), exif(orientation))
    whole, seen = read_image(file), scales_of(monkeypatch)
    rng = np.random.default_rng(scale)
    for _ in range(4):
        side = int(rng.integers(12, 32))
        least = int(scale * 1.25 * (side + 1)) + 1
        width, height = (int(rng.integers(least, least * 1.4)) for _ in "wh")
        left = int(rng.integers(0, whole.shape[1] - width))
        top = int(rng.integers(0, whole.shape[0] - height))
        result = Part((side, side), (left, top, width, height)).read(file, backend="opencv")
        moved, used = seen.pop()
        assert used == scale
        edges = [left, top, left + width, top + height]
        moved_edges = [moved.left, moved.top, moved.left + moved.width, moved.top + moved.height]
        per_pixel = min(width, height) / side
        assert max(abs(a - b) for a, b in zip(edges, moved_edges, strict=True)) / per_pixel <= 0.4
        exact = resized(moved.of(whole), side, side)
        difference = np.abs(result.astype(int) - exact).mean()
        assert difference < 6
        assert difference < 0.2 * exact.std() + 1  # and it is the same picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_scales_know_which_side_is_up(orientation):
    # Sides that are no multiples of 8: blocks are counted from a corner that EXIF turns.
    file = with_exif(jpeg(photo(331, 251)), exif(orientation))
    width, height = image_size(file)
    # The part is neither in the middle nor square, so that turning or shifting it would show.
    part = (width // 8, height // 16, width * 3 // 4, height * 5 // 8)
    reduced = Part((24, 32), part).read(file)
    exact = Part((24, 32), part, exact=True).read(file)
    assert np.abs(reduced.astype(int) - exact).mean() < 8
    assert (reduced != exact).any()


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(204, 205, 1), (205, 204, 1), (205, 205, 2), (410, 410, 4), (410, 409, 2), (819, 819, 4), (820, 820, 8)],
)
def test_a_scale_is_reduced_only_where_it_leaves_enough_pixels(width, height, scale, monkeypatch):
    seen = scales_of(monkeypatch)
    file = jpeg(photo(900, 850))
    result = Part((81, 81), (1, 1, width, height)).read(file, backend="opencv")
    assert result.shape == (81, 81, 3)
    assert seen[0][1] == scale
    assert min(-(-side // scale) for side in seen[0][0][2:]) >= 81
    assert Part((81, 81), (1, 1, width, height), exact=True).read(file).shape == (81, 81, 3)
    assert seen[1] == ((1, 1, width, height), 1)


@pytest.mark.parametrize(
    ("part", "scale"), [((0, 0, 110, 110), 1), ((0, 690, 110, 110), 1), ((0, 0, 800, 800), 8), ((0, 300, 500, 500), 8)]
)
def test_what_decodes_regions_is_asked_to_where_that_is_cheaper(part, scale, monkeypatch):
    seen = scales_of(monkeypatch)
    monkeypatch.setattr(nvimagecodec, "agrees_with_opencv", lambda: True)
    monkeypatch.setattr(
        nvimagecodec, "decode_jpeg_region", lambda data, region, mode: opencv.decode_jpeg_region(data, region, mode, 1)
    )
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8), (0, 0), 1)
    file = jpeg(noise, quality=50)
    Part((40, 40), part).read(file)
    Part((40, 40), part).read(file, backend="opencv")
    assert seen[0][1] == scale
    assert seen[1][1] > 1


def test_other_formats_are_read_once_and_exactly(monkeypatch):
    seen = scales_of(monkeypatch)
    file = encode(".png", photo(400, 300))
    result = Part((20, 30), (3, 5, 301, 291)).read(file)
    assert seen == [(None, 1)]
    np.testing.assert_array_equal(result, resized(read_image(file)[5:296, 3:304], 20, 30))


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_a_crop_that_asks_for_more_than_the_photo_has_is_refused(extension):
    with pytest.raises(ValueError, match="not inside the picture of 131 x 97 pixels"):
        Part((20, 30), (100, 5, 32, 20)).read(encode(extension, photo()))


# -- where they are written


@pytest.mark.parametrize("name", ["png", "jpeg 420", "jpeg exif 6"])
@pytest.mark.parametrize("crop", [CenterCrop(24, 32), Resize((97, 131)), Resize((300, 260))])
def test_pixels_are_written_where_they_are_wanted(crop, name, monkeypatch):
    expected, resize, given = crop.read(zoo()[name]), cv2.resize, []
    monkeypatch.setattr(
        cv2, "resize", lambda *args, dst, **options: given.append(dst) or resize(*args, dst=dst, **options)
    )
    rows = np.full((3, *crop.shape, 3), 7, np.uint8)
    row = rows[1, ...]
    assert crop.read(zoo()[name], row) is row
    assert given[0] is row  # no copy in between
    np.testing.assert_array_equal(rows[1], expected)
    assert (rows[[0, 2]] == 7).all()
    gaps = np.zeros((*crop.shape, 4), np.uint8)
    crop.read(zoo()[name], gaps[..., :3])
    np.testing.assert_array_equal(gaps[..., :3], expected)
    assert not gaps[..., 3].any()


@pytest.mark.parametrize("out", [np.zeros((24, 25, 3), np.uint8), np.zeros((24, 24), np.uint8), np.zeros((24, 24, 3))])
def test_a_row_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"the crop gives uint8 of shape \(24, 24, 3\)"):
        CenterCrop(24, 32).read(zoo()["png"], out)


# -- mirrored


def test_a_flip_mirrors_the_same_region_wherever_it_is_written():
    file = zoo()["jpeg 420"]

    def seen(flip, out=None):
        enter_sample(0, 0, 5)
        return RandomResizedCrop(24, flip=flip).read(file, out)

    straight = seen(0)
    assert not np.array_equal(straight, straight[:, ::-1])
    np.testing.assert_array_equal(seen(1), straight[:, ::-1])
    row, gaps = np.empty((24, 24, 3), np.uint8), np.zeros((24, 24, 4), np.uint8)
    assert seen(1, row) is row
    seen(1, gaps[..., :3])
    np.testing.assert_array_equal(row, straight[:, ::-1])
    np.testing.assert_array_equal(gaps[..., :3], row)


def test_so_many_are_mirrored_as_were_asked_for():
    file = zoo()["png"]
    mirrored = 0
    for position in range(400):
        seen = []
        for flip in (0, 0.25):
            enter_sample(0, 0, position)
            seen.append(RandomResizedCrop(8, flip=flip).read(file))
        mirrored += not np.array_equal(*seen)
    assert 60 <= mirrored <= 140  # 100 expected, 4.6 standard deviations


# -- regions


ANY_CROP = st.one_of(
    st.builds(
        RandomResizedCrop,
        st.integers(1, 300),
        st.tuples(st.floats(1e-6, 0.5), st.floats(0.5, 1)),
        st.tuples(st.floats(1e-3, 1), st.floats(1, 1e3)),
    ),
    st.builds(CenterCrop, st.tuples(st.integers(1, 256), st.integers(1, 256))),
    st.builds(Resize, st.integers(1, 300)),
)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(ANY_CROP, st.integers(1, 5000), st.integers(1, 5000))
def test_a_region_has_pixels_and_lies_inside_of_any_photo(crop, width, height):
    assert crop.region(width, height, np.random.default_rng(0)).is_inside(width, height)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2000), (2000, 3), (2, 1)])
@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_the_smallest_and_the_flattest_photos_are_cropped(width, height, extension):
    file = encode(extension, np.full((height, width, 3), 77, np.uint8))
    for crop in (RandomResizedCrop(24, scale=(0.01, 0.2)), CenterCrop(24), Resize((24, 24))):
        result = crop.read(file)
        assert result.shape == (24, 24, 3)
        assert (np.abs(result.astype(int) - 77) <= 1).all()
    assert min(Resize(5).read(file).shape[:2]) == 5


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(100, 4, (47, 0, 5, 4)), (4, 100, (0, 47, 4, 5)), (1, 100, (0, 49, 1, 1))],
)
def test_where_no_draw_fits_the_largest_central_part_is_taken(width, height, expected):
    class NeverFits:
        def random(self):
            return 0.5

    crop = RandomResizedCrop(8, scale=(1, 1), ratio=(0.8, 1.25))
    assert crop.region(width, height, NeverFits()) == expected
    assert RandomResizedCrop(8, ratio=(5, 6)).region(1, 100, NeverFits()) == (0, 49, 1, 1)


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [
        (CenterCrop(224), (512, 256), (144, 16, 224, 224)),
        (CenterCrop(224), (400, 500), (25, 75, 350, 350)),
        (CenterCrop((100, 200)), (512, 256), (156, 78, 200, 100)),
        (CenterCrop(256), (300, 256), (22, 0, 256, 256)),
        (CenterCrop(8, 16), (101, 33), (42, 8, 16, 16)),
        (Resize(7), (33, 44), (0, 0, 33, 44)),
    ],
)
def test_the_regions_of_what_is_not_random(crop, size, expected):
    assert crop.region(*size) == expected


def test_a_center_crop_is_what_resizing_first_and_cropping_then_would_show():
    picture = read_photo("coffee")
    height, width = picture.shape[:2]
    seen = CenterCrop(96, 128, exact=True).read(encode(".png", picture))
    small = cv2.resize(picture[..., ::-1], (128 * width // height, 128), interpolation=cv2.INTER_AREA)
    left = (small.shape[1] - 96) // 2
    assert np.abs(seen.astype(int) - small[16:112, left : left + 96]).mean() < 4


@pytest.mark.parametrize(
    ("size", "expected"), [(48, (48, 64)), ((48, 50), (48, 50)), (1, (1, 1)), (97, (97, 131)), (300, (300, 405))]
)
def test_resize_keeps_proportions_for_an_int_alone(size, expected):
    crop = Resize(size)
    assert crop.read(zoo()["jpeg 420"]).shape == (*expected, 3)
    assert crop.shape == (None if isinstance(size, int) else expected)


def test_only_random_crops_draw():
    enter_sample(0, 0, 0)
    first = RandomResizedCrop(8).region(400, 300)
    enter_sample(0, 0, 0)
    CenterCrop(8).read(zoo()["png"])
    Resize(8).read(zoo()["jpeg 420"])
    assert RandomResizedCrop(8).region(400, 300) == first
    assert RandomResizedCrop(8).region(400, 300) != first
    assert [crop.is_random for crop in (RandomResizedCrop(8), CenterCrop(8), Resize(8))] == [True, False, False]


# -- objects and mistakes


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_crops_are_values(crop):
    assert pickle.loads(pickle.dumps(crop)) == crop
    with pytest.raises(dataclasses.FrozenInstanceError):
        crop.exact = False
    assert str(crop.size) in repr(crop)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(0), r"size 0: expected an int or \(height, width\)"),
        (lambda: RandomResizedCrop((3, 4, 5)), r"size \(3, 4, 5\)"),
        (lambda: Resize("224"), "size '224'"),
        (lambda: Resize((224.5, 3)), r"size \(224.5, 3\)"),
        (lambda: CenterCrop((-1, 4)), r"size \(-1, 4\)"),
        (lambda: CenterCrop(288), r"size 288 is more than resize=256.*\n.*such as 330"),
        (lambda: RandomResizedCrop(8, (0, 1)), r"scale \(0, 1\): expected"),
        (lambda: RandomResizedCrop(8, (0.9, 0.1)), "scale"),
        (lambda: RandomResizedCrop(8, (0.5, 2)), "scale"),
        (lambda: RandomResizedCrop(8, ratio=(2, 0.5)), r"ratio \(2, 0.5\): expected"),
        (lambda: RandomResizedCrop(8, ratio=(0, 1)), "ratio"),
        (lambda: RandomResizedCrop(8, flip=1.5), r"flip 1.5: expected a probability"),
        (lambda: Resize(8, interpolation=99), "interpolation 99 is unknown"),
    ],
)
def test_wrong_arguments_are_refused_when_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: b"", "the file is empty"),
        (lambda file: file[: len(file) // 2], "cut short"),
        (lambda file: file[:20], "cut short"),
        (lambda file: b"no image at all", "OpenCV cannot decode"),
    ],
)
@pytest.mark.parametrize("crop", [RandomResizedCrop(8), CenterCrop(8)])
def test_a_damaged_file_is_named(crop, damage, why, tmp_path):
    path = tmp_path / "a:b: c.jpg"
    path.write_bytes(damage(zoo()["jpeg 420"]))
    with pytest.raises(DecodeError, match=rf'^sample 5 \("{path}"\): .*{why}[^\n]*\.\n  Replace') as caught:
        crop.read(path, index=5)
    assert (caught.value.index, caught.value.source) == (5, str(path))
    with pytest.raises(DecodeError, match=rf'^image "{path}": .*{why}'):
        crop.read(str(path))
    with pytest.raises(DecodeError, match=rf"^sample 5: .*{why}"):
        crop.read(path.read_bytes(), index=5)


@pytest.mark.parametrize(("name", "why"), [("nowhere.jpg", "No such file"), ("a\0b.jpg", "null")])
def test_a_file_that_cannot_be_opened_is_named(name, why, tmp_path):
    with pytest.raises(DecodeError, match=rf'(?s)^sample 5 \(".*/{name}"\): .*{why}.*\n  Replace the file'):
        CenterCrop(8).read(str(tmp_path / name), index=5)
