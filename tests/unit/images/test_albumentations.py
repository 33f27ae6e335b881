import copy
import dataclasses
import pickle
import random
from collections import namedtuple

import albumentations as A
import numpy as np
import pytest
import torch

from loaders import Albumentations, ArrayDataset
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
MASK = RNG.integers(0, 5, (40, 60), dtype=np.uint8)
Pair = namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass
class Photo:
    image: np.ndarray
    name: str
    mask: np.ndarray | None = None


def crop(**params):
    return A.Compose([A.Crop(10, 5, 30, 25)], **params)


def box_crop(**params):
    return crop(bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"], **params))


def boxes_sample(labels, boxes=((0, 0, 5, 5), (12, 8, 20, 20), (40, 30, 50, 39), (11, 6, 29, 24))):
    return {"image": IMAGE, "boxes": np.array(boxes, np.float32), "labels": labels, "name": "a.jpg"}


def seeded(transform, sample, seed=0):
    torch.manual_seed(seed)
    return transform(sample)


def test_image_and_mask_go_through_together_and_other_fields_travel_unchanged():
    boxes = np.ones((2, 7))
    sample = {"name": "a.jpg", "image": IMAGE, "label": 3, "mask": MASK, "other": boxes}
    result = Albumentations(crop())(sample)
    assert list(result) == list(sample)
    assert np.array_equal(result["image"], IMAGE[5:25, 10:30])
    assert np.array_equal(result["mask"], MASK[5:25, 10:30])
    assert (result["name"], result["label"]) == ("a.jpg", 3)
    assert result["other"] is boxes
    assert sample["image"] is IMAGE


def test_namedtuples_tuples_lists_and_dataclasses_come_out_as_they_went_in():
    transform = Albumentations(crop())
    pair = transform(Pair(IMAGE, 3))
    assert type(pair) is Pair
    assert (pair.image.shape, pair.label) == ((20, 20, 3), 3)
    first, label = transform((IMAGE, 3))
    assert (first.shape, label) == ((20, 20, 3), 3)
    assert type(transform([IMAGE, 3])) is list
    photo = transform(Photo(IMAGE, "a"))
    assert (type(photo), photo.image.shape, photo.name, photo.mask) == (Photo, (20, 20, 3), "a", None)
    image, mask = Albumentations(crop(), mask="1")((IMAGE, MASK))
    assert (image.shape, mask.shape) == ((20, 20, 3), (20, 20))


def test_field_names_are_configurable_down_to_targets_of_the_pipelines_own():
    transform = Albumentations(
        crop(additional_targets={"image2": "image"}), image="left", mask="ground_truth", image2="right"
    )
    result = transform({"left": IMAGE, "right": IMAGE, "ground_truth": MASK, "image": "a path"})
    assert result["left"].shape == result["right"].shape == (20, 20, 3)
    assert result["ground_truth"].shape == (20, 20)
    assert result["image"] == "a path"
    assert transform.targets == {"image2": "right"}


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("channels", [(), (2,)])
def test_stacks_of_masks_keep_their_number_also_of_none(count, channels):
    masks = np.ones((count, 40, 60, *channels), np.uint8)
    result = Albumentations(crop())({"image": IMAGE, "masks": masks})["masks"]
    assert (result.shape, result.dtype) == ((count, 20, 20, *channels), np.uint8)


def test_lists_of_masks_stay_lists():
    result = Albumentations(crop())({"image": IMAGE, "masks": [MASK, MASK]})["masks"]
    assert [mask.shape for mask in result] == [(20, 20), (20, 20)]
    assert Albumentations(crop())({"image": IMAGE, "masks": []})["masks"] == []


LABELS = {
    "ints beyond float32": np.array([2**24 + 1, 2**53 + 1, 3, -(2**62)]),
    "uint8": np.array([0, 1, 2, 255], np.uint8),
    "bools": np.array([True, False, False, True]),
    "strings": np.array(["cat", "dog", "cat", "größe"]),
    "rows": np.arange(12.0).reshape(4, 3),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_labels_of_any_dtype_and_shape_stay_with_their_boxes_exactly(labels):
    result = Albumentations(box_crop())(boxes_sample(labels))
    assert np.allclose(result["boxes"], [[2, 3, 10, 15], [1, 1, 19, 19]], atol=1e-4)
    assert result["boxes"].dtype == np.float32
    assert result["labels"].dtype == labels.dtype
    assert np.array_equal(result["labels"], labels[[1, 3]])


def test_a_list_of_labels_stays_a_list():
    assert Albumentations(box_crop())(boxes_sample(["a", "b", "c", "d"]))["labels"] == ["b", "d"]


@pytest.mark.parametrize(
    "boxes", [np.zeros((0, 4)), [], [(0, 0, 5, 5), (40, 30, 50, 39)]], ids=["array", "list", "lost"]
)
def test_boxes_stay_a_table_when_none_is_left(boxes):
    sample = {"image": IMAGE, "boxes": boxes, "labels": np.arange(len(boxes), dtype=np.int16)}
    result = Albumentations(box_crop())(sample)
    assert (result["boxes"].shape, result["boxes"].dtype) == ((0, 4), np.float32)
    assert (result["labels"].shape, result["labels"].dtype) == ((0,), np.int16)


def test_boxes_may_carry_more_columns_also_when_none_is_left():
    transform = Albumentations(crop(bbox_params=A.BboxParams("pascal_voc")))
    kept = transform({"image": IMAGE, "boxes": np.array([[12, 8, 20, 20, 7, 0.5]])})["boxes"]
    assert np.allclose(kept, [[2, 3, 10, 15, 7, 0.5]], atol=1e-4)
    assert transform({"image": IMAGE, "boxes": np.array([[0, 0, 5, 5, 7, 0.5]])})["boxes"].shape == (0, 6)


def test_the_samples_own_boxes_are_never_written_into():
    boxes = np.array([[0.2, 0.2, 0.9, 1.5]], np.float32)  # Albumentations clips this format where it lies
    pipeline = A.Compose([A.HorizontalFlip(p=1)], bbox_params=A.BboxParams("albumentations", clip=True))
    result = Albumentations(pipeline)({"image": IMAGE, "boxes": boxes})
    assert np.allclose(result["boxes"], [[0.1, 0.2, 0.8, 1]])
    assert boxes[0, 3] == 1.5


def test_several_label_fields_and_keypoints_with_their_own():
    pipeline = crop(
        bbox_params=A.BboxParams("coco", label_fields=["kind", "score"]),
        keypoint_params=A.KeypointParams("xy", label_fields=["joint"]),
    )
    transform = Albumentations(pipeline, labels=("kind", "score"), keypoint_labels="joint")
    sample = {
        "image": IMAGE,
        "boxes": [[0, 0, 5, 5], [12, 8, 8, 12]],
        "kind": ["cat", "dog"],
        "score": np.array([0.1, 0.9]),
        "keypoints": np.array([[11, 6], [0, 0], [29, 24]], np.int64),
        "joint": np.array([5, 6, 7]),
    }
    result = transform(sample)
    assert np.allclose(result["boxes"], [[2, 3, 8, 12]], atol=1e-4)
    assert (result["kind"], result["score"].tolist()) == (["dog"], [0.9])
    assert result["keypoints"].tolist() == [[1, 1], [19, 19]]
    assert result["keypoints"].dtype == np.float32
    assert result["joint"].tolist() == [5, 7]
    nothing = transform({**sample, "boxes": [], "kind": [], "score": [], "keypoints": [], "joint": []})
    assert nothing["keypoints"].shape == (0, 2)


def test_rows_of_other_fields_follow_their_boxes_masks_after_they_were_cropped_with_the_image():
    transform = Albumentations(box_crop(), box_rows=("masks", "score", "absent"))
    masks = np.stack([np.full((40, 60), number, np.uint8) for number in range(4)])
    sample = {**boxes_sample(np.arange(4)), "masks": masks, "score": [0.1, 0.2, 0.3, 0.4], "others": np.arange(4)}
    result = transform(sample)
    assert result["labels"].tolist() == [1, 3]
    assert result["masks"].shape == (2, 20, 20)
    assert result["masks"][:, 0, 0].tolist() == [1, 3]
    assert result["score"] == [0.2, 0.4]
    assert len(result["others"]) == 4  # not named
    nothing = {**sample, "boxes": np.zeros((0, 4)), "labels": [], "masks": masks[:0], "score": []}
    assert transform(nothing)["masks"].shape == (0, 20, 20)


def test_rows_that_cannot_follow_boxes_are_refused():
    transform = Albumentations(box_crop(), box_rows="score")
    with pytest.raises(FieldShapeError, match='"score": 3 rows, but "boxes" has 4'):
        transform({**boxes_sample(np.arange(4)), "score": np.arange(3)})
    unlabelled = {name: value for name, value in boxes_sample(None).items() if name != "labels"}
    with pytest.raises(FieldNameError, match=r"no labels, by which dropped boxes are found.\n  Give each box a label"):
        Albumentations(crop(bbox_params=A.BboxParams("pascal_voc")), box_rows="score")(
            {**unlabelled, "score": np.arange(4)}
        )


def test_labels_without_boxes_are_a_field_like_any_other():
    labels = np.arange(3)
    assert Albumentations(crop())({"image": IMAGE, "labels": labels})["labels"] is labels


def test_labels_that_the_pipeline_does_not_know_are_refused_when_a_box_is_lost():
    transform = Albumentations(crop(bbox_params=A.BboxParams("pascal_voc")))
    with pytest.raises(FieldShapeError, match=r'"labels": .* 4 labels for 2 rows.*\n.*label_fields=\["labels"\]'):
        transform(boxes_sample(np.arange(4)))


def test_rows_that_the_sample_never_had_are_refused():
    class Mixing(A.Compose):
        def __call__(self, **data):
            return {**data, "labels": np.append(data["labels"][:-1], 7)}

    with pytest.raises(FieldShapeError, match="labels of rows that are not in the sample"):
        Albumentations(Mixing([]))(boxes_sample(np.arange(4)))


def test_labels_of_another_length_than_the_boxes_are_refused():
    for boxes in (np.zeros((0, 4)), np.ones((2, 4))):
        with pytest.raises(FieldShapeError, match=rf'"labels": 3 rows, but "boxes" has {len(boxes)}'):
            Albumentations(box_crop())({"image": IMAGE, "boxes": boxes, "labels": [1, 2, 3]})


def test_tensors_are_refused_with_the_place_where_they_are_made():
    with pytest.raises(FieldDtypeError, match=r'"image": .* Tensor, expected an ndarray.\n  Remove ToTensorV2'):
        Albumentations(A.Compose([A.pytorch.ToTensorV2()]))({"image": IMAGE})


@pytest.mark.parametrize(("sample", "found"), [({"photo": IMAGE}, "'photo'"), (IMAGE, "it is a ndarray"), ({}, "none")])
def test_a_sample_without_any_of_the_fields_is_told_what_it_has(sample, found):
    with pytest.raises(FieldNameError, match=rf"(?s)nothing to augment.*{found}.*expected 'image'"):
        Albumentations(crop())(sample)


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="tracebacks have notes from Python 3.11 on")
def test_an_error_in_the_pipeline_keeps_its_type_and_says_what_it_was_given():
    with pytest.raises(ValueError, match="Height and Width") as caught:
        Albumentations(crop())({"image": IMAGE, "mask": MASK[:10]})
    assert "image: uint8 (40, 60, 3), mask: uint8 (10, 60)" in caught.value.__notes__[0]


def test_what_cannot_be_seeded_is_no_pipeline():
    for transform in (len, None):
        with pytest.raises(TypeError, match="no set_random_state"):
            Albumentations(transform)


def test_read_only_rows_of_a_dataset_can_be_augmented():
    dataset = ArrayDataset({"image": np.stack([IMAGE, IMAGE])}, Albumentations(random_pipeline()))
    assert dataset[1]["image"].shape == (8, 8, 3)


def random_pipeline(**params):
    return A.Compose(
        [
            A.RandomCrop(8, 8),
            A.OneOf([A.RandomBrightnessContrast(p=1), A.GaussNoise(p=1)], p=0.9),
            A.SomeOf([A.HorizontalFlip(), A.VerticalFlip()], n=1),
        ],
        **params,
    )


def test_the_sample_decides_the_randomness_whatever_came_before():
    transform = Albumentations(random_pipeline())
    sample = {"image": IMAGE}
    first = seeded(transform, sample)["image"]
    assert not np.array_equal(transform(sample)["image"], first)
    assert np.array_equal(seeded(transform, sample)["image"], first)
    assert not np.array_equal(seeded(transform, sample, seed=1)["image"], first)
    assert np.array_equal(seeded(Albumentations(random_pipeline(seed=5)), sample)["image"], first)


def test_both_of_the_pipelines_generators_are_seeded_by_the_sample():
    drawn = []

    class Draws(A.NoOp):
        def apply(self, img, **params):
            drawn.append((self.py_random.random(), self.random_generator.random()))
            return img

    transform = Albumentations(A.Compose([Draws(p=1)]))
    for seed in (0, 0, 1):
        seeded(transform, {"image": IMAGE}, seed)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]


