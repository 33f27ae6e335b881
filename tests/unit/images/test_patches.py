"""RandomPatches: windows of photos as samples, or stacked in one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from support.photo_zoo import encode, exif, jpeg, photo, with_exif, zoo

from loaders import DataLoader, DecodeError, ImageFiles, ImageFolder, RandomPatches, read_image
from loaders.errors import FieldShapeError
from loaders.images.decode.image import EncodedImage
from loaders.randomness.streams import enter_sample, leave_sample

FILES = {
    "prepared": jpeg(photo(), "420", restart=3),
    "prepared, turned": with_exif(jpeg(photo(), "422", restart=1), exif(6)),
    "plain": jpeg(photo()),
    "progressive": jpeg(photo(), progressive=True),
    "png": encode(".png", photo()),
}


def places(whole, patch):
    """Where in the whole picture a patch is found."""
    height, width = patch.shape[:2]
    views = np.lib.stride_tricks.sliding_window_view(whole[..., 0], (height, width))
    found = np.argwhere((views == patch[..., 0]).all(axis=(2, 3)))
    return [
        (top, left) for top, left in found.tolist() if (whole[top : top + height, left : left + width] == patch).all()
    ]


@pytest.fixture
def folder(tmp_path):
    """Two classes with three prepared photos each, of sizes of their own."""
    for kind, name in enumerate(("cat", "coffee")):
        for number in range(3):
            path = tmp_path / str(kind) / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(jpeg(photo(131 + 16 * number, 97, name), restart=1))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_patch_is_a_part_of_the_photo_to_the_bit(name, stacked):
    data, whole, seen = FILES[name], read_image(FILES[name]), set()
    crop = RandomPatches((20, 30), 4, stacked=stacked)
    for _ in range(10):
        result = crop.read(data)
        assert result.shape == ((4, 20, 30, 3) if stacked else (20, 30, 3))
        for patch in result if stacked else (result,):
            found = places(whole, patch)
            assert found
            seen.add(found[0])
    assert len(seen) > 5


def test_all_places_are_as_likely_and_the_corners_are_reached():
    crop, rng = RandomPatches((5, 7)), np.random.default_rng(0)
    regions = [crop.region(9, 8, rng) for _ in range(3000)]
    counts = {}
    for region in regions:
        assert region.is_inside(9, 8)
        assert (region.width, region.height) == (7, 5)
        counts[region[:2]] = counts.get(region[:2], 0) + 1
    assert len(counts) == 3 * 4
    assert min(counts.values()) > 180  # of 250 expected


def test_a_patch_may_be_all_of_the_photo():
    np.testing.assert_array_equal(RandomPatches((97, 131)).read(FILES["prepared"]), read_image(FILES["prepared"]))


@pytest.mark.parametrize("size", [(98, 131), (97, 132), 500])
@pytest.mark.parametrize("name", FILES)
def test_a_photo_without_room_for_a_patch_is_named(name, size, tmp_path):
    path = tmp_path / "small.jpg"
    path.write_bytes(FILES["plain"] if "turned" in name else FILES[name])
    with pytest.raises(
        FieldShapeError, match=r'sample 7 \(".*small\.jpg"\), field "image": 131 x 97 pixels cannot hold'
    ) as told:
        RandomPatches(size).read(path, index=7)
    assert (told.value.index, told.value.field) == (7, "image")
    assert told.value.source.endswith("small.jpg")


def test_a_damaged_photo_is_named():
    with pytest.raises(DecodeError, match="cut short"):
        RandomPatches(8, 2, stacked=True).read(FILES["prepared"][:-300])


@pytest.mark.parametrize(("name", "decoded"), [("png", 1), ("progressive", 1), ("prepared", 4)])
def test_stacked_patches_of_what_is_only_decoded_whole_share_one_decoding(name, decoded, monkeypatch):
    asked, read = [], EncodedImage.read
    monkeypatch.setattr(EncodedImage, "read", lambda *arguments: asked.append(arguments) or read(*arguments))
    RandomPatches(16, 4, stacked=True).read(FILES[name], backend="restarts")
    assert len(asked) == decoded


def test_patches_are_written_where_they_are_wanted_and_nowhere_else():
    crop = RandomPatches(16, 3, stacked=True)
    rows = np.full((2, *crop.shape, 3), 7, np.uint8)
    assert crop.read(FILES["prepared"], rows[1, ...]) is not None
    assert (rows[0] == 7).all()
    assert all(places(read_image(FILES["prepared"]), patch) for patch in rows[1])
    for out in (np.zeros((16, 16, 3), np.uint8), np.zeros((3, 16, 16, 3))):
        with pytest.raises(ValueError, match=r"the crop gives uint8 of shape \(3, 16, 16, 3\)"):
            crop.read(FILES["prepared"], out)


@pytest.mark.parametrize(("arguments", "told"), [((0,), "size 0"), ((8, 0), "per_photo=0"), ((("a", 2),), "size")])
def test_what_makes_no_sense_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        RandomPatches(*arguments)


def test_a_dataset_has_as_many_samples_as_patches(folder):
    dataset = ImageFolder(folder, crop=RandomPatches(24, per_photo=5))
    assert len(dataset) == 30
    assert repr(dataset).endswith("6 images, 5 samples of each, 2 classes: 0, 1)")
    for index in (0, 4, 5, 14, 15, 29, -1):
        sample, file = dataset[index], dataset.paths[index % 30 // 5]
        assert dataset.describe(index) == file
        assert sample["label"] == index % 30 // 15
        assert places(read_image(file), sample["image"])
    with pytest.raises(IndexError):
        dataset[30]


def test_stacked_patches_are_one_sample(folder):
    dataset = ImageFiles(ImageFolder(folder).paths, crop=RandomPatches((24, 16), per_photo=5, stacked=True))
    assert len(dataset) == 6
    assert dataset[1]["image"].shape == (5, 24, 16, 3)
    with pytest.raises(ValueError, match="leave stacked= out"):
        ImageFiles(dataset.paths, crop=dataset.crop, normalize=((0.5,) * 3, (0.2,) * 3))


@pytest.mark.parametrize("stacked", [False, True])
def test_patches_depend_on_the_seed_and_not_on_the_workers(folder, stacked):
    dataset = ImageFolder(folder, crop=RandomPatches(24, per_photo=4, stacked=stacked))

    def epoch(seed, **options):
        loader = DataLoader(dataset, batch_size=3, shuffle=True, seed=seed, **options)
        return np.concatenate([batch["image"].numpy().copy() for batch in loader])

    one = epoch(0)
    assert one.shape == ((6, 4, 24, 24, 3) if stacked else (24, 24, 24, 3))
    np.testing.assert_array_equal(one, epoch(0, num_workers=2))
    assert (one != epoch(1)).any()
    flat = one.reshape(-1, 24 * 24 * 3)
    assert len(np.unique(flat, axis=0)) == len(flat)


def test_normalized_patches_are_planes(folder):
    dataset = ImageFolder(folder, crop=RandomPatches(24, 2), normalize=((0.5,) * 3, (0.25,) * 3))
    assert len(dataset) == 12
    assert dataset[3]["image"].shape == (3, 24, 24)
    assert dataset[3]["image"].dtype == np.float32


def test_a_crop_can_be_pickled_and_draws_from_the_samples_key():
    crop = pickle.loads(pickle.dumps(RandomPatches(8, 2, stacked=True)))
    parts = []
    for key in (1, 1, 2):
        enter_sample(0, 0, key)
        parts.append(crop.read(zoo()["jpeg 420 restarts"]))
        leave_sample()
    assert (parts[0] == parts[1]).all()
    assert (parts[0] != parts[2]).any()
