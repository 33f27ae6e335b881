"""YoloDetection: layouts, descriptions, the kinds of lines, and what is done about entries that cannot be used."""

from __future__ import annotations

import os

import albumentations as A
import cv2
import numpy as np
import pytest
from support.annotated import HEIGHT, WIDTH, write_picture, write_yolo
from torch.utils.data import Subset

from loaders import Albumentations, DataLoader, DatasetError, DecodedCache, RandomResizedCrop, YoloDetection
from loaders.errors import FieldShapeError

BOX = "1 0.5 0.5 0.2 0.4\n"
OUTLINE = "0 0.25 0.2 0.75 0.2 0.75 0.6 0.25 0.6\n"


def test_a_sample_has_boxes_in_pixels_of_its_picture(tmp_path):
    write_yolo(tmp_path, {"a": f"{BOX}\n0 0.1 0.1 0.2 0.2\n", "b": "", "c": None})
    write_picture(tmp_path / "images/train/a.png", 100, 50)
    dataset = YoloDetection(tmp_path, "train")
    assert dataset.classes == ["cat", "dog"]
    assert len(dataset) == 3
    sample = dataset[0]
    assert list(sample) == ["image", "boxes", "labels"]
    np.testing.assert_allclose(sample["boxes"], [[40, 15, 60, 35], [0, 0, 20, 10]], atol=1e-4)
    assert sample["boxes"].dtype == np.float32
    assert sample["labels"].tolist() == [1, 0]
    for index in (1, 2):  # an empty file of labels, and none
        assert dataset[index]["boxes"].shape == (0, 4)
    assert dataset.describe(2) == str(tmp_path / "images/train/c.png")
    assert not len(dataset.problems)


def test_an_outline_has_the_box_around_it_and_a_mask(tmp_path):
    dataset = YoloDetection(write_yolo(tmp_path, {"a": OUTLINE, "b": ""}), "train", masks=True)
    sample = dataset[0]
    np.testing.assert_allclose(sample["boxes"], [[10, 6, 30, 18]], atol=1e-4)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[6:18, 10:30] = 1
    np.testing.assert_array_equal(sample["masks"], expected[None])
    assert dataset[1]["masks"].shape == (0, HEIGHT, WIDTH)
    assert "masks" not in YoloDetection(tmp_path, "train")[0]


@pytest.mark.parametrize("columns", [2, 3])
def test_keypoints_come_with_their_visibility(tmp_path, columns):
    point = "0.25 0.5" + " 1" * (columns == 3)
    write_yolo(
        tmp_path,
        {"a": f"0 0.5 0.5 1 1 {point} {point}"},
        yaml=f"names: {{0: cat}}\ntrain: images/train\nkpt_shape: [2, {columns}]",
    )
    dataset = YoloDetection(tmp_path, "train")
    visibility = 1 if columns == 3 else 2
    np.testing.assert_allclose(dataset[0]["keypoints"], [[10, 15, visibility]] * 2)
    assert dataset[0]["keypoint_labels"].tolist() == [[0, 0], [0, 1]]


