"""`crop=` and `normalize=` of ImageFolder and ImageFiles: what samples are, and where loaders have them written."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from support.photo_zoo import jpeg, photo, zoo

from loaders import (
    CenterCrop,
    DataLoader,
    DecodeError,
    Field,
    ImageFiles,
    ImageFolder,
    RandomResizedCrop,
    Resize,
    read_image,
)
from loaders.datasets.image_samples import ImageSamples
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError
from loaders.randomness.streams import enter_sample, leave_sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOS = (
    "jpeg 420",
    "jpeg exif 6",
    "jpeg grey",
    "jpeg cmyk",
    "png alpha",
    "jpeg 444 progressive",
    "webp",
    "png 16 bit",
)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(PHOTOS):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.{'jpg' if 'jpeg' in name else 'png'}").write_bytes(zoo()[name])
    return tmp_path / "photos"


def flip(sample):
    return {**sample, "image": cv2.flip(sample["image"], 1)}


def planes(image):
    return np.moveaxis(((image / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32), 2, 0)


def loaded(dataset, **options):
    options = {"batch_size": 4, "seed": 5, **options}
    return {name: torch.cat([batch[name] for batch in DataLoader(dataset, **options)]) for name in ("image", "label")}


def by_hand(dataset):
    """The samples as indexing gives them, with the randomness they have in the first epoch of `loaded`."""
    samples = []
    for position in range(len(dataset)):
        enter_sample(5, 0, position)
        samples.append(dataset[position])
    leave_sample()
    return {name: np.stack([np.asarray(sample[name]) for sample in samples]) for name in ("image", "label")}


def test_a_sample_is_the_crop_and_the_transform_comes_behind_it(root):
    seen = []
    dataset = ImageFolder(root, lambda sample: seen.append(sample["image"].shape) or flip(sample), crop=CenterCrop(24))
    image = dataset[0]["image"]
    np.testing.assert_array_equal(image, cv2.flip(CenterCrop(24).read(dataset.paths[0]), 1))
    assert (seen, image.dtype) == ([(24, 24, 3)], np.uint8)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}])
@pytest.mark.parametrize("transform", [None, flip])
@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_every_engine_gives_the_bits_of_indexing(root, workers, transform, normalize):
    dataset = ImageFolder(root, transform, crop=RandomResizedCrop((24, 30)), normalize=normalize)
    expected, found = by_hand(dataset), loaded(dataset, **workers)
    np.testing.assert_array_equal(found["image"].numpy(), expected["image"])
    assert found["label"].tolist() == expected["label"].tolist()
    assert len({image.tobytes() for image in expected["image"]}) == len(dataset)


def test_normalised_images_are_the_formula_of_the_transformed_crop(root):
    dataset = ImageFolder(root, flip, crop=CenterCrop(24), normalize=(MEAN, STD))
    plain = ImageFolder(root, flip, crop=CenterCrop(24))
    for index in range(len(dataset)):
        image = dataset[index]["image"]
        assert (image.dtype, image.shape) == (np.float32, (3, 24, 24))
        np.testing.assert_array_equal(image, planes(plain[index]["image"]))


def test_whole_images_can_be_normalised_too(root):
    dataset = ImageFolder(root, normalize=(MEAN, STD))
    np.testing.assert_array_equal(dataset[0]["image"], planes(read_image(dataset.paths[0])))


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, False),
        ({"transform": flip}, False),
        ({"crop": CenterCrop(24)}, True),
        ({"crop": CenterCrop(24), "transform": flip}, False),
        ({"crop": Resize(24)}, False),
        ({"crop": Resize((24, 24))}, True),
        ({"crop": CenterCrop(24), "transform": flip, "normalize": (MEAN, STD)}, True),
    ],
)
def test_rows_are_written_directly_where_that_saves_a_copy(root, options, written):
    assert hasattr(ImageFolder(root, **options), "read_into") is written


@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_loaders_have_the_pixels_written_into_the_row(root, normalize, monkeypatch):
    asked, get = [], ImageSamples.__getitem__
    monkeypatch.setattr(ImageSamples, "__getitem__", lambda self, index: asked.append(index) or get(self, index))
    dataset = ImageFolder(root, crop=CenterCrop(24), normalize=normalize)
    loaded(dataset)
    assert set(asked) == {0}  # the first sample shows what the batch will be


@pytest.mark.parametrize("method", ["__getitem__", "_read"])
@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_what_a_subclass_adds_to_a_sample_is_in_the_batch(root, normalize, method):
    def read(self, index):
        return {**getattr(ImageFolder, method)(self, index), "square": index * index}

    kind = type("Squares", (ImageFolder,), {method: read})
    dataset = kind(root, crop=CenterCrop(24), normalize=normalize)
    found = [value for batch in DataLoader(dataset, 4) for value in batch["square"].tolist()]
    assert found == [index * index for index in range(8)]


def test_a_row_is_filled_and_nothing_beside_it(root):
    dataset = ImageFolder(root, crop=CenterCrop(24))
    rows = {"image": np.full((3, 24, 24, 3), 7, np.uint8), "label": np.full(3, -1)}
    dataset.read_into(-1, {name: array[1, ...] for name, array in rows.items()})
    np.testing.assert_array_equal(rows["image"][1], dataset[-1]["image"])
    assert (rows["image"][[0, 2]] == 7).all()
    assert rows["label"].tolist() == [-1, dataset[-1]["label"], -1]
    with pytest.raises(IndexError, match="out of range"):
        dataset.read_into(len(dataset), rows)


@pytest.mark.parametrize(
    "labels",
    [
        None,
        np.eye(8, dtype=np.float32),
        np.arange(8, dtype=np.uint8),
        list("abcdefgh"),
        [np.ones((count, 4)) for count in range(8)],
    ],
)
def test_labels_of_any_kind_go_with_crops(root, labels):
    paths = ImageFolder(root).paths
    dataset, plain = (
        ImageFiles(paths, labels, crop=CenterCrop(24), transform=t) for t in (None, lambda sample: sample)
    )
    fields = {"label": Field(ragged=True)} if labels is not None and dataset.labels.dtype == object else None
    assert hasattr(dataset, "read_into") is (fields is None)
    for batch, expected in zip(DataLoader(dataset, 4, fields=fields), DataLoader(plain, 4, fields=fields), strict=True):
        assert list(batch) == list(expected)
        assert torch.equal(batch["image"], expected["image"])
        if labels is not None:
            assert type(batch["label"]) is type(expected["label"])
            assert all(np.array_equal(a, b) for a, b in zip(batch["label"], expected["label"], strict=True))


def test_images_of_different_proportions_can_be_ragged(root):
    dataset = ImageFolder(root, crop=Resize(24))
    (batch,) = DataLoader(dataset, 8, fields={"image": Field(ragged=True)})
    assert {tuple(image.shape) for image in batch["image"]} == {(24, 32, 3), (32, 24, 3)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("normalize", [None, (MEAN, STD)])
def test_a_damaged_file_is_named_by_the_loader(tmp_path, workers, normalize):
    (tmp_path / "a").mkdir()
    for number in range(4):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(jpeg(photo()))
    broken = tmp_path / "a" / "2.jpg"
    broken.write_bytes(jpeg(photo())[:900])
    dataset = ImageFolder(tmp_path, crop=RandomResizedCrop(16), normalize=normalize)
    with pytest.raises(DecodeError, match=rf'sample 2 \("{broken}"\): the JPEG is cut short') as caught:
        list(DataLoader(dataset, 4, num_workers=workers))
    assert (caught.value.index, caught.value.source) == (2, str(broken))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda sample: (sample["image"], 3), FieldNameError, "a tuple without one"),
        (lambda sample: {"label": 3}, FieldNameError, "a dict without one"),
        (lambda sample: {"image": sample["image"].astype(np.float32)}, FieldDtypeError, r"float32 \(24, 24, 3\)"),
        (lambda sample: {"image": torch.zeros(3)}, FieldDtypeError, "Tensor"),
        (lambda sample: {"image": sample["image"][..., 0]}, FieldShapeError, r"uint8 \(24, 24\)"),
    ],
)
def test_a_transform_must_leave_what_can_be_normalised(root, transform, error, message):
    dataset = ImageFolder(root, transform, crop=CenterCrop(24), normalize=(MEAN, STD))
    with pytest.raises(
        error, match=rf'^sample 1 \(".*"\), field "image": the transform returned {message}; normalize= needs'
    ):
        dataset[1]


def test_a_transform_that_changes_sizes_is_told_which_sample_does_not_fit(root):
    sizes = iter([20, 20, 22])
    dataset = ImageFolder(
        root,
        lambda sample: {**sample, "image": sample["image"][: next(sizes)]},
        crop=CenterCrop(24),
        normalize=(MEAN, STD),
    )
    with pytest.raises(FieldShapeError, match=r'^sample 2 .*"image": shape \(3, 22, 24\), expected \(3, 20, 24\)'):
        list(DataLoader(dataset, 4))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda sample: {**sample, "label": np.zeros(2)}, FieldDtypeError, '"label": float64, expected int64'),
        (
            lambda sample: {**sample, "label": np.zeros(2, int)},
            FieldShapeError,
            r'"label": shape \(2,\), expected \(\)',
        ),
        (lambda sample: {**sample, "more": 1}, FieldNameError, "fields label, more; expected label"),
    ],
)
def test_nothing_is_cast_into_a_row(root, transform, error, message):
    dataset = ImageFolder(root, transform, crop=CenterCrop(24), normalize=(MEAN, STD))
    with pytest.raises(error, match=rf"^sample 1 .*{message}"):
        dataset.read_into(1, {"image": np.zeros((3, 24, 24), np.float32), "label": np.zeros((), np.int64)})


@pytest.mark.parametrize("crop", [224, "center", CenterCrop])
def test_a_crop_is_a_crop(root, crop):
    with pytest.raises(TypeError, match=r"expected a loaders.Crop, such as loaders.RandomResizedCrop\(224\)"):
        ImageFolder(root, crop=crop)


@pytest.mark.parametrize("normalize", [0.5, (MEAN,), (MEAN, 1), ((0.5,), (0.5,)), (MEAN, (1, 1))])
def test_normalize_is_a_mean_and_a_std(root, normalize):
    with pytest.raises(ValueError, match=r"^normalize=.*: expected \(mean, std\), three numbers each"):
        ImageFolder(root, normalize=normalize)
