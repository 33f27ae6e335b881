"""VocDetection: boxes, splits, flags, and what is done about files that cannot be used."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.annotated import HEIGHT, WIDTH, voc_object, write_picture, write_voc

from loaders import DataLoader, DatasetError, VocDetection
from loaders.errors import FieldShapeError


def test_a_sample_has_boxes_counted_from_zero_with_their_last_pixel(tmp_path):
    dataset = VocDetection(write_voc(tmp_path, {"a": voc_object() + voc_object("dog", (1, 1, 40, 30)), "b": ""}))
    assert dataset.classes == ["cat", "dog"]
    sample = dataset[0]
    assert list(sample) == ["image", "boxes", "labels"]
    assert sample["boxes"].tolist() == [[0, 1, 10, 20], [0, 0, WIDTH, HEIGHT]]
    assert sample["labels"].tolist() == [0, 1]
    assert dataset[1]["boxes"].shape == (0, 4)
    assert dataset.describe(0) == str(tmp_path / "JPEGImages" / "a.png")
    assert not len(dataset.problems)


def test_files_of_tools_that_count_from_zero_are_read_as_they_are(tmp_path):
    dataset = VocDetection(write_voc(tmp_path, {"a": voc_object(corners=("0.5", 1, 10, 20))}), from_one=False)
    assert dataset[0]["boxes"].tolist() == [[0.5, 1, 10, 20]]


def test_flags_are_columns(tmp_path):
    objects = [
        voc_object(more="<difficult>1</difficult><truncated>0</truncated>"),
        voc_object(more="<truncated>Unspecified</truncated>"),
    ]
    dataset = VocDetection(write_voc(tmp_path, {"a": "".join(objects)}), extras=("truncated", "difficult"))
    assert dataset[0]["difficult"].tolist() == [1, 0]
    assert dataset[0]["truncated"].tolist() == [0, 0]
    assert dataset[0]["difficult"].dtype == np.uint8


def test_a_label_means_the_same_in_every_split(tmp_path):
    write_voc(tmp_path, {"a": voc_object("dog"), "b": voc_object("cat"), "c": voc_object("ant")})
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("c  1\nb -1\n")
    train, val = VocDetection(tmp_path, "train"), VocDetection(tmp_path, "val")
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    assert (len(train), train[0]["labels"].tolist()) == (1, [2])
    assert [val[index]["labels"].tolist() for index in range(2)] == [[0], [1]]
    # A damaged file of one split does not keep the others from being read.
    (tmp_path / "Annotations/a.xml").write_text("<annotation>")
    assert VocDetection(tmp_path, "val").classes == ["ant", "cat"]
    with pytest.raises(DatasetError, match=r"a\.xml\": it is not XML"):
        VocDetection(tmp_path, "train")


def test_a_dropped_object_changes_no_label(tmp_path):
    write_voc(tmp_path, {"a": voc_object("ant", corners=("x", 1, 2, 3)) + voc_object("dog"), "b": voc_object("cat")})
    dataset = VocDetection(tmp_path, on_bad="drop")
    assert dataset.classes == ["ant", "cat", "dog"]
    assert dataset[0]["labels"].tolist() == [2]


def test_classes_may_be_given_and_others_are_unknown(tmp_path):
    write_voc(tmp_path, {"a": voc_object("dog") + voc_object("cat")})
    with pytest.raises(DatasetError, match=r"a\.xml\", object 0: the class 'dog' is unknown"):
        VocDetection(tmp_path, classes=["cat"])
    dataset = VocDetection(tmp_path, classes=["x", "cat"], on_bad="drop")
    assert dataset[0]["labels"].tolist() == [1]
    assert dataset.problems.counts == {"unknown category": 1}


def test_a_file_without_a_size_is_for_its_picture(tmp_path):
    write_voc(tmp_path, {"a": voc_object(corners=(1, 1, 100, 100))}, size=False)
    dataset = VocDetection(tmp_path)
    assert dataset[0]["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]
    assert dataset.problems.counts == {"clipped box": 1}
    (tmp_path / "JPEGImages/a.png").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"a\.xml\": image .* OpenCV cannot decode"):
        VocDetection(tmp_path)


def test_a_picture_of_another_size_is_an_error_and_no_wrong_box(tmp_path):
    dataset = VocDetection(write_voc(tmp_path, {"a": voc_object()}))
    write_picture(tmp_path / "JPEGImages/a.png", 9, 9)
    with pytest.raises(FieldShapeError, match="is 9 x 9 pixels, its annotations are for 40 x 30"):
        dataset[0]


def bomb(levels):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' if n else '<!ENTITY e0 "lol">' for n in range(levels))
    return f"<!DOCTYPE annotation [{entities}]>"


BAD_FILES = {
    "no XML": ("hello", "it is not XML"),
    "nothing": ("", "it is not XML"),
    "cut short": ("<annotation><object><name>cat</na", "it is not XML"),
    "a bomb": (f"{bomb(12)}<annotation>&e11;</annotation>", "declares a document type"),
    "another file": (
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        "declares a document type",
    ),
    "deep": ("<a>" * 50_000 + "</a>" * 50_000, "nested more than 100 deep"),
    "an unknown encoding": ('<?xml version="1.0" encoding="nothing"?><annotation/>', "it is not XML"),
    "a size of text": ("<annotation><size><width>x</width></size></annotation>", "a side of the picture is 'x'"),
    "a huge size": ("<annotation><size><width>1e9</width></size></annotation>", "a side of the picture is"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_by_name_or_left_out(tmp_path, name):
    content, what = BAD_FILES[name]
    write_voc(tmp_path, {"a": voc_object(), "b": voc_object("dog")})
    (tmp_path / "Annotations/a.xml").write_text(content)
    with pytest.raises(DatasetError, match=what) as told:
        VocDetection(tmp_path)
    assert str(tmp_path / "Annotations/a.xml") in str(told.value)
    dataset = VocDetection(tmp_path, on_bad="drop")
    assert [dataset.describe(0)] == [str(tmp_path / "JPEGImages/b.png")]
    assert dataset.classes == ["dog"]
    assert sum(dataset.problems.counts.values()) == 1


BAD_OBJECTS = {
    "no name": (voc_object(""), "it has no name"),
    "no box": ("<object><name>cat</name></object>", "xmin is missing"),
    "a box of text": (voc_object(corners=("a", 2, 3, 4)), "xmin is 'a'"),
    "NaN": (voc_object(corners=(1, "nan", 3, 4)), "ymin is 'nan'"),
    "infinity": (voc_object(corners=(1, 2, "inf", 4)), "xmax is 'inf'"),
    "an underscore": (voc_object(corners=(1, 2, "1_0", 4)), "xmax is '1_0'"),
    "corners in the wrong order": (voc_object(corners=(20, 2, 3, 4)), "negative width"),
    "a flag of text": (voc_object(more="<difficult>very</difficult>"), "difficult is 'very'"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_an_object_that_cannot_be_used_is_refused_by_name_or_dropped_and_counted(tmp_path, name):
    text, what = BAD_OBJECTS[name]
    write_voc(tmp_path, {"a": voc_object() + text + voc_object()})
    with pytest.raises(DatasetError, match=what) as told:
        VocDetection(tmp_path)
    assert f'"{tmp_path / "Annotations/a.xml"}", object 1' in str(told.value)
    dataset = VocDetection(tmp_path, on_bad="drop")
    assert dataset[0]["boxes"].tolist() == [[0, 1, 10, 20]] * 2
    assert dataset.problems.counts == {"malformed entry": 1}


def test_a_missing_picture_and_missing_annotations_are_refused_or_left_out(tmp_path):
    write_voc(tmp_path, {"a": voc_object(), "b": voc_object()})
    (tmp_path / "JPEGImages/a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.xml\": .*JPEGImages\" has no picture for \"a\""):
        VocDetection(tmp_path)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\nnone\n")
    with pytest.raises(DatasetError, match=r"none\.xml\": the file does not exist"):
        VocDetection(tmp_path, "train")
    dataset = VocDetection(tmp_path, on_bad="drop")
    assert dataset.problems.counts == {"missing image": 1}
    assert len(dataset) == 1


def test_of_two_pictures_of_a_name_the_one_in_the_file_is_taken(tmp_path):
    write_voc(tmp_path, {"a": voc_object()})
    write_picture(tmp_path / "JPEGImages/a.bmp", value=9)
    assert VocDetection(tmp_path).describe(0).endswith("a.png")
    file = tmp_path / "Annotations/a.xml"
    file.write_text(file.read_text().replace("a.png", "other.jpg"))
    with pytest.raises(DatasetError, match=r"has several pictures, a\.bmp, a\.png, and filename is none of them"):
        VocDetection(tmp_path)
    (tmp_path / "JPEGImages/a.bmp").unlink()
    assert VocDetection(tmp_path).describe(0).endswith("a.png")  # many name the file before it was converted


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"Annotations\" cannot be listed"):
        VocDetection(tmp_path)
    write_voc(tmp_path, {"a": voc_object()})
    with pytest.raises(DatasetError, match=r"train\.txt\", the list of the split"):
        VocDetection(tmp_path, "train")
    with pytest.raises(ValueError, match="extras="):
        VocDetection(tmp_path, extras=["occluded"])
    with pytest.raises(ValueError, match="on_bad="):
        VocDetection(tmp_path, on_bad="ignore")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_delivers_ragged_boxes_and_flags(tmp_path, workers):
    write_voc(tmp_path, {"a": voc_object() * 2, "b": ""})
    dataset = VocDetection(tmp_path, extras=["difficult"])
    batch = next(iter(DataLoader(dataset, 2, num_workers=workers, fields=dataset.ragged_fields)))
    assert [tuple(each.shape) for each in batch["boxes"]] == [(2, 4), (0, 4)]
    assert [each.tolist() for each in batch["difficult"]] == [[0, 0], []]


def test_a_file_that_names_no_picture_needs_one_all_the_same(tmp_path):
    write_voc(tmp_path, {"a": voc_object(), "b": voc_object()})
    for stem in "ab":
        file = tmp_path / "Annotations" / f"{stem}.xml"
        file.write_text(re.sub("<filename>.*?</filename>", "", file.read_text()))
    assert len(VocDetection(tmp_path)) == 2
    (tmp_path / "JPEGImages/b.png").unlink()
    with pytest.raises(DatasetError, match="no picture for"):
        VocDetection(tmp_path)
    assert len(VocDetection(tmp_path, on_bad="drop")) == 1


def test_xml_of_another_kind_is_no_picture_without_objects(tmp_path):
    write_voc(tmp_path, {"a": voc_object()})
    (tmp_path / "Annotations/a.xml").write_text("<svg/>")
    with pytest.raises(DatasetError, match="its root is <svg>; expected <annotation>"):
        VocDetection(tmp_path)