LAYOUTS = {
    "the description of the folder": (("images/train", "labels/train"), "names: [cat, dog]\ntrain: images/train", ""),
    "a path in it": (("d/images/train", "d/labels/train"), "names: [cat, dog]\npath: d\ntrain: images/train", ""),
    "a path of elsewhere": (
        ("images/train", "labels/train"),
        "names: [cat, dog]\npath: /no/w\ntrain: images/train",
        "",
    ),
    "several folders": (("images/x", "labels/x"), "names: [cat, dog]\ntrain: [images/x, images/y]", "images/y/b.png"),
    "a path that leaves the folder": (
        ("train/images", "train/labels"),
        "names: [cat, dog]\ntrain: ../train/images",
        "",
    ),
    "no entry for the split": (("train/images", "train/labels"), "names: [cat, dog]", ""),
    "no entry, the other way": (("images/train", "labels/train"), "names: [cat, dog]", ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("by_file", [False, True])
def test_the_usual_layouts_are_found(tmp_path, name, by_file):
    (images, labels), yaml, more = LAYOUTS[name]
    write_picture(tmp_path / images / "a.png")
    if more:
        write_picture(tmp_path / more)
    (tmp_path / labels).mkdir(parents=True)
    (tmp_path / labels / "a.txt").write_text(BOX)
    (tmp_path / "data.yaml").write_text(yaml)
    dataset = YoloDetection(tmp_path / "data.yaml" if by_file else tmp_path, "train")
    assert len(dataset) == 1 + bool(more)
    assert dataset[0]["labels"].tolist() == [1]


def test_without_a_split_all_pictures_count_and_classes_may_be_given(tmp_path):
    write_yolo(tmp_path, {"a": BOX, "b": ""}, yaml=None)
    write_picture(tmp_path / "images/val/c.png")
    (tmp_path / "labels/val").mkdir()
    (tmp_path / "labels/val/c.txt").touch()
    dataset = YoloDetection(tmp_path, classes=["x", "y"])
    assert (len(dataset), dataset.classes) == (3, ["x", "y"])
    assert len(YoloDetection(tmp_path, "val", classes=["x", "y"])) == 1


def test_a_list_of_pictures_is_a_split(tmp_path):
    write_yolo(tmp_path, {"a": BOX, "b": BOX}, yaml="names: [cat, dog]\ntrain: train.txt")
    (tmp_path / "train.txt").write_text("./images/train/b.png\n\n")
    dataset = YoloDetection(tmp_path, "train")
    assert [dataset.describe(0)] == [str(tmp_path / "images/train/b.png")]
    assert not len(dataset.problems)  # the labels of a belong to another list
    (tmp_path / "train.txt").write_text("images/train/b.png\nimages/train/none.png\n")
    with pytest.raises(DatasetError, match=r"none\.png\": the picture that a list"):
        YoloDetection(tmp_path, "train")
    assert YoloDetection(tmp_path, "train", on_bad="drop").problems.counts == {"missing image": 1}


def test_boxes_are_clipped_and_those_without_area_left_out_and_both_are_counted(tmp_path):
    lines = "0 0 0 0.2 0.2\n0 0.5 0.5 0 0.1\n0 1.5 0.5 0.1 0.1\n0 0.5 0.5 1.000001 1\n"
    dataset = YoloDetection(write_yolo(tmp_path, {"a": lines}), "train")
    np.testing.assert_allclose(dataset[0]["boxes"], [[0, 0, 4, 3], [0, 0, 40, 30]], atol=1e-4)
    assert dataset.problems.counts == {"clipped box": 1, "box without area": 1, "box outside the picture": 1}
    assert dataset.problems.listed[0].entry == "line 1"


BAD = {
    "text": ("hello world", "malformed entry", "'hello' is not a number"),
    "NaN": ("0 nan 0.5 0.1 0.1", "malformed entry", "'nan' is not a number"),
    "infinity": ("0 0.5 0.5 inf 0.1", "malformed entry", "'inf' is not"),
    "a number of pixels": ("0 320 240 99999 10", "malformed entry", "'99999' is not"),
    "an underscore": ("0 0_5 0.5 0.1 0.1", "malformed entry", "'0_5' is not"),
    "other digits": ("0 \u0660.\u0665 0.5 0.1 0.1", "malformed entry", "is not a number"),
    "a class of a fraction": ("0.5 0.5 0.5 0.1 0.1", "malformed entry", "the class is 0.5"),
    "an unknown class": ("2 0.5 0.5 0.1 0.1", "unknown category", "there is no class 2; there are 2"),
    "a negative class": ("-1 0.5 0.5 0.1 0.1", "unknown category", "there is no class -1"),
    "a class alone": ("0", "malformed entry", "1 numbers; expected a class and a box"),
    "three numbers": ("0 0.5 0.5 0.1", "malformed entry", "4 numbers; expected"),
    "a confidence": ("0 0.5 0.5 0.1 0.1 0.9", "malformed entry", "6 numbers; expected"),
    "an odd outline": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "malformed entry", "8 numbers; expected"),
    "a negative width": ("0 0.5 0.5 -0.1 0.1", "malformed entry", "none below 0"),
    "a comma": ("0, 0.5, 0.5, 0.1, 0.1", "malformed entry", "'0,' is not a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used_is_refused_by_name_or_dropped_and_counted(tmp_path, name):
    line, kind, what = BAD[name]
    write_yolo(tmp_path, {"a": f"{BOX}{line}\n{BOX}", "b": BOX})
    with pytest.raises(DatasetError, match=what) as told:
        YoloDetection(tmp_path, "train")
    assert f'"{tmp_path / "labels/train/a.txt"}", line 2' in str(told.value)
    dataset = YoloDetection(tmp_path, "train", on_bad="drop")
    assert dataset.problems.counts == {kind: 1}
    assert dataset[0]["labels"].tolist() == [1, 1]


def test_a_box_without_an_outline_has_no_mask(tmp_path):
    write_yolo(tmp_path, {"a": BOX + OUTLINE})
    with pytest.raises(DatasetError, match="a box and no outline"):
        YoloDetection(tmp_path, "train", masks=True)
    assert YoloDetection(tmp_path, "train", masks=True, on_bad="drop")[0]["labels"].tolist() == [0]


@pytest.mark.parametrize("content", [b"\xff\xfe0 0.5", b"\x80garbage"])
def test_a_picture_whose_labels_are_no_text_is_refused_or_left_out(tmp_path, content):
    write_yolo(tmp_path, {"a": BOX, "b": BOX})
    (tmp_path / "labels/train/a.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.txt\": 'utf-8' codec"):
        YoloDetection(tmp_path, "train")
    dataset = YoloDetection(tmp_path, "train", on_bad="drop")
    assert [dataset.describe(0)] == [str(tmp_path / "images/train/b.png")]  # not a picture without objects


def test_labels_without_a_picture_are_counted_but_not_a_list_of_names(tmp_path):
    write_yolo(tmp_path, {"a": BOX})
    (tmp_path / "labels/train/classes.txt").write_text("cat\ndog\n")
    YoloDetection(tmp_path, "train")
    (tmp_path / "labels/train/lost.txt").write_text(BOX)
    with pytest.raises(DatasetError, match=r"lost\.txt\": there is no picture"):
        YoloDetection(tmp_path, "train")
    assert YoloDetection(tmp_path, "train", on_bad="drop").problems.counts == {"missing image": 1}


DESCRIPTIONS = {
    "no YAML": ("names: [cat", "cannot be read as YAML"),
    "a list": ("- cat", "holds a list"),
    "nothing": ("", "holds a NoneType"),
    "no names": ("train: images/train", "names is missing"),
    "names of a number": ("names: 3", "names is 3"),
    "names with a hole": ("names: {0: cat, 2: dog}", "names is"),
    "names of lists": ("names: [[cat]]", "a text for each class"),
    "keypoints of text": ("names: [cat]\nkpt_shape: many", "kpt_shape is 'many'"),
    "keypoints of four": ("names: [cat]\nkpt_shape: [17, 4]", "kpt_shape is"),
    "a split of a number": ("names: [cat]\ntrain: 5", "train is"),
    "a split that is gone": ("names: [cat]\ntrain: pictures", '"pictures" does not exist'),
    "an object": ("names: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_is_none_is_refused_by_name(tmp_path, name):
    yaml, what = DESCRIPTIONS[name]
    write_yolo(tmp_path, {"a": BOX}, yaml=yaml)
    with pytest.raises(DatasetError, match=what) as told:
        YoloDetection(tmp_path, "train")
    assert "data.yaml" in str(told.value)


def test_aliases_of_a_description_do_not_multiply(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    write_yolo(tmp_path, {"a": BOX}, yaml="\n".join([*lines, "names: *a11", "train: images/train"]))
    with pytest.raises(DatasetError, match="a text for each class"):
        YoloDetection(tmp_path, "train")


@pytest.mark.parametrize(
    ("split", "yaml", "what"),
    [
        ("train", None, "the names of its classes are unknown"),
        ("test", "names: [a]", "says nothing of the split 'test'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, split, yaml, what):
    write_yolo(tmp_path, {"a": BOX}, yaml=yaml)
    with pytest.raises(DatasetError, match=what):
        YoloDetection(tmp_path, split)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        YoloDetection(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_delivers_boxes_through_a_pipeline(tmp_path, workers):
    write_yolo(tmp_path, {"a": BOX * 3, "b": "", "c": BOX})
    pipeline = A.Compose([A.Resize(60, 80)], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
    for name, size in (("a", (20, 10)), ("b", (7, 9))):
        write_picture(tmp_path / f"images/train/{name}.png", *size)
    dataset = YoloDetection(tmp_path, "train", Albumentations(pipeline))
    batch = next(iter(DataLoader(dataset, 3, num_workers=workers, fields=dataset.ragged_fields)))
    assert batch["image"].shape == (3, 60, 80, 3)
    assert [len(each) for each in batch["boxes"]] == [3, 0, 1]
    np.testing.assert_allclose(batch["boxes"][2].numpy(), [[32, 18, 48, 42]], atol=1e-3)
    assert cv2.imread(str(tmp_path / "images/train/a.png")).shape == (10, 20, 3)


def test_pictures_whose_labels_are_nowhere_are_no_pictures_without_objects(tmp_path):
    write_picture(tmp_path / "train/a.png")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text(BOX)  # would belong to images/train
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: train")
    with pytest.raises(DatasetError, match=r"none of the 1 pictures .* would be .*train/a\.txt"):
        YoloDetection(tmp_path, "train")


def test_folders_above_the_dataset_are_not_taken_for_its_folder_of_images(tmp_path):
    root = tmp_path / "images" / "coco"
    write_picture(root / "train/a.png")
    (root / "train/a.txt").write_text(BOX)
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: train")
    assert YoloDetection(root, "train")[0]["labels"].tolist() == [1]


def test_keypoints_outside_the_picture_are_not_labelled_and_counted(tmp_path):
    write_yolo(
        tmp_path,
        {"a": "0 0.5 0.5 1 1 0.5 0.5 2 1 0.5 2"},
        yaml="names: [cat]\ntrain: images/train\nkpt_shape: [2, 3]",
    )
    dataset = YoloDetection(tmp_path, "train")
    assert dataset[0]["keypoints"].tolist() == [[WIDTH / 2, HEIGHT / 2, 2], [0, 0, 0]]
    assert dataset.problems.counts == {"keypoint outside the picture": 1}


def test_names_and_numbers_of_classes_are_taken_as_they_are_written(tmp_path):
    write_yolo(tmp_path, {"a": "12000 0.5 0.5 0.2 0.4"}, yaml="names: [on, off]\ntrain: images/train")
    with pytest.raises(DatasetError, match="put the name in quotes"):
        YoloDetection(tmp_path, "train")
    with pytest.raises(TypeError, match="expected a list of names"):
        YoloDetection(tmp_path, "train", classes="cat")
    assert YoloDetection(tmp_path, "train", classes=list(map(str, range(12_001))))[0]["labels"].tolist() == [12_000]


def test_a_pipe_in_place_of_labels_is_refused_without_waiting_for_a_writer(tmp_path):
    write_yolo(tmp_path, {"a": BOX, "b": None})
    os.mkfifo(tmp_path / "labels/train/b.txt")
    with pytest.raises(DatasetError, match="a pipe or a device"):
        YoloDetection(tmp_path, "train")


def test_masks_without_the_boxes_that_a_transform_has_dropped_are_an_error(tmp_path):
    write_yolo(tmp_path, {"a": OUTLINE + "1 0 0 0.1 0 0.1 0.1\n"})
    crop = A.Compose([A.Crop(8, 4, 32, 20)], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
    forgotten = YoloDetection(tmp_path, "train", Albumentations(crop), masks=True)
    with pytest.raises(FieldShapeError, match=r'field "masks": 2 rows for 1 boxes.*\n.*box_rows='):
        forgotten[0]
    sample = YoloDetection(tmp_path, "train", Albumentations(crop, box_rows="masks"), masks=True)[0]
    assert len(sample["masks"]) == len(sample["boxes"]) == 1


def test_a_cache_crops_no_picture_without_its_boxes(tmp_path):
    dataset = YoloDetection(write_yolo(tmp_path, {"a": BOX}), "train")
    with pytest.raises(DatasetError, match="not its boxes or masks"):
        DecodedCache(Subset(dataset, [0]), 1 << 20, crop=RandomResizedCrop(8))
    assert len(DecodedCache(dataset, 1 << 20)[0]["boxes"]) == 1
