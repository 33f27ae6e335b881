"""A DecodedCache with a path: it outlives the run, is shared by runs, and is refused where it does not fit."""

import itertools
import os
import pickle
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from loaders import ArrayDataset, DatasetError, DecodedCache, ImageFiles, ImageFolder, Resize
from loaders.datasets.cache import records
from loaders.datasets.cache.file import TAIL_AT

ROOM = 1 << 20


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            write(root / name / f"{number}.png", number)
    return root


def write(path, value):
    cv2.imwrite(str(path), np.full((6, 8, 3), value, np.uint8))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


def epoch(dataset):
    return [int(dataset[index]["image"][0, 0, 0]) for index in range(len(dataset))]


def unlink_photos(folder):
    for file in folder.glob("*/*.png"):
        file.unlink()


def test_another_run_reads_nothing(folder, path):
    cache = DecodedCache(ImageFolder(folder), ROOM, path=path)
    expected = epoch(cache)
    dataset = ImageFolder(folder)
    again = DecodedCache(dataset, ROOM, path=path)
    unlink_photos(folder)
    assert epoch(again) == expected == [0, 1, 2, 3] * 2
    assert (again.cached_count, again.hit_rate) == (8, 1.0)


def test_a_process_of_its_own_finds_what_was_left(folder, path):
    program = (
        "import sys; from loaders import *; cache = DecodedCache(ImageFolder(sys.argv[1]), 1 << 20, path=sys.argv[2])\n"
        "[cache[index] for index in range(8)]; print(cache.hit_rate)"
    )
    run = [sys.executable, "-c", program, str(folder), str(path)]
    rates = [subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout for _ in range(2)]
    assert [float(rate) for rate in rates] == [0.0, 1.0]


def test_two_that_are_open_at_once_fill_each_other(folder, path):
    one, other = (DecodedCache(ImageFolder(folder), ROOM, path=path) for _ in range(2))
    for index in range(8):
        (one, other)[index % 2][index]
    unlink_photos(folder)
    assert epoch(one) == epoch(other) == [0, 1, 2, 3] * 2


def test_a_pickled_copy_opens_the_same_file(folder, path):
    cache = DecodedCache(ImageFolder(folder), ROOM, path=path)
    epoch(cache)
    pickled = pickle.dumps(cache)
    unlink_photos(folder)
    assert epoch(pickle.loads(pickled)) == [0, 1, 2, 3] * 2


def test_a_relative_path_is_the_same_file_after_chdir(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = DecodedCache(ImageFolder(folder), ROOM, path="here")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(cache))._records.path == str(tmp_path / "here")


def test_it_is_one_file_that_takes_what_it_holds(folder, path):
    epoch(DecodedCache(ImageFolder(folder), ROOM, path=path))
    assert os.listdir(path.parent) in (["photos", "cache"], ["cache", "photos"])
    status = path.stat()
    assert status.st_size == ROOM
    assert status.st_blocks * 512 < ROOM // 2


CHANGES = {
    "a file more": lambda folder: write(folder / "dog" / "9.png", 9),
    "a file renamed": lambda folder: (folder / "dog" / "3.png").rename(folder / "dog" / "4.png"),
    "a class renamed": lambda folder: (folder / "cat").rename(folder / "cow"),
    "a file written anew": lambda folder: os.utime(folder / "dog" / "1.png", ns=(1, 1)),
    "a file moved to another class": lambda folder: shutil.move(folder / "cat" / "3.png", folder / "dog" / "a.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_has_changed_is_refused_and_the_file_left_alone(folder, path, change):
    epoch(DecodedCache(ImageFolder(folder), ROOM, path=path))
    before = path.read_bytes()
    change(folder)
    with pytest.raises(DatasetError, match=r'cache" cannot be used: (the dataset has changed|it was made for 8 samp)'):
        DecodedCache(ImageFolder(folder), ROOM, path=path)
    assert path.read_bytes() == before


def test_other_labels_settings_and_sizes_are_refused(folder, path):
    files = sorted(folder.glob("*/*.png"))
    DecodedCache(ImageFiles(files, range(8)), ROOM, path=path)
    DecodedCache(ImageFiles(list(files), range(8)), ROOM, path=path)
    for dataset, nbytes, message in (
        (ImageFiles(files, range(1, 9)), ROOM, "other files, labels or settings"),
        (ImageFiles(files), ROOM, "other files, labels or settings"),
        (ImageFiles(files[:7], range(7)), ROOM, "made for 8 samples, the dataset has 7"),
        (ImageFiles(files, range(8)), 2 * ROOM, "made with nbytes=1,048,576, not 2,097,152"),
    ):
        with pytest.raises(DatasetError, match=message):
            DecodedCache(dataset, nbytes, path=path)


@pytest.mark.parametrize("content", [b"", b"somebody's thesis", bytes(ROOM)])
def test_a_file_of_something_else_is_never_touched(folder, path, content):
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="it is not a cache"):
        DecodedCache(ImageFolder(folder), ROOM, path=path)
    assert path.read_bytes() == content


# -- whose it is


def test_it_is_made_for_this_user_alone(folder, path):
    before = os.umask(0)
    try:
        DecodedCache(ImageFolder(folder), ROOM, path=path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o660, 0o602, 0o666, 0o620])