def test_no_global_generator_but_the_one_of_sample_rng_is_touched():
    random.seed(0)
    np.random.seed(0)
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    Albumentations(random_pipeline())({"image": IMAGE})
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy


def test_a_pipeline_that_takes_only_a_seed_gets_one():
    class Seeded:
        def set_random_seed(self, seed):
            self.rng = np.random.default_rng(seed)

        def __call__(self, image):
            return {"image": image + self.rng.integers(0, 256, dtype=np.uint8)}

    transform = Albumentations(Seeded())
    first = seeded(transform, {"image": IMAGE})["image"]
    assert np.array_equal(seeded(transform, {"image": IMAGE})["image"], first)
    assert not np.array_equal(transform({"image": IMAGE})["image"], first)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda transform: pickle.loads(pickle.dumps(transform))])
def test_copies_work_alike_and_on_their_own(duplicate):
    original = Albumentations(random_pipeline(), image="photo")
    sample = {"photo": IMAGE}
    expected = seeded(original, sample)["photo"]
    twin = duplicate(original)
    assert twin.transform is not original.transform
    assert np.array_equal(seeded(twin, sample)["photo"], expected)
    different = {seeded(twin, sample, seed)["photo"].tobytes() for seed in range(20)}
    assert len(different) > 10


def test_constructor_arguments_are_kept_and_the_repr_is_short():
    pipeline = crop()
    names = {
        name: name.upper()
        for name in ("image", "mask", "masks", "boxes", "labels", "box_rows", "keypoints", "keypoint_labels")
    }
    transform = Albumentations(pipeline, **names)
    assert transform.transform is pipeline
    assert {name: getattr(transform, name) for name in names} == names
    assert repr(transform) == "Albumentations(Compose)"


