"""The index beside the files: what it saves reading, when it is believed, and how it comes to be."""

import os
import threading

import numpy as np
import pytest
from support.photo_zoo import exif, jpeg, photo, with_exif

from loaders import CenterCrop, DecodeError, ImageFolder, RandomPatches, RandomResizedCrop, image_size, read_image
from loaders.errors import MissingExtraError
from loaders.images.decode import files, image, restart, restart_index, restart_table
from loaders.images.decode.header import read_header
from loaders.images.decode.image import open_image
from loaders.images.decode.restart import find_restarts
from loaders.images.decode.restart_index import NAME, RestartIndex, index_of

REGION = (20, 30, 70, 50)


def cut(whole, region=REGION):
    left, top, width, height = region
    return whole[top : top + height, left : left + width]


def restarts_of(data):
    return find_restarts(data, read_header(data).jpeg)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What this process knows of folders, as if it had just begun."""

    def forget():
        monkeypatch.setattr(restart_index, "_indexes", {})
        monkeypatch.setattr(restart_index, "_homes", {})
        monkeypatch.setattr(restart_index, "_loose", RestartIndex(None))

    forget()
    return forget


@pytest.fixture
def reads(monkeypatch):
    """The bytes that are read of local files: "all" or how many."""
    noted, whole, parts = [], files._LocalFile.read, files._LocalFile.read_parts

    def read(self):
        noted.append("all")
        return whole(self)

    def read_parts(self, starts, ends):
        found = parts(self, starts, ends)
        noted.append(len(found))
        return found

    monkeypatch.setattr(files._LocalFile, "read", read)
    monkeypatch.setattr(files._LocalFile, "read_parts", read_parts)
    return noted


@pytest.fixture
def folder(tmp_path, forgotten, monkeypatch):
    """Three photos below a folder that has an index of them, of more places than such small ones would have."""
    monkeypatch.setattr(restart, "_ANCHORS_NBYTES", 100)
    index = index_of(tmp_path)
    for number, interval in enumerate((3, 1, 9)):
        path = tmp_path / "train" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(with_exif(jpeg(photo(name=("cat", "coffee", "flower")[number]), restart=interval), exif(6)))
        read_image(path, region=(0, 0, 8, 8))
    assert index.save()
    assert len(index) == 3
    forgotten()
    return tmp_path


def test_only_the_bytes_around_a_window_are_read(folder, reads):
    path = folder / "train" / "1.jpg"
    whole = read_image(path)
    reads.clear()
    np.testing.assert_array_equal(read_image(path, region=(20, 30, 8, 9)), cut(whole, (20, 30, 8, 9)))
    assert reads[0] < path.stat().st_size / 2
    assert len(reads) == 1


def test_a_size_takes_the_header_alone(folder, reads):
    assert image_size(folder / "train" / "1.jpg") == (97, 131)
    assert reads == [read_header((folder / "train" / "1.jpg").read_bytes()).jpeg.scan_at]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_read_like_a_file(tmp_path):
    data = jpeg(photo(), restart=3)
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: cut(read_image(path, region=(0, 0, 131, 90))), lambda path: image_size(path)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
        writer.start()
        found = read(tmp_path / "pipe")
        writer.join(30)
        if isinstance(found, tuple):
            assert found == (131, 97)
        else:
            np.testing.assert_array_equal(found, cut(read_image(data)))


def test_paths_may_be_relative_and_the_folder_may_be_moved(folder, reads, monkeypatch):
    whole = read_image(folder / "train" / "0.jpg")
    moved = folder.parent / "moved"
    os.rename(folder, moved)
    monkeypatch.chdir(moved / "train")
    reads.clear()
    np.testing.assert_array_equal(read_image("0.jpg", region=REGION), cut(whole))
    assert "all" not in reads
    os.rename(moved, folder)


@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_was_replaced_is_seen_as_it_is_now(folder, same_time, same_size):
    path = folder / "train" / "0.jpg"
    before = path.stat()
    # Fewer bytes and none of the same markers; filled up behind the end where the size is to be the same.
    other = jpeg(photo(97, 131, "retina"), restart=1, quality=40)
    path.write_bytes(other + bytes(before.st_size - len(other) if same_size else 0))
    times = (before.st_atime_ns, before.st_mtime_ns + (0 if same_time else 10**9))
    os.utime(path, ns=times)
    for _ in range(2):
        np.testing.assert_array_equal(read_image(path, region=REGION), cut(read_image(other)))


def brighter(data):
    """The same segments, and another table to make pixels of them."""
    at = data.index(b"\xff\xdb") + 5
    return data[:at] + bytes([data[at] + 9]) + data[at + 1 :]


def misnumbered(data):
    """The same segments, and two markers exchanged."""
    at = [data.index(marker, data.index(b"\xff\xda")) + 1 for marker in (b"\xff\xd4", b"\xff\xd5")]
    content = bytearray(data)
    content[at[0]], content[at[1]] = content[at[1]], content[at[0]]
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "seconds"),
    [(brighter, 1), (lambda data: brighter(data) + b"!", 0), (misnumbered, 0), (misnumbered, 1)],
)
def test_a_change_of_few_bytes_is_seen(folder, change, seconds, capfd):
    path = folder / "train" / "1.jpg"
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(change(before))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))
    part = read_image(path, region=(0, 0, 97, 131))
    np.testing.assert_array_equal(part, read_image(change(before), backend="opencv"))
    assert (part != read_image(before)).any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_an_orientation_changed_in_place_turns_regions_sizes_and_crops(folder, orientation, place):
    path = folder / "train" / "0.jpg"
    before, status = path.read_bytes(), path.stat()
    at = before.index(exif(6)) + exif(6).index(b"\0\6\0\0")
    path.write_bytes(before[: at + 1] + bytes([orientation]) + before[at + 2 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    source = path if place == "here" else f"file://{path}"
    whole = read_image(path.read_bytes())
    high, wide = whole.shape[:2]
    for region in ((2, 3, 40, 30), (wide - 9, high - 8, 9, 8)):
        np.testing.assert_array_equal(read_image(source, region=region), cut(whole, region))
    assert image_size(source) == (wide, high)
    crop = CenterCrop(64, exact=True)
    np.testing.assert_array_equal(crop.read(source), crop.apply(whole))


def test_a_file_that_changed_is_read_whole_once_and_then_by_its_windows(folder, reads):
    path = folder / "train" / "0.jpg"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(exif(6), exif(8)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    whole = read_image(path)
    reads.clear()
    for _ in range(3):
        np.testing.assert_array_equal(read_image(path, region=REGION), cut(whole))
    assert reads.count("all") == 1


def test_a_size_told_before_a_change_is_not_believed_after_it(folder):
    path = folder / "train" / "0.jpg"
    status, upright = path.stat(), jpeg(photo(), restart=3)
    filled = upright + bytes(status.st_size - len(upright))
    path.write_bytes(filled)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open_image(path) as file:
        assert file.size() == (131, 97)
        np.testing.assert_array_equal(file.read("RGB", (100, 0, 31, 97)), read_image(upright)[:, 100:])


FORGED = {
    "no interval": {"interval": 0},
    "another interval": {"interval": 1},
    "no stride": {"stride": 0},
    "a long stride": {"stride": 60_000},
    "no orientation": {"orientation": 0},
    "a ninth orientation": {"orientation": 9},
    "another orientation": {"orientation": 3},
    "no sampling": {"sampling": (0, 0)},
    "an unusual sampling": {"sampling": (3, 1)},
    "another sampling": {"sampling": (1, 1)},
    "no width": {"width": 0},
    "no height": {"height": 0},
    "a larger picture": {"height": 60_000},
    "a smaller picture": {"height": 80},
    "the size elsewhere": {"size_at": 3},
    "the size behind the end": {"size_at": 9_999},
    "no header": {"header": b""},
    "another header": {"header": jpeg(photo(), quality=40)[:600]},
    "no places": {"anchors": np.zeros(0, np.uint32)},
    "one place": {"anchors": np.full(1, 700, np.uint32)},
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_entry_changes_no_pixel_and_is_no_error(how, folder, forgotten):
    path = folder / "train" / "0.jpg"
    index, status = RestartIndex(str(folder)), path.stat()
    known = index.get(b"train/0.jpg", status.st_size, status.st_mtime_ns)
    assert_forgery_is_harmless(folder, forgotten, known._replace(**FORGED[how]))


@pytest.mark.parametrize(
    "change",
    [
        lambda anchors: anchors[::-1],
        lambda anchors: anchors * 0 + anchors[0],
        lambda anchors: anchors + 1,
        lambda anchors: anchors - anchors[0],
        lambda anchors: np.append(anchors[:-1], np.uint32(2**32 - 1)),
        lambda anchors: np.roll(anchors, 1),
    ],
)
def test_forged_places_change_no_pixel_and_are_no_error(change, folder, forgotten):
    path = folder / "train" / "0.jpg"
    index, status = RestartIndex(str(folder)), path.stat()
    known = index.get(b"train/0.jpg", status.st_size, status.st_mtime_ns)
    assert_forgery_is_harmless(folder, forgotten, known._replace(anchors=change(known.anchors).astype(np.uint32)))


def assert_forgery_is_harmless(folder, forgotten, forged):
    path = folder / "train" / "0.jpg"
    index, status, whole = RestartIndex(str(folder)), path.stat(), read_image(path)
    index.add(b"train/0.jpg", status.st_size, status.st_mtime_ns, forged)
    assert index.save()
    for source in (path, f"file://{path}"):
        for region in (REGION, (0, 0, 97, 131), (0, 0, 1, 1), (90, 120, 7, 11)):
            forgotten()
            np.testing.assert_array_equal(read_image(source, region=region), cut(whole, region))
        forgotten()
        assert image_size(source) == (97, 131)
        forgotten()
        np.testing.assert_array_equal(CenterCrop(64, exact=True).read(source), CenterCrop(64, exact=True).apply(whole))


@pytest.mark.parametrize("left", [0, 40, 300, -1])
def test_an_index_that_is_cut_short_in_use_is_as_if_there_were_none(left, folder):
    index, paths = index_of(folder), sorted((folder / "train").iterdir())
    nbytes = (folder / NAME).stat().st_size
    os.truncate(folder / NAME, left if left >= 0 else nbytes - 1)
    for path in paths:
        np.testing.assert_array_equal(read_image(path, region=REGION), cut(read_image(path)))
    index.add(b"new", 1, 1, restarts_of(jpeg(photo(), restart=3)))
    assert index.save()
    assert RestartIndex(str(folder)).get(b"new", 1, 1) is not None


def test_a_file_that_was_cut_or_lost_is_an_error(folder):
    path = folder / "train" / "0.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError, match="cut short"):
        read_image(path, region=REGION)
    path.unlink()
    with pytest.raises(DecodeError, match="No such file"):
        read_image(path, region=REGION)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(b"no index at all"),
        lambda path: np.save(path, np.arange(9)),
        lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
        lambda path: np.save(path, np.zeros(500, np.uint8)),
        lambda path: path.unlink(),
    ],
)
def test_an_index_that_is_none_is_as_if_there_were_none(folder, spoil):
    spoil(folder / NAME)
    for path in sorted((folder / "train").iterdir()):
        np.testing.assert_array_equal(read_image(path, region=REGION), cut(read_image(path)))
    assert index_of(folder).save()
    assert len(index_of(folder)) in (0, 3)  # 0: without any file the folder has no index to be filled


@pytest.mark.parametrize("seed", range(3))
def test_damage_to_the_index_changes_no_pixel(folder, seed, forgotten):
    rng, content = np.random.default_rng(seed), bytearray((folder / NAME).read_bytes())
    wholes = {path: read_image(path) for path in (folder / "train").iterdir()}
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            damaged[int(rng.integers(len(damaged)))] = rng.integers(256)
        (folder / "new").write_bytes(damaged)
        os.replace(folder / "new", folder / NAME)
        forgotten()
        for path, whole in wholes.items():
            np.testing.assert_array_equal(read_image(path, region=REGION), cut(whole))


def test_what_was_found_out_is_kept_where_there_is_no_index(tmp_path, reads):
    (tmp_path / "1.jpg").write_bytes(jpeg(photo(), restart=3))
    for _ in range(3):
        read_image(tmp_path / "1.jpg", region=REGION)
    assert reads.count("all") == 1
    assert os.listdir(tmp_path) == ["1.jpg"]


def test_what_is_added_without_a_place_is_bounded(monkeypatch):
    monkeypatch.setattr(restart_index, "_UNSAVED", 5)
    index, restarts = RestartIndex(None), restarts_of(jpeg(photo(), restart=3))
    for number in range(20):
        index.add(b"%d" % number, 1, 2, restarts)
    assert len(index) == 5
    assert index.get(b"19", 1, 2) is restarts


def test_an_index_is_saved_now_and_then_by_the_one_that_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(restart_index, "_SAVE_EVERY_S", 0)
    monkeypatch.setattr(restart_index, "_SAVING_SHARE", float("inf"))
    index = RestartIndex(str(tmp_path))
    index.add(b"1.jpg", 10, 20, restarts_of(jpeg(photo(), restart=3)))
    assert os.listdir(tmp_path) == []
    index.save_now_and_then()
    assert RestartIndex(str(tmp_path)).get(b"1.jpg", 10, 20) is not None


def test_an_index_that_another_process_began_is_found_and_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(photo(), restart=1))
    read_image("1.jpg", region=(0, 0, 8, 8))
    assert RestartIndex(str(tmp_path)).save()
    read_image("2.jpg", region=(0, 0, 8, 8))
    assert len(index_of(tmp_path)) == 1


def test_equal_tables_are_kept_once(tmp_path):
    index, restarts = RestartIndex(str(tmp_path)), restarts_of(jpeg(photo(), restart=9))
    for number in range(200):
        index.add(b"%d" % number, number, 0, restarts._replace(header=restarts.header + bytes([number % 2])))
        if number % 50 == 49:
            assert index.save()
    size = (tmp_path / NAME).stat().st_size
    assert size < 200 * (8 + 64 + restarts.anchors.nbytes) + 2 * len(restarts.header) + 500
    again = RestartIndex(str(tmp_path))
    for number in range(200):
        assert again.get(b"%d" % number, number, 0).header[-1] == number % 2
    assert again.get(b"200", 200, 0) is None


def test_of_two_that_fill_an_index_neither_loses_what_the_other_found(tmp_path):
    restarts = restarts_of(jpeg(photo(), restart=3))
    one, other = RestartIndex(str(tmp_path)), RestartIndex(str(tmp_path))
    one.add(b"1", 1, 1, restarts)
    other.add(b"2", 2, 2, restarts)
    assert one.save()
    assert other.save()
    found = RestartIndex(str(tmp_path))
    for number in (1, 2):
        assert found.get(b"%d" % number, number, number)._replace(anchors=0) == restarts._replace(anchors=0)
        assert found.get(b"%d" % number, number, number).anchors.tolist() == restarts.anchors.tolist()


def test_one_that_cannot_write_now_goes_on_without(folder, monkeypatch):
    restarts = restarts_of(jpeg(photo(), restart=3))
    index, before = index_of(folder), (folder / NAME).read_bytes()
    index.add(b"late", 1, 1, restarts)

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert not index.save()
    assert index.get(b"late", 1, 1) is restarts
    assert (folder / NAME).read_bytes() == before
    assert sorted(os.listdir(folder)) == [NAME, "train"]


@pytest.mark.parametrize("interval", [9, 0])
def test_reading_writes_no_file_beside_the_photos(interval, tmp_path, monkeypatch):
    monkeypatch.setattr(restart_index, "_SAVE_EVERY_S", 0)
    monkeypatch.setattr(restart_index, "_UNSAVED", 1)
    for number in range(3):
        path = tmp_path / "class" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(photo(), restart=interval))
    before = sorted(tmp_path.rglob("*"))
    for crop in (RandomResizedCrop(32), RandomPatches(20), None):
        for sample in ImageFolder(tmp_path, crop=crop):
            assert sample["image"].shape[2] == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_is_there_is_used_and_left_as_it_is(folder, reads, monkeypatch):
    monkeypatch.setattr(image, "_MOST", 2)
    (folder / "train" / "new.jpg").write_bytes(jpeg(photo(), restart=9))
    before = (folder / NAME).read_bytes()
    for _ in range(2):
        for sample in ImageFolder(folder, crop=RandomResizedCrop(32)):
            assert sample["image"].shape == (32, 32, 3)
    assert reads.count("all") == 1  # the one that it does not know
    assert (folder / NAME).read_bytes() == before
    assert sorted(os.listdir(folder)) == [NAME, "train"]


def test_a_photo_behind_a_linked_folder_is_found_in_the_index(folder, tmp_path_factory, reads):
    (folder / "again").symlink_to("train")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "class"
    elsewhere.symlink_to(folder / "train")
    for place in (folder / "again", elsewhere):
        read_image(place / "0.jpg", region=(0, 0, 8, 8))
    assert "all" not in reads


def test_an_entry_is_as_large_as_its_layout_says():
    assert restart_table._ENTRY.size == 64


# -- elsewhere

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def remote(folder):
    """The same folder in fsspec's file system in memory, with what was asked of it."""
    store = fsspec.filesystem("memory")
    for path in (NAME, "train/0.jpg", "train/1.jpg"):
        store.pipe_file(f"/photos/{path}", (folder / path).read_bytes())
    yield store
    store.rm("/photos", recursive=True)


