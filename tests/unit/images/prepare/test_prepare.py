"""`loaders prepare`: the same tree with restart markers, no pixel changed unless asked for, nothing lost."""

import json
import os
import re
import socket

import cv2
import numpy as np
import pytest
from support.fake_jpegtran import FakeJpegtran
from support.photo_zoo import exif, jpeg, photo, segment, with_exif, with_segments, zoo
from typer.testing import CliRunner

from loaders import ImageFolder, RandomPatches, read_image
from loaders.cli import app
from loaders.images.decode import files
from loaders.images.decode.header import read_header
from loaders.images.decode.jpeg import metadata
from loaders.images.decode.restart import find_restarts
from loaders.images.decode.restart_index import NAME, RestartIndex
from loaders.images.prepare.photo import interval

PROFILE = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(range(200)))
XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")


def prepare(source, target, *options):
    return CliRunner().invoke(app, ["prepare", str(source), str(target), *map(str, options)])


def restarts_of(data):
    header = read_header(data)
    return None if header is None or header.jpeg is None else find_restarts(data, header.jpeg)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18 + len(content)))
    return folder


@pytest.fixture
def source(tmp_path):
    """Photos of all kinds in folders, and what lies beside them."""
    told = [segment(0xE1, b"Exif\0\0" + exif(6)), XMP, PROFILE, segment(0xFE, b"by me")]
    contents = {
        "cat/1.jpg": jpeg(photo(200, 150)),
        "cat/more/told.JPEG": with_segments(jpeg(photo(200, 150), "422"), *told),
        "cat/grey.jpg": zoo()["jpeg grey"],
        "dog/progressive.jpg": zoo()["jpeg 444 progressive"],
        "dog/without an ending": jpeg(photo(90, 120, "coffee")),
        "dog/picture.png": zoo()["png"],
        "dog/.hidden.jpg": jpeg(photo(50, 50)),
        "labels.csv": b"1,2\n",
        "empty.jpg": b"",
        "no photo.jpg": b"text",
        os.fsdecode(b"dog/\xff name.jpg"): jpeg(photo(64, 64)),
    }
    (tmp_path / "source" / "nothing here").mkdir(parents=True)
    return write(tmp_path / "source", contents)


DAMAGED = {
    "cut.jpg": jpeg(photo())[:-500],
    "cmyk.jpg": zoo()["jpeg cmyk"],
    "unusual.jpg": b"\xff\xd8\xff\xd9 no header",
}


def test_encoded_anew_every_jpeg_has_markers_and_all_else_is_copied(source, tmp_path):
    write(source, DAMAGED)
    done = prepare(source, tmp_path / "target", "--quality", 85, "--workers", 2)
    assert done.exit_code == 0, done.output
    before, after = tree(source), tree(tmp_path / "target")
    assert set(after) - set(before) == {NAME, ".loaders-prepare.json"}
    assert set(before) <= set(after)
    assert (tmp_path / "target" / "nothing here").is_dir()
    jpegs = {name for name, content in before.items() if content.startswith(b"\xff\xd8\xff")} - set(DAMAGED)
    for name, content in before.items():
        if name not in jpegs:
            assert after[name] == content
            continue
        assert restarts_of(after[name]) is not None
        was, now = read_image(content), read_image(after[name])
        assert was.shape == now.shape
        assert np.abs(was.astype(int) - now).mean() < 6
        assert metadata(content, read_header(content).jpeg) == metadata(after[name], read_header(after[name]).jpeg)
        assert (source / name).stat().st_mtime_ns == (tmp_path / "target" / name).stat().st_mtime_ns
    assert f"{len(jpegs)} JPEGs have restart markers." in done.output
    assert f"{len(before) - len(jpegs) - 3} other files copied." in done.output
    assert "3 JPEGs copied unchanged:" in done.output
    assert "  cmyk.jpg: it has 4 colour components, like CMYK" in done.output
    assert re.search(r"  cut\.jpg: the JPEG is cut short: its [\d,]+ bytes end before the picture does", done.output)
    assert "  unusual.jpg: its header is damaged or unusual" in done.output


