import os
import struct
import tracemalloc

import cv2
import numpy as np
import pytest
from support import photo_zoo
from support.photo_zoo import (
    exif,
    jpeg,
    make_empty,
    make_missing,
    make_text,
    photo,
    segment,
    with_exif,
    with_segments,
    zoo,
)

from loaders import DecodeError, image_size, read_image
from loaders.images.decode.header import read_header

XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")


def opencv_size(encoded):
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    return picture.shape[1::-1]


@pytest.mark.parametrize("name", zoo())
def test_the_size_is_that_of_the_picture_opencv_gives(name, tmp_path):
    path = tmp_path / "photo.with.the.wrong.ending.gif"
    path.write_bytes(zoo()[name])
    assert image_size(zoo()[name]) == opencv_size(zoo()[name])
    assert image_size(path) == image_size(str(path)) == opencv_size(zoo()[name])


@pytest.mark.parametrize("name", zoo())
def test_files_are_measured_without_decoding(name, monkeypatch):
    expected = opencv_size(zoo()[name])
    monkeypatch.setattr(cv2, "imdecode", None)
    assert image_size(zoo()[name]) == expected


@pytest.mark.parametrize("make", [bytearray, memoryview])
def test_encoded_bytes_of_any_type_are_measured(make):
    assert image_size(make(zoo()["jpeg 420"])) == (photo_zoo.WIDTH, photo_zoo.HEIGHT)


def test_of_a_file_only_the_beginning_is_read(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(zoo()["jpeg exif 6"])
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    size = image_size(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == (photo_zoo.HEIGHT, photo_zoo.WIDTH)
    assert peak < 1 << 20


def test_a_header_longer_than_the_beginning_is_read_on(tmp_path):
    profile = segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000))
    path = tmp_path / "photo.jpg"
    path.write_bytes(with_segments(jpeg(photo()), profile, profile))
    assert image_size(path) == (photo_zoo.WIDTH, photo_zoo.HEIGHT)


ENTRY = {
    "a string that lies outside": struct.pack(">HHII", 0x010E, 2, 1000, 5000),
    "a string that lies inside": struct.pack(">HHII", 0x010E, 2, 6, 8),
    "a tag out of order": struct.pack(">HHIHH", 0x0128, 3, 1, 2, 0),
    "an unknown type": struct.pack(">HHII", 0x0100, 99, 1, 0),
    "another orientation": struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0),
}
UNUSUAL = {
    "no EXIF name": [segment(0xE1, b"Nikon\0" + exif(6))],
    "XMP behind": [segment(0xE1, b"Exif\0\0" + exif(6)), XMP],
    "XMP alone": [XMP],
    "XMP before": [XMP, segment(0xE1, b"Exif\0\0" + exif(6))],
    "two blocks": [segment(0xE1, b"Exif\0\0" + exif(1)), segment(0xE1, b"Exif\0\0" + exif(6))],
    "empty blocks": [segment(0xE1, b""), segment(0xE1, b"Exif\0\0")],
    "orientation 0": [segment(0xE1, b"Exif\0\0" + exif(0))],
    "orientation 9": [segment(0xE1, b"Exif\0\0" + exif(9))],
    "a long": [segment(0xE1, b"Exif\0\0" + exif(6, kind=4))],
    "a little-endian long": [segment(0xE1, b"Exif\0\0" + exif(6, "<", kind=4))],
    "two values": [segment(0xE1, b"Exif\0\0" + exif(6, count=2))],
    "cut": [segment(0xE1, b"Exif\0\0" + exif(6)[:-8])],
    "another byte order": [segment(0xE1, b"Exif\0\0XX" + exif(6)[2:])],
    "another magic number": [segment(0xE1, b"Exif\0\0MM\0+" + exif(6)[4:])],
    "a directory outside": [segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xf0" + exif(6)[8:])],
    "padding": [b"\xff\xff", segment(0xE1, b"Exif\0\0" + exif(6))],
    **{name: [segment(0xE1, b"Exif\0\0" + exif(6, before=entry))] for name, entry in ENTRY.items()},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_and_damaged_exif_means_what_it_means_to_opencv(name):
    encoded = with_segments(jpeg(photo()), *UNUSUAL[name])
    assert image_size(encoded) == opencv_size(encoded)
    whole = read_image(encoded)
    assert np.array_equal(read_image(encoded, region=(20, 10, 50, 30)), whole[10:40, 20:70])


def test_where_versions_of_opencv_disagree_the_installed_one_is_asked():
    assert read_header(with_segments(jpeg(photo()), *UNUSUAL["XMP before"])) is None
    assert read_header(with_segments(jpeg(photo()), *UNUSUAL["XMP behind"])).jpeg.orientation == 6


def test_exif_behind_the_frame_counts():
    encoded = jpeg(photo())
    scan = encoded.index(b"\xff\xda")
    encoded = encoded[:scan] + segment(0xE1, b"Exif\0\0" + exif(6)) + encoded[scan:]
    assert read_header(encoded).jpeg.orientation == 6
    assert image_size(encoded) == opencv_size(encoded) == (photo_zoo.HEIGHT, photo_zoo.WIDTH)


def test_bytes_changed_at_random_in_exif_mean_what_they_mean_to_opencv():
    rng = np.random.default_rng(0)
    small = jpeg(photo(32, 16))
    block = np.frombuffer(exif(6, before=ENTRY["a string that lies inside"]), np.uint8)
    turned = 0
    for _ in range(1500):
        changed = block.copy()
        at = rng.integers(0, len(block), rng.integers(1, 4))
        changed[at] = np.where(rng.random(len(at)) < 0.5, rng.integers(0, 16, len(at)), rng.integers(0, 256, len(at)))
        encoded = with_exif(small, changed.tobytes())
        assert image_size(encoded) == opencv_size(encoded), changed.tobytes()
        turned += image_size(encoded) == (16, 32)
    assert 200 < turned < 1300


def make_cut(path):
    path.write_bytes(zoo()["jpeg 420"][:100])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_missing, "No such file"),
        (make_empty, "the file is empty"),
        (make_text, "begin with b'<html>40'"),
        (make_cut, "cut short"),
    ],
)
def test_what_has_no_size_is_named_with_the_reason(make, why, tmp_path):
    path = tmp_path / "photo.jpg"
    make(path)
    with pytest.raises(DecodeError, match=rf'^sample 7 \("{path}"\): .*{why}') as caught:
        image_size(path, index=7)
    assert caught.value.index == 7
    assert caught.value.source == str(path)


def test_a_name_with_a_nul_is_no_file():
    with pytest.raises(DecodeError, match="null"):
        image_size("photo\0.jpg")
