"""CocoDetection: what pycocotools reads from the same file, and what is done about entries that cannot be used."""

from __future__ import annotations

import contextlib
import io
import pickle

import albumentations as A
import cv2
import numpy as np
import pytest
from support.annotated import HEIGHT, WIDTH, box, coco, write_coco, write_picture

from loaders import Albumentations, CocoDetection, DataLoader, DatasetError
from loaders.errors import FieldShapeError

SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]


def made(folder, *annotations, content=None, **options):
    file = write_coco(folder, coco(*annotations) if content is None else content)
    return CocoDetection(folder, file, **options)


def test_a_sample_has_the_picture_its_boxes_as_corners_and_labels_from_zero(tmp_path):
    dataset = made(tmp_path, box(20, (1, 2, 3, 4)), box(10), box(20, (0.5, 0.25, 10, 20), 3))
    assert dataset.classes == ["dog", "cat"]  # in the order of their ids
    assert dataset.class_to_idx == {"dog": 0, "cat": 1}
    assert dataset.category_ids.tolist() == [3, 7]
    assert dataset.image_ids.tolist() == [10, 20, 30]
    sample = dataset[1]
    assert list(sample) == ["image", "boxes", "labels", "image_id"]
    assert sample["image"].shape == (HEIGHT, WIDTH, 3)
    assert sample["boxes"].dtype == np.float32
    assert sample["boxes"].tolist() == [[1, 2, 4, 6], [0.5, 0.25, 10.5, 20.25]]
    assert sample["labels"].tolist() == [1, 0]
    assert sample["labels"].dtype == np.int64
    assert sample["image_id"] == 20
    assert dataset.describe(1) == str(tmp_path / "1.png")
    assert repr(dataset) == 'CocoDetection("annotations.json", 3 images, 3 boxes, 2 classes)'


def test_a_sample_is_the_readers_own(tmp_path):
    dataset = made(tmp_path, box())
    dataset[0]["boxes"][:] = 0
    dataset[0]["labels"][:] = 9
    assert dataset[0]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert dataset[0]["labels"].tolist() == [1]


def test_an_image_without_objects_has_no_rows(tmp_path):
    sample = made(tmp_path, masks=True, extras=("ids", "areas"))[2]
    shapes = {name: sample[name].shape for name in ("boxes", "labels", "masks", "ids", "areas")}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, HEIGHT, WIDTH), "ids": (0,), "areas": (0,)}


def shapes_of_all_kinds(rng, count):
    """Segmentations of all three notations, many of them odd."""
    from pycocotools import mask

    found = []
    for number in range(count):
        corners = int(rng.integers(3, 12))
        outline = [
            rng.uniform((-20, -20), (WIDTH + 20, HEIGHT + 20), (corners, 2)),
            np.round(rng.uniform((0, 0), (WIDTH, HEIGHT), (corners, 2)), number % 3),
            np.round(rng.uniform(-5, 45, (corners, 2)) * 2) / 2,
            rng.uniform(-2000, 2000, (corners, 2)),
        ][number % 4]
        polygons = [outline.reshape(-1).tolist()]
        if number % 5 == 0:
            polygons.append(rng.uniform(0, 30, (4, 2)).reshape(-1).tolist())
        found.append(polygons)
        pixels = (rng.random((HEIGHT, WIDTH)) < rng.random()).astype(np.uint8)
        if number % 2:
            pixels = cv2.resize(pixels[:5, :7], (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
        text = mask.encode(np.asfortranarray(pixels))["counts"].decode()
        down = pixels.T.reshape(-1)
        counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(down)) + 1, [down.size]])).tolist()
        found.append({"size": [HEIGHT, WIDTH], "counts": text if number % 3 else [0] * int(down[0]) + counts})
    return found