def flip():
    return A.HorizontalFlip(p=1)  # a new one each time: a Compose leaves what it was told in its transforms


BOX, POINT = {"boxes": np.array([[1, 10, 21, 30]], np.float32)}, {"keypoints": np.array([[1, 10]], np.float32)}


@pytest.mark.parametrize(
    ("pipeline", "rows", "missing"),
    [
        (A.Compose([flip()]), BOX, "bbox_params"),
        (flip(), BOX, "bbox_params"),
        (A.Compose([flip()], bbox_params=A.BboxParams("pascal_voc"))[0], BOX, "bbox_params"),
        (A.OneOf([flip()], p=1), BOX, "bbox_params"),
        (A.Compose([A.Compose([flip()], bbox_params=A.BboxParams("pascal_voc"))]), BOX, "bbox_params"),
        (A.Compose([flip()], keypoint_params=A.KeypointParams("xy")), BOX, "bbox_params"),
        (A.Compose([flip()]), POINT, "keypoint_params"),
        (A.Compose([flip()], bbox_params=A.BboxParams("pascal_voc")), POINT, "keypoint_params"),
    ],
)
def test_boxes_or_keypoints_whose_format_the_pipeline_was_not_told_are_refused_with_the_argument(
    pipeline, rows, missing
):
    (field,) = rows
    with pytest.raises(FieldNameError, match=rf'"{field}": .*{missing} is missing.\n.*{missing}=') as caught:
        Albumentations(pipeline)({"image": IMAGE, **rows})
    assert caught.value.field == field