def test_grey_stays_grey_and_the_chroma_is_sampled_as_before(source, tmp_path):
    assert prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1).exit_code == 0
    for name in ("cat/grey.jpg", "cat/more/told.JPEG", "dog/progressive.jpg"):
        before, after = (read_header((folder / name).read_bytes()).jpeg for folder in (source, tmp_path / "target"))
        assert (before.components, before.sampling) == (after.components, after.sampling)


def test_a_longest_side_shrinks_what_is_larger_and_nothing_else(source, tmp_path):
    assert prepare(source, tmp_path / "target", "--max-side", 128, "--workers", 1).exit_code == 0
    sizes = {name: read_image(tmp_path / "target" / name).shape[:2] for name in ("cat/1.jpg", "cat/more/told.JPEG")}
    assert sizes == {"cat/1.jpg": (96, 128), "cat/more/told.JPEG": (128, 96)}  # the second is turned
    assert read_image(tmp_path / "target" / "dog/without an ending").shape == (120, 90, 3)


def test_pictures_behind_the_first_are_not_told_of_when_they_are_gone(tmp_path):
    told = segment(0xE2, b"MPF\0II*\0" + bytes(20))
    write(tmp_path / "source", {"1.jpg": with_segments(jpeg(photo()), PROFILE, told) + jpeg(photo(32, 32))})
    assert prepare(tmp_path / "source", tmp_path / "target", "--quality", 85, "--workers", 1).exit_code == 0
    after = (tmp_path / "target" / "1.jpg").read_bytes()
    assert metadata(after, read_header(after).jpeg) == [PROFILE]


def placed(data, marker, *segments):
    """A JPEG with segments before its last marker of a kind."""
    at = data.rindex(marker)
    return data[:at] + b"".join(segments) + data[at:]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("marker", [b"\xff\xc4", b"\xff\xda", b"\xff\xd9"])
def test_what_is_told_behind_the_frame_or_between_scans_is_kept(marker, progressive, tmp_path):
    before = placed(jpeg(photo(200, 150), progressive=progressive), marker, PROFILE, segment(0xFE, b"by me"))
    write(tmp_path / "source", {"1.jpg": before})
    done = prepare(tmp_path / "source", tmp_path / "target", "--quality", 85, "--workers", 1)
    assert "1 JPEGs have restart markers." in done.output
    after = (tmp_path / "target" / "1.jpg").read_bytes()
    assert metadata(after, read_header(after).jpeg) == [PROFILE, segment(0xFE, b"by me")]


def test_an_orientation_that_no_decoder_sees_turns_nothing(tmp_path):
    before = placed(jpeg(photo(200, 150), progressive=True), b"\xff\xda", segment(0xE1, b"Exif\0\0" + exif(6)))
    write(tmp_path / "source", {"1.jpg": before})
    done = prepare(tmp_path / "source", tmp_path / "target", "--quality", 85, "--workers", 1)
    assert "1.jpg: EXIF after its first scan would turn it" in done.output
    assert (tmp_path / "target" / "1.jpg").read_bytes() == before


