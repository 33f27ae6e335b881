"""MultiCrop: the crops are those of single ones, from one decoding, written where they are wanted."""

from __future__ import annotations

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest
from support.photo_zoo import encode, exif, jpeg, photo, with_exif

from loaders import (
    DataLoader,
    DecodedCache,
    DecodeError,
    ImageFiles,
    ImageFolder,
    MultiCrop,
    RandomResizedCrop,
    read_image,
)
from loaders.errors import FieldShapeError
from loaders.images.crops import snapped
from loaders.images.decode.image import EncodedImage, open_image
from loaders.images.decode.region import Region
from loaders.images.normalize import NormalizedPlanes
from loaders.randomness.streams import enter_sample, leave_sample

LARGE = photo(803, 597)
FILES = {
    "plain": jpeg(LARGE),
    "prepared": jpeg(LARGE, "420", restart=3),
    "progressive": jpeg(LARGE, progressive=True),
    "png": encode(".png", LARGE),
    **{f"turned {turn}": with_exif(jpeg(LARGE, "420", restart=4 * (turn % 2)), exif(turn)) for turn in range(2, 9)},
}
LINEAR, AREA = cv2.INTER_LINEAR, cv2.INTER_AREA


@pytest.fixture
def keyed():
    enter_sample(3, 1, 7)
    yield
    leave_sample()


def drawn(crops, width, height):
    """The regions that a read draws from the sample's numbers, and the generator after them."""
    enter_sample(3, 1, 7)
    regions = [crop.region(width, height) for crop, count in crops.crops for _ in range(count)]
    enter_sample(3, 1, 7)
    return regions


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("backend", ["opencv", "restarts", "nvimagecodec", None])
@pytest.mark.parametrize("size", [40, 300])
def test_each_crop_has_the_pixels_of_a_single_one_of_its_region_at_the_same_scale(name, backend, size, keyed):
    if backend == "nvimagecodec":
        pytest.importorskip("nvidia.nvimgcodec")
    options = {"scale": (0.3, 1.0), "interpolation": LINEAR}
    crops = MultiCrop([(RandomResizedCrop(size, **options), 2), (RandomResizedCrop((20, 30), **options), 3)])
    data, scales = FILES[name], []
    with open_image(data) as image:
        width, height = image.size()
    regions = drawn(crops, width, height)
    read_regions = EncodedImage.read_regions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EncodedImage, "read_regions", lambda self, *given: scales.append(given[1]) or read_regions(self, *given)
        )
        results = crops.read(data, backend=backend)
    assert [result.shape for result in results] == [(2, size, size, 3), (3, 20, 30, 3)]
    scale = scales[0] if scales else 1
    if size == 300 or name == "png":
        assert scale == 1
    elif backend in ("opencv", "restarts"):  # nvImageCodec may be faster at full scale
        assert scale > 1
    rows = [row for result in results for row in result]
    for region, row in zip(regions, rows, strict=True):
        place = snapped(region, scale, width, height) if scale > 1 else region
        part = read_image(data, region=place, scale=scale)
        np.testing.assert_array_equal(row, cv2.resize(part, row.shape[1::-1], interpolation=LINEAR))


@pytest.mark.parametrize("name", ["plain", "prepared", "turned 6"])
def test_an_exact_crop_has_the_pixels_of_the_whole_photo(name, keyed):
    crops = MultiCrop([(RandomResizedCrop(30, exact=True), 2), (30, 1)])
    whole = read_image(FILES[name])
    regions = drawn(crops, whole.shape[1], whole.shape[0])
    (exact, plain) = crops.read(FILES[name])
    for region, row in zip(regions, exact, strict=False):
        grows = region.width < 30 or region.height < 30
        expected = cv2.resize(region.of(whole), (30, 30), interpolation=LINEAR if grows else AREA)
        np.testing.assert_array_equal(row, expected)
    assert plain.shape == (1, 30, 30, 3)