def test_of_a_remote_file_only_ranges_are_asked_for(remote, folder, monkeypatch):
    whole, asked = read_image("memory:///photos/train/1.jpg"), []
    np.testing.assert_array_equal(whole, read_image(folder / "train" / "1.jpg"))
    cat_ranges, cat_file = type(remote).cat_ranges, type(remote).cat_file

    def noted(self, paths, starts, ends, **options):
        asked.extend(zip(starts, ends, strict=True))
        return cat_ranges(self, paths, starts, ends, **options)

    def cat(self, path, start=None, end=None, **options):
        assert NAME in path or start is not None
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(remote), "cat_ranges", noted)
    monkeypatch.setattr(type(remote), "cat_file", cat)
    count = []
    for gap in (0, 1 << 16):
        monkeypatch.setattr(files, "_GAP_NBYTES", gap)
        asked.clear()
        part = read_image("memory:///photos/train/1.jpg", region=(20, 30, 8, 9))
        np.testing.assert_array_equal(part, cut(whole, (20, 30, 8, 9)))
        assert gap or sum(end - start for start, end in asked) < remote.size("/photos/train/1.jpg") / 2
        count.append(len(asked))
    assert count[0] > count[1] == 1


def test_a_remote_file_may_lack_an_index_or_be_missing(remote):
    remote.rm(f"/photos/{NAME}")
    url = "memory:///photos/train/0.jpg"
    assert image_size(url) == (97, 131)
    np.testing.assert_array_equal(read_image(url, region=REGION), cut(read_image(url)))
    with pytest.raises(DecodeError, match=r"memory:///photos/none\.jpg"):
        read_image("memory:///photos/none.jpg")


def test_where_one_may_not_look_around_photos_are_read_all_the_same(remote, monkeypatch):
    def refused(self, path, **options):
        raise PermissionError(13, "Forbidden")

    url = "memory:///photos/train/0.jpg"
    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "exists", refused)
        np.testing.assert_array_equal(read_image(url, region=REGION), cut(read_image(url)))


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loaders\[remote\]'"):
        read_image("s3://bucket/1.jpg")
