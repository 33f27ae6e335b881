"""From a DecodedCache straight into the row of a batch, whole or cropped."""

import cv2
import numpy as np
import pytest
from support.numpy_datasets import Counted

from loaders import DataLoader, DatasetError, DecodedCache, Field, ImageFolder
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError
from loaders.images.crops import RandomResizedCrop, Resize
from loaders.randomness.streams import enter_sample, leave_sample

ROOM = 1 << 22


def row_like(sample):
    return {"image": np.empty_like(sample["image"]), "label": np.empty((), np.int64)}


@pytest.mark.parametrize("transform", [None, lambda sample: {**sample, "image": 255 - sample["image"]}])
def test_read_into_gives_what_indexing_gives(transform):
    cache = DecodedCache(Counted(), ROOM, transform)
    for _ in range(2):
        for index in (-1, 3):
            out = row_like(cache.dataset[0])
            cache.read_into(index, out)
            assert out["label"] == index % 8
            np.testing.assert_array_equal(out["image"], cache[index]["image"])
    assert cache.hit_rate == 0.75


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (
            {"image": np.zeros((3, 2), np.uint8), "label": 1},
            FieldShapeError,
            r'"image": shape \(3, 2\), expected \(2, 3',
        ),
        ({"image": np.zeros((2, 3), np.int8), "label": 1}, FieldDtypeError, r'"image": int8, expected uint8'),
        ({"image": np.zeros((2, 3), np.uint8), "label": 1.5}, FieldDtypeError, r'"label": float, expected int64'),
        ({"image": np.zeros((2, 3), np.uint8), "label": True}, FieldDtypeError, r'"label": bool, expected int64'),
        ({"image": np.zeros((2, 3), np.uint8), "label": "text"}, FieldDtypeError, r'"label": str, expected int64'),
        ({"image": np.ma.zeros((2, 3), np.uint8), "label": 1}, FieldDtypeError, "image"),
        ({"image": np.zeros((2, 3), np.uint8)}, FieldNameError, "fields image; expected image, label"),
    ],
)
def test_read_into_casts_nothing_and_says_what_does_not_fit(sample, error, message):
    cache = DecodedCache([sample], ROOM)
    out = row_like({"image": np.zeros((2, 3), np.uint8)})
    for _ in range(2):
        with pytest.raises(error, match=f"^sample 0.*{message}"):
            cache.read_into(0, out)


# -- a crop behind the cache


CROP = RandomResizedCrop(24, flip=0.5)


@pytest.fixture
def png_folder(tmp_path):
    for index in range(6):
        (tmp_path / "a").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 60, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "a" / f"{index}.png"), pixels)
    return tmp_path


def test_a_crop_behind_the_cache_sees_what_the_datasets_own_would(png_folder):
    plain = ImageFolder(png_folder, crop=CROP)
    cache = DecodedCache(ImageFolder(png_folder), ROOM, crop=CROP)
    for epoch in range(3):
        for index in range(6):
            seen = []
            for dataset in (plain, cache):
                enter_sample(0, epoch, index)
                seen.append(dataset[index])
                enter_sample(0, epoch, index)
                row = {"image": np.empty((24, 24, 3), np.uint8), "label": np.empty((), np.int64)}
                dataset.read_into(index, row)
                np.testing.assert_array_equal(row["image"], seen[-1]["image"])
            np.testing.assert_array_equal(seen[0]["image"], seen[1]["image"])
            assert seen[0]["label"] == seen[1]["label"] == 0
    assert cache.hit_rate == 30 / 36
    leave_sample()


def test_a_transform_comes_behind_the_crop(png_folder):
    shapes = []
    cache = DecodedCache(
        ImageFolder(png_folder),
        ROOM,
        lambda sample: shapes.append(sample["image"].shape) or sample,
        crop=Resize((5, 7)),
    )
    for _ in range(2):
        cache[0]["image"][...] = 0  # the reader's own
        assert cache[0]["image"].any()
    assert set(shapes) == {(5, 7, 3)}


def test_samples_without_pixels_to_crop_are_refused_by_name():
    with pytest.raises(
        FieldNameError, match=r'sample 1.*crop= needs samples with a uint8 "image" of shape \(H, W, 3\)'
    ):
        DecodedCache([{"image": np.zeros((4, 4), np.uint8)}] * 2, ROOM, crop=Resize((5, 7)))[1]
    with pytest.raises(FieldNameError, match=r"sample 0.*crop="):
        DecodedCache([(np.zeros((4, 4, 3), np.uint8), 1)], ROOM, crop=Resize((5, 7)))[0]


def test_a_crop_without_one_size_is_applied_in_a_loader_too(png_folder):
    plain = DataLoader(ImageFolder(png_folder, crop=Resize(8)), fields={"image": Field(ragged=True)})
    kept = DataLoader(DecodedCache(ImageFolder(png_folder), ROOM, crop=Resize(8)), fields={"image": Field(ragged=True)})
    for _ in range(2):
        for expected, seen in zip(plain, kept, strict=True):
            assert list(seen) == ["image", "label"]
            assert seen["image"][0].shape[0] == 8
            np.testing.assert_array_equal(seen["image"][0], expected["image"][0])


def test_a_random_crop_behind_one_cache_is_refused_in_front_of_another(png_folder):
    with pytest.raises(DatasetError, match="random crop"):
        DecodedCache(DecodedCache(ImageFolder(png_folder), ROOM, crop=CROP), ROOM)