def test_further_boxes_of_a_pipeline_need_their_format_too():
    pipeline = A.Compose([flip()], additional_targets={"others": "bboxes"})
    with pytest.raises(FieldNameError, match=r'"others": .*bbox_params is missing'):
        Albumentations(pipeline, others="others")({"image": IMAGE, "others": BOX["boxes"]})


def test_boxes_pass_a_pipeline_that_moves_no_pixel():
    for pipeline in (A.Compose([A.InvertImg(p=1)]), A.Compose([])):
        result = Albumentations(pipeline)({"image": IMAGE, **BOX, **POINT})
        assert np.array_equal(result["boxes"], BOX["boxes"])
        assert np.array_equal(result["keypoints"], POINT["keypoints"])


def test_labels_that_the_pipeline_does_not_know_are_refused_before_a_box_is_lost():
    for fields, params in (
        ({**BOX, "labels": [3]}, {"bbox_params": A.BboxParams("pascal_voc", label_fields=[])}),
        ({**POINT, "keypoint_labels": [3]}, {"keypoint_params": A.KeypointParams("xy")}),
    ):
        label = [*fields][1]
        with pytest.raises(FieldNameError, match=rf'"{label}": .*\n.*label_fields=\["{label}"\]'):
            Albumentations(A.Compose([flip()], **params))({"image": IMAGE, **fields})


def test_a_target_that_the_pipeline_does_not_know_is_refused_and_not_left_as_it_is():
    for pipeline in (flip(), A.Compose([flip()])):
        with pytest.raises(FieldNameError, match=r'"right": .* no target "image2".*\n.*additional_targets'):
            Albumentations(pipeline, image2="right")({"image": IMAGE, "right": IMAGE})


def test_a_declared_target_that_a_pipeline_of_colours_alone_leaves_as_it_is_passes():
    pipeline = A.Compose([A.InvertImg(p=1)], additional_targets={"mask2": "mask"})
    assert np.array_equal(Albumentations(pipeline, mask2="depth")({"image": IMAGE, "depth": MASK})["depth"], MASK)