def test_a_crop_without_interpolation_halves_its_region_before_it_is_resized(keyed):
    picture = LARGE
    crops = MultiCrop([(50, 8)])
    regions = drawn(crops, picture.shape[1], picture.shape[0])
    (rows,) = crops.apply(picture)
    halved, errors, plain_errors = 0, 0.0, 0.0
    for region, row in zip(regions, rows, strict=True):
        part = region.of(picture)
        while part.shape[0] >= 100 and part.shape[1] >= 100:
            height, width = part.shape[0] // 2 * 2, part.shape[1] // 2 * 2
            blocks = part[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(int)
            part = ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)
            halved += 1
        np.testing.assert_array_equal(row, cv2.resize(part, (50, 50), interpolation=LINEAR))
        # It is close to an average over the whole region, where a plain INTER_LINEAR would pick single pixels.
        mean = cv2.resize(region.of(picture), (50, 50), interpolation=AREA)
        errors += np.abs(row.astype(int) - mean).mean()
        plain = cv2.resize(region.of(picture), (50, 50), interpolation=LINEAR)
        plain_errors += np.abs(plain.astype(int) - mean).mean()
    assert halved > 8
    assert errors < 0.9 * plain_errors


def test_a_flip_mirrors_the_crop_and_is_drawn_for_each(keyed):
    crops = MultiCrop([(RandomResizedCrop(20, flip=1.0), 2)])
    (flipped,) = crops.read(FILES["plain"])
    enter_sample(3, 1, 7)
    (plain,) = MultiCrop([(RandomResizedCrop(20), 2)]).read(FILES["plain"])
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    seen = set()
    for key in range(8):
        enter_sample(0, 0, key)
        (halves,) = MultiCrop([(RandomResizedCrop(20, (1.0, 1.0), (1.0, 1.0), flip=0.5), 2)]).apply(LARGE[:, :597])
        seen.add((halves[0] == halves[1]).all())
    assert seen == {True, False}


@pytest.mark.parametrize("name", FILES)
def test_the_photo_is_decoded_once(name, monkeypatch):
    decoded, read = [], EncodedImage.read
    monkeypatch.setattr(EncodedImage, "read", lambda *given: decoded.append(given) or read(*given))
    MultiCrop([(64, 2), (32, 8)]).read(FILES[name])
    assert len(decoded) == 1


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_regions_read_together_have_the_pixels_of_each(turn, scale):
    data = with_exif(jpeg(photo(131, 97), "420"), exif(turn))
    with open_image(data) as image:
        width, height = image.size()
        regions = [Region(3, 5, 40, 31), Region(width - 30, height - 20, 30, 20), Region(17, 40, 9, 8)]
        together = image.read_regions(regions, scale)
    for region, part in zip(regions, together, strict=True):
        np.testing.assert_array_equal(part, read_image(data, region=region, scale=scale))


def test_results_are_written_where_they_are_wanted_and_nowhere_else():
    crops = MultiCrop([(16, 3), ((8, 12), 1)])
    assert crops.shape == ((3, 16, 16), (1, 8, 12))
    rows = tuple(np.full((2, *shape, 3), 7, np.uint8) for shape in crops.shape)
    out = tuple(each[1] for each in rows)
    assert crops.read(FILES["plain"], out) is out
    assert all((each[0] == 7).all() and (each[1] != 7).any() for each in rows)
    for wrong in ((np.zeros((3, 16, 16, 3), np.uint8),), (np.zeros((3, 16, 16, 3)), out[1])):
        with pytest.raises(ValueError, match="out "):
            crops.read(FILES["plain"], wrong)


@pytest.mark.parametrize(
    ("crops", "kind", "what"),
    [
        ([], ValueError, "crops is empty"),
        ([(224, 0)], ValueError, "at least one crop"),
        ([(0, 2)], ValueError, "size 0"),
        ([224], TypeError, "224 is not a pair"),
        ([(224, "two")], TypeError, "is not a pair"),
        ([("large", 2)], ValueError, "size 'large'"),
    ],
)
def test_what_makes_no_sense_is_refused(crops, kind, what):
    with pytest.raises(kind, match=what):
        MultiCrop(crops)


def test_a_pickled_copy_is_equal_and_reads_the_same(keyed):
    crops = MultiCrop([(RandomResizedCrop(20, flip=0.5), 2), (10, 1)])
    copy = pickle.loads(pickle.dumps(crops))
    assert copy == crops
    assert hash(copy) == hash(crops)
    assert repr(crops).startswith("MultiCrop(crops=((RandomResizedCrop(")
    assert replace(crops, crops=((10, 1),)).shape == ((1, 10, 10),)
    one = crops.read(FILES["plain"])
    enter_sample(3, 1, 7)
    assert all((a == b).all() for a, b in zip(one, copy.read(FILES["plain"]), strict=True))