# Its decoder returns an array whose `__array__` NumPy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_all_is_as_pycocotools_reads_it_from_the_same_file(tmp_path):
    from pycocotools.coco import COCO

    rng = np.random.default_rng(0)
    annotations = [
        box(
            int(rng.choice([10, 20])),
            (*rng.uniform(0, 15, 2), *rng.uniform(1, 15, 2)),
            int(rng.choice([3, 7])),
            segmentation=segmentation,
            iscrowd=int(rng.random() < 0.3),
            area=float(rng.uniform(1, 100)),
            keypoints=[*map(float, rng.uniform(0, 30, 2)), 2, 0, 0, 0, 7, 8, 1],
        )
        for segmentation in shapes_of_all_kinds(rng, 400)
    ]
    content = coco(*annotations)
    content["categories"][0] |= {"keypoints": ["nose", "tail", "paw"], "skeleton": [[1, 2], [2, 3]]}
    dataset = made(tmp_path, content=content, masks=True, keypoints=True, extras=("iscrowd", "ids", "areas"))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(tmp_path / "annotations.json")
    for index, image in enumerate(dataset.image_ids.tolist()):
        sample, entries = dataset[index], theirs.loadAnns(theirs.getAnnIds(image))
        assert len(sample["boxes"]) == len(entries)
        for row, entry in enumerate(entries):
            left, top, width, height = entry["bbox"]
            np.testing.assert_allclose(sample["boxes"][row], [left, top, left + width, top + height], rtol=1e-6)
            assert dataset.classes[sample["labels"][row]] == theirs.loadCats(entry["category_id"])[0]["name"]
            np.testing.assert_array_equal(sample["masks"][row], theirs.annToMask(entry))
            assert (sample["iscrowd"][row], sample["ids"][row]) == (entry["iscrowd"], entry["id"])
            assert sample["areas"][row] == np.float32(entry["area"])
            points = sample["keypoints"].reshape(-1, 3, 3)[row]
            np.testing.assert_allclose(points, np.reshape(entry["keypoints"], (3, 3)), rtol=1e-6)
    assert sum(len(dataset[index]["boxes"]) for index in (0, 1)) == 800
    assert dataset.keypoint_names == ["nose", "tail", "paw"]
    assert dataset.skeleton == [(0, 1), (1, 2)]
    assert not len(dataset.problems)