@pytest.fixture
def jpegtran(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    found = FakeJpegtran(folder)
    monkeypatch.setenv("PATH", found.path)
    return found


def test_jpegtran_changes_no_pixel_and_keeps_what_is_told(jpegtran, tmp_path):
    told = [segment(0xE1, b"Exif\0\0" + exif(8)), PROFILE]
    picture = photo(200, 150)
    before = with_segments(jpeg(picture), *told)
    jpegtran.knows(before, 1, with_segments(jpeg(picture, restart=1), *told))  # 13 MCUs: a prime
    ready = jpeg(picture, "444", restart=5)
    write(tmp_path / "source", {"1.jpg": before, "ready.jpg": ready, "cut.jpg": before[:-9]})
    done = prepare(tmp_path / "source", tmp_path / "target", "--workers", 1)
    assert done.exit_code == 0, done.output
    after = tree(tmp_path / "target")
    assert restarts_of(after["1.jpg"]).interval == 1
    np.testing.assert_array_equal(read_image(after["1.jpg"]), read_image(before))
    assert metadata(after["1.jpg"], read_header(after["1.jpg"]).jpeg) == told
    assert after["ready.jpg"] == ready
    assert "2 JPEGs have restart markers." in done.output


WRONG = {
    "changed its pixels": lambda picture: jpeg(picture, restart=1, quality=80),
    "restart markers could not be added": lambda picture: jpeg(picture),
    "did not keep its metadata": lambda picture: with_exif(jpeg(picture, restart=1), exif(1)),
    "exited with status 0": lambda picture: b"",
    "cut short": lambda picture: jpeg(picture, restart=1)[:-50],
    "exited with status 1: Corrupt JPEG data": None,
}


@pytest.mark.parametrize("why", WRONG)
def test_what_jpegtran_spoils_is_copied_as_it_was_and_named(why, jpegtran, tmp_path):
    picture = photo(200, 150)
    if WRONG[why] is not None:
        jpegtran.knows(jpeg(picture), 1, WRONG[why](picture))
    write(tmp_path / "source", {"1.jpg": jpeg(picture)})
    done = prepare(tmp_path / "source", tmp_path / "target", "--workers", 1)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "target" / "1.jpg").read_bytes() == jpeg(picture)
    assert "1 JPEGs copied unchanged:" in done.output
    assert why in done.output


def test_without_jpegtran_the_ways_out_are_named_and_nothing_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = prepare(source, tmp_path / "target")
    assert done.exit_code == 1
    assert "libjpeg-turbo-progs" in done.output
    assert "--quality or --max-side" in done.output
    assert not (tmp_path / "target").exists()


def test_again_does_nothing_but_what_has_changed(source, tmp_path):
    target = tmp_path / "target"
    assert prepare(source, target, "--quality", 85, "--workers", 1).exit_code == 0
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in target.rglob("*.jpg")}
    again = prepare(source, target, "--quality", 85, "--workers", 1)
    assert "7 JPEGs have restart markers, 7 of them from an earlier run." in again.output
    prepared = [path for path in before if restarts_of(before[path][1]) is not None]
    assert all(path.stat().st_ino == before[path][0] for path in prepared)
    write(source, {"cat/1.jpg": jpeg(photo(210, 150)), "cat/new.jpg": jpeg(photo(77, 55))})
    (target / "cat" / "grey.jpg").unlink()
    third = prepare(source, target, "--quality", 85, "--workers", 1)
    assert "8 JPEGs have restart markers, 5 of them from an earlier run." in third.output
    assert read_image(target / "cat" / "1.jpg").shape == (150, 210, 3)
    assert prepare(source, target, "--quality", 85, "--workers", 1).output.startswith(
        "8 JPEGs have restart markers, 8 of"
    )


def test_files_whose_source_is_gone_or_elsewhere_are_named_and_the_status_says_so(source, tmp_path):
    prepare(source, tmp_path / "target", "--quality", 90)
    (source / "cat/1.jpg").rename(source / "dog/1.jpg")
    again = prepare(source, tmp_path / "target", "--quality", 90)
    assert again.exit_code == 1
    assert "1 files of an earlier run no longer have a source" in again.output
    assert os.path.join("cat", "1.jpg") in again.output
    (tmp_path / "target/cat/1.jpg").unlink()
    assert prepare(source, tmp_path / "target", "--quality", 90).exit_code == 0


def test_a_prepared_folder_can_be_prepared_again_into_another(source, tmp_path):
    assert prepare(source, tmp_path / "first", "--max-side", 160, "--workers", 1).exit_code == 0
    done = prepare(tmp_path / "first", tmp_path / "second", "--max-side", 100, "--workers", 1)
    assert done.exit_code == 0, done.output
    assert "7 JPEGs have restart markers." in done.output
    assert "4 other files copied." in done.output  # and not what the first run wrote for itself
    assert read_image(tmp_path / "second" / "cat" / "1.jpg").shape == (75, 100, 3)


