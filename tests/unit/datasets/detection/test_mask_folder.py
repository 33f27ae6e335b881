"""MaskFolder: pictures and masks matched by name, masks as stored."""

from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
from PIL import Image
from support.annotated import HEIGHT, WIDTH, write_picture

from loaders import Albumentations, DataLoader, DatasetError, DecodeError, MaskFolder
from loaders.errors import FieldShapeError

MASK = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Pictures a, b and sub/c with masks of grey values."""
    for number, name in enumerate(("a", "b", "sub/c")):
        write_picture(tmp_path / "images" / f"{name}.jpg", value=number)
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "masks" / f"{name}.png"), MASK + np.uint8(number))
    return tmp_path / "images", tmp_path / "masks"


def test_a_mask_belongs_to_the_picture_of_its_name_and_is_as_stored(folders):
    dataset = MaskFolder(*folders)
    assert len(dataset) == 3
    for index, name in enumerate(("a.jpg", "b.jpg", "sub/c.jpg")):
        assert dataset.describe(index) == str(folders[0] / name)
        np.testing.assert_array_equal(dataset[index]["mask"], MASK + np.uint8(index))
        assert dataset[index]["image"].shape == (HEIGHT, WIDTH, 3)
    assert "3 images" in repr(dataset)


def test_names_choose_pictures_and_their_order(folders):
    dataset = MaskFolder(*folders, names=["sub/c", "a"])
    assert [dataset.describe(index) for index in range(2)] == [
        str(folders[0] / name) for name in ("sub/c.jpg", "a.jpg")
    ]
    with pytest.raises(DatasetError, match=r"none\": there is no such picture"):
        MaskFolder(*folders, names=["a", "none"])


def test_a_palette_keeps_its_indices_and_16_bits_keep_theirs(folders):
    image = Image.fromarray(MASK, "L")
    image.putpalette([(7 * n) % 256 for n in range(768)])
    image.save(folders[1] / "a.png")
    cv2.imwrite(str(folders[1] / "b.png"), MASK.astype(np.uint16) * 257)
    dataset = MaskFolder(*folders)
    np.testing.assert_array_equal(dataset[0]["mask"], MASK)
    np.testing.assert_array_equal(dataset[1]["mask"], MASK.astype(np.uint16) * 257)


def test_a_suffix_is_part_of_the_masks_name(folders):
    for path in list(folders[1].rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert len(MaskFolder(*folders, suffix="_mask")) == 3
    with pytest.raises(DatasetError, match="the picture has no mask"):
        MaskFolder(*folders)


def test_a_size_that_differs_names_both_files(folders):
    cv2.imwrite(str(folders[1] / "b.png"), MASK[1:])
    with pytest.raises(FieldShapeError, match="40 x 29 pixels, the picture 40 x 30") as told:
        MaskFolder(*folders)[1]
    assert str(folders[0] / "b.jpg") in str(told.value)
    assert str(folders[1] / "b.png") in str(told.value)


def test_colours_and_damage_are_refused_by_name(folders):
    dataset = MaskFolder(*folders)
    cv2.imwrite(str(folders[1] / "a.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(DecodeError, match=r"masks/a\.png\"\): the PNG has colours"):
        dataset[0]
    content = (folders[1] / "b.png").read_bytes()
    for cut in (0, 20, len(content) // 2, len(content) - 5):
        (folders[1] / "b.png").write_bytes(content[:cut])
        with pytest.raises(DecodeError, match=r"sample 1 .*masks/b\.png"):
            dataset[1]
    (folders[1] / "b.png").write_bytes((folders[0] / "b.jpg").read_bytes())
    with pytest.raises(DecodeError, match="must be a PNG"):
        dataset[1]


def test_files_without_a_partner_are_refused_or_left_out_and_counted(folders):
    (folders[0] / "a.jpg").unlink()
    (folders[1] / "b.png").unlink()
    with pytest.raises(DatasetError, match="2 entries") as told:
        MaskFolder(*folders)
    assert f'"{folders[1] / "a.png"}": the mask has no picture' in str(told.value)
    dataset = MaskFolder(*folders, on_bad="drop")
    assert dataset.problems.counts == {"missing image": 1, "missing mask": 1}
    assert [dataset.describe(0)] == [str(folders[0] / "sub/c.jpg")]


def test_folders_without_pairs_or_with_two_files_of_a_name_are_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="has no picture with a mask"):
        MaskFolder(folders[0], tmp_path / "empty", on_bad="drop")
    with pytest.raises(DatasetError, match="nowhere"):
        MaskFolder(tmp_path / "nowhere", folders[1])
    write_picture(folders[0] / "a.bmp")
    with pytest.raises(DatasetError, match=r"a\.bmp\" and .*a\.jpg\" have the same name"):
        MaskFolder(*folders)


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_and_mask_go_through_a_pipeline_together(folders, workers):
    dataset = MaskFolder(*folders, Albumentations(A.Compose([A.Crop(5, 5, 25, 15), A.HorizontalFlip(p=1)])))
    batch = next(iter(DataLoader(dataset, 3, num_workers=workers)))
    assert batch["image"].shape == (3, 10, 20, 3)
    np.testing.assert_array_equal(batch["mask"][0].numpy(), MASK[5:15, 24:4:-1])
