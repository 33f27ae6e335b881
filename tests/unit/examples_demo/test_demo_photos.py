import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from examples.demo import photos
from loaders.errors import DecodeError, MissingExtraError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return photos.cache_folder()


def digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.jpg")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def covered(name: str, split: str, height: int, width: int) -> np.ndarray:
    """The pixels of a photograph that the crops of a split cover."""
    mask = np.zeros((height, width), bool)
    for left, top, right, bottom in photos.crop_boxes(name, split, height, width):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("name", photos.PHOTOS)
def test_no_pixel_of_a_photograph_is_in_both_train_and_val(name):
    height, width = photos.read_photo(name).shape[:2]
    train, val = covered(name, "train", height, width), covered(name, "val", height, width)
    assert not (train & val).any()
    assert train.mean() > 0.6
    assert val.mean() > 0.1


@pytest.mark.parametrize("shape", [(97, 301), (301, 97), (64, 64)])
def test_the_split_holds_for_odd_shapes(shape):
    assert not (covered("cat", "train", *shape) & covered("cat", "val", *shape)).any()


def test_ten_classes_of_square_jpeg_files_are_cut(demo_cache):
    folder = next(demo_cache.glob("loaders/*/photos"))
    for split, count in photos.PER_CLASS.items():
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(photos.PHOTOS)
        for name in photos.PHOTOS:
            assert len(list((folder / split / name).glob("*.jpg"))) == count
    assert len(photos.PHOTOS) == 10
    for file in folder.glob("*/*/000.jpg"):
        image = cv2.imread(str(file))
        assert image.shape == (photos.FILE_SIZE, photos.FILE_SIZE, 3)


def test_a_crop_shows_its_place_in_the_photograph(demo_cache):
    left, top, right, bottom = photos.crop_boxes("retina", "val", 1411, 1411)[0]
    expected = cv2.resize(photos.read_photo("retina")[top:bottom, left:right], (160, 160), interpolation=cv2.INTER_AREA)
    found = cv2.imread(str(next(demo_cache.glob("loaders/*/photos/val/retina/000.jpg"))))
    assert np.abs(found.astype(int) - expected).mean() < 3


def test_two_builds_give_the_same_bytes_and_need_no_network(demo_cache, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert digest(photos.demo_photos()) == digest(next(demo_cache.glob("loaders/*/photos")))


def test_photographs_that_are_there_are_not_cut_again(cache, monkeypatch):
    (cache / "photos").mkdir(parents=True)
    monkeypatch.setattr(photos, "_cut", lambda *args: pytest.fail("cut again"))
    assert photos.demo_photos() == cache / "photos"


def test_a_killed_build_leaves_nothing_that_is_taken_as_complete(cache, monkeypatch):
    script = """
import os, signal
from examples.demo import photos
cut = photos._cut
def cut_then_die(name, folder):
    cut(name, folder)
    os.kill(os.getpid(), signal.SIGKILL)
photos._cut = cut_then_die
photos.demo_photos()
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    assert list(cache.glob(".photos-*/photos/train/astronaut/*.jpg"))
    assert not (cache / "photos").exists()
    monkeypatch.setattr(photos, "PER_CLASS", {"train": 2, "val": 1})
    assert len(list(photos.demo_photos().rglob("*.jpg"))) == 30


def test_of_two_builds_at_once_one_wins_and_the_other_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(photos, "PER_CLASS", {"train": 2, "val": 1})
    cut = photos._cut

    def cut_while_another_builds(name, folder):
        monkeypatch.setattr(photos, "_cut", cut)
        photos.demo_photos()
        cut(name, folder)

    monkeypatch.setattr(photos, "_cut", cut_while_another_builds)
    assert len(list(photos.demo_photos().rglob("*.jpg"))) == 30
    assert [path.name for path in cache.iterdir()] == ["photos"]


def test_a_failed_build_says_why_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setitem(photos.PHOTOS, "tissue", ("skimage", "__init__.py"))
    monkeypatch.setattr(photos, "PER_CLASS", {"train": 1, "val": 1})
    with pytest.raises(DecodeError, match=r"__init__\.py"):
        photos.demo_photos()
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_named_with_the_extra_to_install(cache, monkeypatch):
    monkeypatch.setitem(photos.PHOTOS, "cat", ("skimage_is_not_here", "data/chelsea.png"))
    with pytest.raises(MissingExtraError, match=r"skimage_is_not_here.*pip install 'loaders\[demo\]'"):
        photos.demo_photos()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/loaders"),
        ("linux", {}, "/home/ada/.cache/loaders"),
        ("darwin", {}, "/home/ada/Library/Caches/loaders"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/loaders"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(platform, variables, expected, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert photos.cache_folder().parent == Path(expected)