def test_other_settings_need_another_folder(source, tmp_path):
    assert prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1).exit_code == 0
    done = prepare(source, tmp_path / "target", "--quality", 80, "--workers", 1)
    assert done.exit_code == 1
    assert "'quality': 85" in done.output
    assert json.loads((tmp_path / "target" / ".loaders-prepare.json").read_text())["quality"] == 85


@pytest.mark.parametrize(
    ("source_name", "target_name", "told"),
    [
        ("source", "source", "overlap"),
        ("source", "source/cat/below", "overlap"),
        ("source/cat", "source", "overlap"),
        ("nowhere", "target", "is not a folder"),
        ("source", "source/labels.csv", "overlap"),
        ("source", "file", "is not a folder"),
        ("source", "full", "is not empty, and not from an earlier run"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused(source, tmp_path, source_name, target_name, told):
    write(tmp_path, {"file": b"", "full/other.txt": b""})
    before = tree(tmp_path)
    done = prepare(tmp_path / source_name, tmp_path / target_name, "--quality", 85)
    assert done.exit_code == 1
    assert told in done.output
    assert tree(tmp_path) == before


def test_a_file_where_a_folder_should_be_is_an_error_of_one_line(source, tmp_path):
    assert prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1).exit_code == 0
    (tmp_path / "target" / "nothing here").rmdir()
    (tmp_path / "target" / "nothing here").touch()
    done = prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1)
    assert done.exit_code == 1
    assert re.fullmatch(r".*nothing here'\n", done.output)


def test_what_cannot_be_read_is_missing_and_the_exit_status_says_so(source, tmp_path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(source / "socket"))
    (source / "cat" / "lost.jpg").symlink_to("nowhere.jpg")
    (source / "cat" / "around").symlink_to(source)
    done = prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1)
    assert done.exit_code == 1
    assert (
        "2 files are missing:\n  cat/lost.jpg: No such file or directory\n  socket: it is not a regular file"
        in done.output
    )
    assert not (tmp_path / "target" / "cat" / "around").exists()


def test_a_prepared_folder_is_read_by_its_index_alone(source, tmp_path, monkeypatch):
    assert prepare(source, tmp_path / "target", "--quality", 85, "--workers", 1).exit_code == 0
    assert len(RestartIndex(str(tmp_path / "target"))) == 7
    assert np.load(tmp_path / "target" / NAME).dtype == np.uint8
    monkeypatch.setattr(files._LocalFile, "read", None)
    (tmp_path / "target" / "nothing here").rmdir()
    dataset = ImageFolder(tmp_path / "target", extensions=(".jpg", ".jpeg"), crop=RandomPatches(20))
    assert [sample["image"].shape for sample in dataset] == [(20, 20, 3)] * len(dataset)


@pytest.mark.parametrize(
    ("width", "sampling", "expected"),
    [(4000, (2, 2), 5), (500, (2, 2), 4), (512, (2, 2), 4), (13 * 16, (2, 2), 1), (8, (1, 1), 1), (6000, (1, 1), 5)],
)
def test_intervals_are_small_and_divide_a_row(width, sampling, expected):
    assert interval(width, sampling) == expected
    for columns in range(1, 400):
        found = interval(columns * 8, (1, 1))
        assert columns % found == 0
        assert found <= 8


def test_markers_cost_a_few_per_cent(tmp_path):
    picture = cv2.resize(photo(451, 300, "coffee"), (1200, 800), interpolation=cv2.INTER_CUBIC)
    write(tmp_path / "source", {"1.jpg": jpeg(picture, quality=90)})
    assert prepare(tmp_path / "source", tmp_path / "target", "--quality", 90, "--workers", 1).exit_code == 0
    before, after = ((tmp_path / name / "1.jpg").stat().st_size for name in ("source", "target"))
    assert 1 < after / before < 1.08