def test_a_file_that_others_may_write_is_refused(folder, path, mode):
    epoch(DecodedCache(ImageFolder(folder), ROOM, path=path))
    path.chmod(mode)
    with pytest.raises(DatasetError, match=rf"other users may write to it \(mode {mode:o}\)"):
        DecodedCache(ImageFolder(folder), ROOM, path=path)
    path.chmod(0o644)
    assert DecodedCache(ImageFolder(folder), ROOM, path=path).cached_count == 8


def test_a_file_of_another_user_is_refused(folder, path, monkeypatch):
    DecodedCache(ImageFolder(folder), ROOM, path=path)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(path).st_uid + 1)
    with pytest.raises(DatasetError, match="it belongs to another user"):
        DecodedCache(ImageFolder(folder), ROOM, path=path)


def test_what_is_no_regular_file_is_refused(folder, path):
    os.mkfifo(path)
    with pytest.raises(DatasetError, match="it is not a regular file"):
        DecodedCache(ImageFolder(folder), ROOM, path=path)


def test_a_class_of_this_package_that_moves_to_another_module_changes_nothing(folder, path, monkeypatch):
    files = ImageFiles(sorted(folder.glob("*/*.png")), normalize=((0, 0, 0), (1, 1, 1)), crop=Resize(4))
    DecodedCache(files, ROOM, path=path)
    for kind in (ImageFiles, Resize, type(files.paths)):
        monkeypatch.setattr(kind, "__module__", "loaders.elsewhere")
    DecodedCache(files, ROOM, path=path)
    monkeypatch.setattr(ImageFiles, "__module__", "another")
    with pytest.raises(DatasetError, match="the dataset has changed"):
        DecodedCache(files, ROOM, path=path)


# -- damaged


def test_a_file_that_was_cut_short_is_refused(folder, path):
    epoch(DecodedCache(ImageFolder(folder), ROOM, path=path))
    os.truncate(path, ROOM // 2)
    with pytest.raises(DatasetError, match="it is not a cache"):
        DecodedCache(ImageFolder(folder), ROOM, path=path)


def test_a_dataset_that_cannot_be_pickled_cannot_be_recognised(path):
    class Local:
        def __init__(self):
            self.files = [open(os.devnull)]  # noqa: SIM115

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return 1

    dataset = Local()
    with pytest.raises(DatasetError, match=r"Local cannot be recognised again.*pickle"):
        DecodedCache(dataset, ROOM, path=path)
    dataset.files[0].close()
    dataset.files = [len, Local, lambda: 1]  # by their names
    DecodedCache(dataset, ROOM, path=path)
    DecodedCache(dataset, ROOM, path=path)


def test_equal_strings_are_equal_whether_or_not_they_are_one_object(path):
    text = "".join(["te", "xt"])
    DecodedCache([text, text, "a" * 3], ROOM, path=path)
    DecodedCache(["".join(["t", "ext"]), text, "".join(["a"] * 3)], ROOM, path=path)


def test_a_folder_that_is_not_there_is_the_systems_error_and_leaves_nothing(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        DecodedCache(ImageFolder(folder), ROOM, path=tmp_path / "nowhere" / "cache")


def test_of_two_that_make_the_file_at_once_the_first_ones_stays(folder, path, monkeypatch):
    link = os.link
    other = []

    def late(draft, target):
        monkeypatch.setattr(os, "link", link)
        other.append(DecodedCache(ImageFolder(folder), ROOM, path=path))
        epoch(other[0])
        link(draft, target)

    monkeypatch.setattr(os, "link", late)
    cache = DecodedCache(ImageFolder(folder), ROOM, path=path)
    assert cache.cached_count == 8
    assert sorted(os.listdir(path.parent)) == ["cache", "photos"]


# -- after a power failure


def record_of(cache, index):
    """(offset, nbytes) of a record."""
    offset = int(cache._records._table[index])
    return offset, cache._records._word(offset // 8 + records._NBYTES)


@pytest.mark.parametrize(
    "lost", [slice(0, 8), slice(8, 16), slice(24, 32), slice(40, 64), slice(-100, None), slice(None)]
)
def test_bytes_that_never_reached_the_disk_are_read_anew(path, lost):
    dataset = ArrayDataset({"image": np.random.default_rng(0).integers(1, 255, (4, 9, 9, 3), np.uint8)})
    cache = DecodedCache(dataset, ROOM, path=path)
    expected = epoch(cache)
    offset, nbytes = record_of(cache, 2)
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        piece = memoryview(content)[offset : offset + nbytes][lost]
        changed = any(piece)
        piece[:] = bytes(len(piece))
        file.seek(0)
        file.write(content)
    assert changed
    again = DecodedCache(dataset, ROOM, path=path)
    for _ in range(2):
        np.testing.assert_array_equal(again[2]["image"], dataset[2]["image"])
    assert epoch(again) == expected
    assert again.hit_rate == 5 / 6


def test_a_header_older_than_the_table_overwrites_no_record(path):
    dataset = ArrayDataset({"image": np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(100, 1)})
    cache = DecodedCache(dataset, ROOM, path=path)
    for index in range(5):
        cache[index]
    cache._records._storage.store(TAIL_AT, cache._records._first)
    again = DecodedCache(dataset, ROOM, path=path)
    for index in range(6):  # the first five are read before, and trusted
        again[index]
    assert epoch(again) == list(range(6))
    places = sorted(record_of(again, index) for index in range(6))
    assert all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(places))
