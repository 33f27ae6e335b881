"""Annotation files with damage anywhere: an error that names the file, or samples that are sound."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.annotated import HEIGHT, WIDTH, box, coco, voc_object, write_coco, write_voc, write_yolo

from loaders import CocoDetection, DatasetError, VocDetection, YoloDetection
from loaders.datasets.detection.run_lengths import decode_counts
from loaders.datasets.detection.segments import SegmentsBuilder
from loaders.errors import FieldShapeError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def good_coco():
    runs = {"size": [HEIGHT, WIDTH], "counts": [100, 50, 1050]}
    content = coco(
        box(10, segmentation=[[1, 2, 30, 2, 30, 20]], keypoints=[5, 6, 2]),
        box(20, (3, 3, 5, 5), 3, segmentation=runs, keypoints=[5, 6, 2]),
        box(20, (0, 0, 40, 30), 7, segmentation={"size": [HEIGHT, WIDTH], "counts": "_3?1Q1"}, keypoints=[0, 0, 0]),
    )
    content["categories"][0] |= {"keypoints": ["nose"], "skeleton": [[1, 1]]}
    return content


def places(tree, path=()):
    """The paths of all values of a JSON document."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


PLACES = sorted(places(good_coco()), key=str)


def check_samples(dataset):
    """Each sample is sound: boxes inside the picture, one row of everything per box."""
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except FieldShapeError:
            # The damage was to a size; pictures have one.
            assert dataset.annotations.sizes[index].tolist() != [WIDTH, HEIGHT]
            continue
        count = len(sample["boxes"])
        assert sample["boxes"].shape == (count, 4)
        left, top, right, bottom = sample["boxes"].T
        assert ((left >= 0) & (left < right) & (right <= WIDTH)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= HEIGHT)).all()
        assert ((sample["labels"] >= 0) & (sample["labels"] < len(dataset.classes))).all()
        if "masks" in sample:
            assert sample["masks"].shape == (count, HEIGHT, WIDTH)
            assert sample["masks"].max(initial=0) <= 1
        if "keypoints" in sample:
            assert len(sample["keypoints"]) == len(sample["keypoint_labels"]) == count * len(dataset.keypoint_names)


def read(kind, file, *arguments, **options):
    """The dataset, or None if the file was refused, with its name."""
    try:
        return kind(*arguments, **options)
    except DatasetError as error:
        told = str(error)
    assert str(file) in told
    return None


@given(st.sampled_from(PLACES), VALUES, st.sampled_from(["error", "drop"]))
@QUICK
def test_any_value_anywhere_in_a_coco_file(tmp_path, place, value, on_bad):
    content = good_coco()
    if place:
        *above, last = place
        parent = content
        for key in above:
            parent = parent[key]
        parent[last] = value
    else:
        content = value
    file = tmp_path / "annotations.json"
    if not file.exists():
        write_coco(tmp_path, good_coco())
    file.write_text(json.dumps(content))
    dataset = read(CocoDetection, file, tmp_path, file, masks=True, keypoints=True, extras=("ids",), on_bad=on_bad)
    if dataset is not None:
        check_samples(dataset)


@pytest.mark.parametrize("on_bad", ["error", "drop"])
def test_a_coco_file_without_one_key_or_cut_anywhere(tmp_path, on_bad):
    text = json.dumps(good_coco())
    file = write_coco(tmp_path, text)
    for place in PLACES:
        content = good_coco()
        if place and isinstance(place[-1], str):
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            del parent[place[-1]]
            file.write_text(json.dumps(content))
            dataset = read(CocoDetection, file, tmp_path, file, masks=True, on_bad=on_bad)
            if dataset is not None:
                check_samples(dataset)
    for end in range(0, len(text), 7):
        file.write_text(text[:end])
        assert read(CocoDetection, file, tmp_path, file, on_bad=on_bad) is None


def changed(data, rng):
    """The bytes with a few of them changed, removed or doubled."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 2)] = bytes(
            rng.choices(b"0123456789.-+eE<>&;/ \n\0\xffnaif", k=rng.randint(0, 2))
        )
    return bytes(data)


def test_any_change_of_bytes_in_a_yolo_file(tmp_path):
    rng, good = random.Random(0), b"0 0.5 0.5 0.2 0.4\n1 0.25 0.2 0.75 0.2 0.75 0.6 0.25 0.6\n"
    file = tmp_path / "labels/train/a.txt"
    write_yolo(tmp_path, {"a": "", "b": ""})
    read_as = [0, 0]
    for _ in range(400):
        file.write_bytes(changed(good, rng))
        for on_bad in ("error", "drop"):
            dataset = read(YoloDetection, file, tmp_path, "train", on_bad=on_bad)
            read_as[dataset is None] += 1
            if dataset is not None:
                check_samples(dataset)
    assert min(read_as) > 50


def test_any_change_of_bytes_in_a_voc_file(tmp_path):
    rng = random.Random(0)
    write_voc(tmp_path, {"a": voc_object() + voc_object("dog", (5, 5, 9, 9), "<difficult>1</difficult>"), "b": ""})
    file = tmp_path / "Annotations/a.xml"
    good = file.read_bytes()
    for _ in range(300):
        file.write_bytes(changed(good, rng))
        for on_bad in ("error", "drop"):
            dataset = read(VocDetection, file, tmp_path, classes=["cat", "dog"], on_bad=on_bad)
            if dataset is not None:
                check_samples(dataset)


@given(st.binary(max_size=40) | st.text("0123456789:;<=>?@ABCPQ_`abno", max_size=20))
@QUICK
def test_any_text_of_run_lengths_is_refused_or_a_mask(text):
    try:
        runs = decode_counts(text, 30, 40)
    except ValueError:
        return
    assert runs.sum() == 1200
    assert (runs >= 0).all()


@given(st.lists(st.floats(-1e7, 1e7) | st.integers(-50, 90), min_size=6, max_size=16))
@QUICK
def test_any_outline_makes_a_mask_of_the_pictures_size(values):
    builder = SegmentsBuilder(False)
    builder.add([values[: len(values) // 2 * 2]])
    masks = builder.build().masks(0, 1, WIDTH, HEIGHT)
    assert masks.shape == (1, HEIGHT, WIDTH)
    assert masks.max() <= 1
    xs, ys = np.array(values[: len(values) // 2 * 2]).reshape(-1, 2).T
    # Nothing lies outside of the box around the outline, but for the pixels that its edges pass through.
    outside = np.ones((HEIGHT, WIDTH), bool)
    left, right = (int(np.clip(each, -9, WIDTH + 9)) for each in (xs.min() - 1, xs.max() + 2))
    top, bottom = (int(np.clip(each, -9, HEIGHT + 9)) for each in (ys.min() - 1, ys.max() + 2))
    outside[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = False
    assert not masks[0][outside].any()