def test_keypoints_name_their_box_and_their_number(tmp_path):
    content = coco(box(keypoints=[1, 2, 2, 3, 4, 1]), box())
    content["categories"][0]["keypoints"] = ["nose", "tail"]
    sample = made(tmp_path, content=content, keypoints=True)[0]
    assert sample["keypoints"].tolist() == [[1, 2, 2], [3, 4, 1], [0, 0, 0], [0, 0, 0]]
    assert sample["keypoint_labels"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_crowds_are_left_out_unless_a_column_tells_them_apart(tmp_path):
    annotations = box(iscrowd=1), box(bbox=(5, 5, 5, 5))
    assert len(made(tmp_path, *annotations)[0]["boxes"]) == 1
    assert made(tmp_path, *annotations, extras=["iscrowd"])[0]["iscrowd"].tolist() == [1, 0]


def test_boxes_are_clipped_and_those_without_area_left_out_and_both_are_counted(tmp_path):
    dataset = made(
        tmp_path,
        box(bbox=(-5, 2, 10, 4)),
        box(bbox=(35, 25, 100, 100)),
        box(bbox=(3, 3, 0, 5)),
        box(bbox=(50, 3, 5, 5)),
        box(bbox=(30, 20, 10.000001, 10)),  # rounding is no problem
    )
    assert dataset[0]["boxes"].tolist() == [[0, 2, 5, 6], [35, 25, 40, 30], [30, 20, 40, 30]]
    assert dataset.problems.counts == {"clipped box": 2, "box without area": 1, "box outside the picture": 1}
    assert len(dataset.problems) == 4
    first = dataset.problems.listed[0]
    assert first.entry == "annotation 1 of image 10"
    where = f'"{tmp_path / "annotations.json"}", annotation 1 of image 10'
    assert str(first) == f"{where}: the box (-5, 2, 5, 6) is clipped to the picture, (0, 2, 5, 6)"
    assert "4 problems" in repr(dataset)


BAD = {
    "a box of text": (box(bbox=["1", "2", "3", "4"]), "malformed entry", r"bbox is \['1', '2', '3', '4'\]"),
    "a box with a truth value": (box(bbox=[True, 2, 3, 4]), "malformed entry", "expected a list of 4 numbers"),
    "a box of three": (box(bbox=[1, 2, 3]), "malformed entry", "bbox has 3 numbers"),
    "no box": (box() | {"bbox": None}, "malformed entry", "bbox is None"),
    "NaN": (box(bbox=[1, float("nan"), 3, 4]), "malformed entry", "expected finite numbers"),
    "infinity": (box(bbox=[1, 2, float("inf"), 4]), "malformed entry", "expected finite numbers"),
    "a huge number": (box(bbox=[1, 2, 10**400, 4]), "malformed entry", "expected finite numbers"),
    "a box of a kilometre": (box(bbox=[1, 2, 1e9, 4]), "malformed entry", "below 67,108,864"),
    "a negative width": (box(bbox=[9, 2, -3, 4], segmentation=[SQUARE]), "malformed entry", "negative width"),
    "an unknown category": (box(category=99), "unknown category", "there is no category 99"),
    "a category of text": (box(category="cat"), "unknown category", "there is no category 'cat'"),
    "an unknown image": (box(77), "unknown image", "there is no image 77"),
    "an image of a list": (box([10]), "unknown image", r"there is no image \[10\]"),
    "a crowd of text": (box(iscrowd="no"), "malformed entry", "iscrowd is 'no'"),
    "no outline": (box(), "no mask", "it has no segmentation"),
    "a short outline": (box(segmentation=[[1, 2, 3, 4]]), "malformed entry", "a polygon has 4 numbers"),
    "an odd outline": (box(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "malformed entry", "a polygon has 7 numbers"),
    "an outline of text": (box(segmentation=[["a"] * 6]), "malformed entry", "a polygon is"),
    "a flat outline": (box(segmentation=[1, 2, 3, 4, 5, 6]), "malformed entry", "a polygon is 1"),
    "NaN in an outline": (box(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "malformed entry", "finite"),
    "an outline of light years": (box(segmentation=[[0, 0, 1e15, 0, 0, 1e15]]), "malformed entry", "below"),
    "a segmentation of text": (box(segmentation="all"), "malformed entry", "expected polygons or run lengths"),
    "runs of another size": (
        box(segmentation={"size": [1, 2], "counts": [2]}),
        "malformed entry",
        "the size of the run",
    ),
    "no counts": (box(segmentation={"size": [30, 40]}), "malformed entry", "expected run lengths"),
    "too few counts": (box(segmentation={"size": [30, 40], "counts": [5, 5]}), "malformed entry", "10 pixels"),
    "negative counts": (
        box(segmentation={"size": [30, 40], "counts": [1300, -100]}),
        "malformed entry",
        "out of range",
    ),
    "huge counts": (box(segmentation={"size": [30, 40], "counts": [10**30]}), "malformed entry", "out of range"),
    "counts beyond": (
        box(segmentation={"size": [30, 40], "counts": [2**62, 2**62]}),
        "malformed entry",
        "out of range",
    ),
    "counts of text": (box(segmentation={"size": [30, 40], "counts": ["1"]}), "malformed entry", "whole numbers"),
    "garbage": (box(segmentation={"size": [30, 40], "counts": "~~~"}), "malformed entry", "character out of range"),
    "not ASCII": (box(segmentation={"size": [30, 40], "counts": "ü"}), "malformed entry", "not ASCII"),
    "cut text": (box(segmentation={"size": [30, 40], "counts": "0PP"}), "malformed entry", "cut short"),
    "endless text": (box(segmentation={"size": [30, 40], "counts": "P" * 20 + "0"}), "malformed entry", "out of range"),
    "empty text": (box(segmentation={"size": [30, 40], "counts": ""}), "malformed entry", "0 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_entry_that_cannot_be_used_is_refused_by_name_or_dropped_and_counted(tmp_path, name):
    bad, kind, what = BAD[name]
    good = box(bbox=(5, 5, 10, 10), segmentation=[SQUARE])
    file = write_coco(tmp_path, coco(good, bad, good))
    with pytest.raises(DatasetError, match=what) as told:
        CocoDetection(tmp_path, file, masks=True)
    assert f'"{file}", annotation 2' in str(told.value)
    assert 'on_bad="drop"' in str(told.value)
    dataset = CocoDetection(tmp_path, file, masks=True, on_bad="drop")
    assert dataset.problems.counts == {kind: 1}
    assert dataset[0]["boxes"].tolist() == [[5, 5, 15, 15]] * 2
    assert (dataset[0]["masks"].sum((1, 2)) == 100).all()


@pytest.mark.parametrize(
    ("keypoints", "what"),
    [
        ([1, 2], "keypoints has 2"),
        ([1, 2, 5], "visibility"),
        (["a", 2, 1], "keypoints is"),
        ([1, 2, float("nan")], "finite"),
    ],
)
def test_keypoints_that_cannot_be_used_are_refused(tmp_path, keypoints, what):
    content = coco(box(keypoints=keypoints))
    content["categories"][0]["keypoints"] = ["nose"]
    with pytest.raises(DatasetError, match=what):
        made(tmp_path, content=content, keypoints=True)


BAD_IMAGES = {
    "missing image": ({"file_name": "nowhere/5.png"}, "does not exist"),
    "a name of a list": ({"file_name": ["0.png"]}, "file_name is"),
    "no name": ({"file_name": ""}, "file_name is ''"),
    "a NUL in the name": ({"file_name": "a\0.png"}, "file_name is"),
    "half of a surrogate pair": ({"file_name": "\ud800.png"}, "file_name is"),
    "no width": ({"width": None}, "width is None"),
    "no height": ({"height": 0}, "height is 0"),
    "a huge side": ({"height": 10**9}, "height is 1000000000"),
    "an id of text": ({"id": "1"}, "id is '1'"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_used_is_refused_by_name_or_dropped_with_its_boxes(tmp_path, name):
    change, what = BAD_IMAGES[name]
    content = coco(box(20), box(30, (5, 6, 7, 8)))
    content["images"][0] |= change
    file = write_coco(tmp_path, content)
    with pytest.raises(DatasetError, match=what):
        CocoDetection(tmp_path, file)
    dataset = CocoDetection(tmp_path, file, on_bad="drop")
    assert dataset.image_ids.tolist() == [20, 30]
    assert dataset[1]["boxes"].tolist() == [[5, 6, 12, 14]]
    assert sum(dataset.problems.counts.values()) == 1


CONTENTS = {
    "no JSON": "hello",
    "cut short": '{"images": [{"id": 1',
    "nothing": "",
    "a list": "[]",
    "deep": "[" * 100_000,
    "digits": '{"images": ' + "9" * 5000 + "}",
    "bytes": b"\xff\xfe\x00{",
    "no annotations": {"images": [], "categories": []},
    "images of text": {"images": "0.png", "annotations": [], "categories": []},
    "an image of text": coco(images=0) | {"images": ["0.png"]},
    "an annotation of a number": coco() | {"annotations": [1]},
    "a category without an id": coco() | {"categories": [{"name": "cat"}]},
    "a category without a name": coco() | {"categories": [{"id": 1}]},
    "two categories of one id": coco() | {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
    "two images of one id": coco() | {"images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 30}] * 2},
    "no image": coco(images=0),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("on_bad", ["error", "drop"])
def test_a_file_that_is_not_cocos_is_refused_by_name(tmp_path, name, on_bad):
    content = CONTENTS[name]
    file = write_coco(tmp_path, "" if isinstance(content, bytes) else content)
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(DatasetError, match=str(file)):
        CocoDetection(tmp_path, file, on_bad=on_bad)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.json\" cannot be read: No such file"):
        CocoDetection(tmp_path, tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("options", "what"),
    [({"extras": ["colour"]}, "extras="), ({"extras": "ids"}, "extras="), ({"on_bad": 1}, "on_bad=1")],
)
def test_unknown_options_are_refused(tmp_path, options, what):
    with pytest.raises(ValueError, match=what):
        made(tmp_path, box(), **options)


def test_many_problems_are_summed_up(tmp_path):
    with pytest.raises(
        DatasetError, match=r"1,000 entries of the annotations cannot be used \(1,000 unknown category\)"
    ) as told:
        made(tmp_path, *[box(category=99)] * 1000)
    assert "and 995 more" in str(told.value)
    dataset = made(tmp_path, *[box(category=99)] * 1000, on_bad="drop")
    assert len(dataset.problems) == 1000
    assert len(dataset.problems.listed) == 100


def test_keypoints_need_names_and_one_list_of_them(tmp_path):
    with pytest.raises(DatasetError, match="no category has keypoints"):
        made(tmp_path, box(), keypoints=True)
    content = coco(box())
    content["categories"][0]["keypoints"], content["categories"][1]["keypoints"] = ["a"], ["b"]
    with pytest.raises(DatasetError, match="different keypoints"):
        made(tmp_path, content=content, keypoints=True)
    content["categories"][1]["keypoints"] = ["a"]
    content["categories"][1]["skeleton"] = [[1, 2]]
    with pytest.raises(DatasetError, match="skeleton"):
        made(tmp_path, content=content, keypoints=True)


def test_a_picture_of_another_size_than_its_annotations_is_an_error_and_no_wrong_box(tmp_path):
    dataset = made(tmp_path, box())
    write_picture(tmp_path / "0.png", WIDTH + 1, HEIGHT)
    with pytest.raises(
        FieldShapeError, match=r"sample 0 .*the picture is 41 x 30 pixels, its annotations are for 40 x 30"
    ):
        dataset[0]
    write_picture(tmp_path / "0.png", HEIGHT, WIDTH)
    with pytest.raises(FieldShapeError, match="EXIF") as told:
        dataset[0]
    assert told.value.source == str(tmp_path / "0.png")


def test_pictures_behind_a_url_are_read(tmp_path):
    import fsspec

    made(tmp_path, box())
    with fsspec.open("memory://coco/0.png", "wb") as file:
        file.write((tmp_path / "0.png").read_bytes())
    dataset = CocoDetection("memory://coco", tmp_path / "annotations.json")
    assert dataset[0]["boxes"].tolist() == [[1, 2, 4, 6]]
    np.testing.assert_array_equal(
        dataset[0]["image"], CocoDetection(tmp_path, tmp_path / "annotations.json")[0]["image"]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_delivers_ragged_boxes_and_masks(tmp_path, workers):
    dataset = made(
        tmp_path,
        box(10, segmentation=[SQUARE]),
        *[box(30, (n, n, 5, 5), segmentation=[SQUARE]) for n in range(5)],
        masks=True,
        extras=("iscrowd",),
    )
    loader = DataLoader(dataset, 3, num_workers=workers, fields=dataset.ragged_fields)
    batch = next(iter(loader))
    assert batch["image"].shape == (3, HEIGHT, WIDTH, 3)
    assert batch["image_id"].tolist() == [10, 20, 30]
    assert [boxes.shape for boxes in batch["boxes"]] == [(1, 4), (0, 4), (5, 4)]
    for name in ("boxes", "labels", "masks", "iscrowd"):
        for index in range(3):
            np.testing.assert_array_equal(batch[name][index].numpy(), dataset[index][name])


@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_masks_and_columns_go_through_a_pipeline_together(tmp_path, workers):
    pipeline = A.Compose(
        [A.Crop(0, 0, 20, 20), A.HorizontalFlip(p=1)],
        bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]),
    )
    far = [30, 20, 38, 20, 38, 28, 30, 28]
    dataset = made(
        tmp_path,
        box(10, (30, 20, 8, 8), segmentation=[far]),
        box(10, (5, 5, 10, 10), 3, segmentation=[SQUARE]),
        box(20, (30, 20, 8, 8), segmentation=[far]),
        masks=True,
        extras=("ids",),
        transform=Albumentations(pipeline, box_rows=("masks", "ids")),
    )
    loader = DataLoader(dataset, 3, num_workers=workers, fields=dataset.ragged_fields)
    batch = next(iter(loader))
    assert batch["image"].shape == (3, 20, 20, 3)
    assert batch["boxes"][0].tolist() == [[5, 5, 15, 15]]
    assert [len(each) for each in batch["boxes"]] == [1, 0, 0]
    assert batch["labels"][0].tolist() == [0]
    assert batch["ids"][0].tolist() == [2]
    assert [tuple(each.shape) for each in batch["masks"]] == [(1, 20, 20), (0, 20, 20), (0, 20, 20)]
    assert batch["masks"][0][0, 5:15, 5:15].all()
    assert batch["masks"][0].sum() == 100


def test_keypoints_go_through_a_pipeline_with_their_visibility_and_owner(tmp_path):
    content = coco(box(keypoints=[1, 2, 2, 35, 4, 1]), box(keypoints=[0, 0, 0, 9, 9, 2]))
    content["categories"][0]["keypoints"] = ["nose", "tail"]
    pipeline = A.Compose(
        [A.Crop(0, 0, 20, 20), A.HorizontalFlip(p=1)],
        bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]),
        keypoint_params=A.KeypointParams("xy", label_fields=["keypoint_labels"]),
    )
    sample = made(tmp_path, content=content, keypoints=True, transform=Albumentations(pipeline, box_rows="rows"))[0]
    assert sample["rows"].tolist() == [0, 1]
    kept = {
        tuple(owner): point
        for owner, point in zip(sample["keypoint_labels"].tolist(), sample["keypoints"], strict=True)
    }
    assert sorted(kept) == [(0, 0), (1, 0), (1, 1)]
    assert kept[0, 0][1:].tolist() == [2, 2]
    assert 18 <= kept[0, 0][0] <= 19
    assert kept[1, 1][2] == 2


def test_a_pickled_copy_has_the_same_table_and_problems(tmp_path):
    dataset = made(tmp_path, box(bbox=(-1, 0, 5, 5), segmentation=[SQUARE]), masks=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.problems.counts == dataset.problems.counts
    np.testing.assert_array_equal(copy[0]["masks"], dataset[0]["masks"])