@pytest.mark.parametrize("cut", [10, 3000, -300])
def test_a_damaged_photo_is_named(tmp_path, cut):
    path = tmp_path / "cut.jpg"
    path.write_bytes(FILES["plain"][:cut])
    with pytest.raises(DecodeError, match=r"sample 4 \(.*cut\.jpg"):
        MultiCrop([(20, 2)]).read(path, index=4)


@pytest.fixture
def folder(tmp_path):
    for kind, name in enumerate(("cat", "coffee")):
        for number in range(3):
            path = tmp_path / str(kind) / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(jpeg(photo(131 + 16 * number, 97, name), restart=number % 2))
    return tmp_path


def double(sample):
    return {**sample, "image": tuple(255 - stack for stack in sample["image"])}


@pytest.mark.parametrize("options", [{}, {"normalize": ((0.5,) * 3, (0.25,) * 3)}, {"transform": double}])
def test_batches_are_stacks_per_size_and_the_same_with_any_workers(folder, options):
    dataset = ImageFolder(folder, crop=MultiCrop([(24, 2), (16, 3)]), **options)
    assert len(dataset) == 6

    def epoch(seed, **more):
        loader = DataLoader(dataset, 3, shuffle=True, seed=seed, **more)
        return [[stack.numpy().copy() for stack in batch["image"]] for batch in loader]

    one = epoch(0)
    shapes = [(3, 2, 24, 24, 3), (3, 3, 16, 16, 3)]
    if "normalize" in options:
        shapes = [(3, 2, 3, 24, 24), (3, 3, 3, 16, 16)]
    assert [stack.shape for stack in one[0]] == shapes
    for a, b in zip(one, epoch(0, num_workers=2), strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)
    assert any((a[0] != b[0]).any() for a, b in zip(one, epoch(1), strict=True))


def test_crops_and_planes_are_written_into_the_batch(folder):
    crops, planes = MultiCrop([(24, 2), (16, 3)]), NormalizedPlanes((0.5,) * 3, (0.25,) * 3)
    plain, normalized = (
        ImageFolder(folder, crop=crops),
        ImageFolder(folder, crop=crops, normalize=(planes.mean, planes.std)),
    )
    out = {
        "image": tuple(np.zeros((*shape, 3), np.uint8) for shape in crops.shape),
        "label": np.zeros((), np.int64),
    }
    enter_sample(0, 0, 5)
    plain.read_into(4, out)
    enter_sample(0, 0, 5)
    sample = plain[4]
    assert out["label"] == sample["label"] == 1
    for written, stack in zip(out["image"], sample["image"], strict=True):
        np.testing.assert_array_equal(written, stack)
    places = tuple(np.zeros((count, 3, *size), np.float32) for count, *size in crops.shape)
    enter_sample(0, 0, 5)
    normalized.read_into(4, {"image": places, "label": out["label"]})
    leave_sample()
    for written, stack in zip(places, sample["image"], strict=True):
        np.testing.assert_array_equal(written, np.stack([planes(each) for each in stack]))


def test_what_a_transform_makes_of_the_stacks_must_still_be_stacks(folder):
    dataset = ImageFolder(
        folder,
        transform=lambda sample: {**sample, "image": sample["image"][0][0]},
        crop=MultiCrop([(24, 2)]),
        normalize=((0.5,) * 3, (0.25,) * 3),
    )
    with pytest.raises(FieldShapeError, match="normalize= needs a tuple of uint8"):
        dataset[0]


def test_a_cache_makes_its_crops_of_the_decoded_photo(folder):
    paths = ImageFolder(folder).paths
    cache = DecodedCache(ImageFiles(paths), 1 << 22, crop=MultiCrop([(24, 2), (16, 3)]))
    for _ in range(2):
        batch = next(iter(DataLoader(cache, 6)))
        assert [tuple(stack.shape) for stack in batch["image"]] == [(6, 2, 24, 24, 3), (6, 3, 16, 16, 3)]
    assert cache.cached_count == 6
