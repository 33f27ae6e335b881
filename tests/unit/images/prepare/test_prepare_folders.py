"""Folders that `loaders prepare` may meet: links of all kinds, odd permissions, special files, a run beside it."""

import os
import stat
import threading

import pytest
from support.photo_zoo import jpeg, photo
from typer.testing import CliRunner

from loaders import ImageFolder, read_image
from loaders.cli import app
from loaders.images.decode import files
from loaders.images.decode.restart_index import NAME
from loaders.images.prepare import outcome
from loaders.images.prepare.claim import SETTINGS, claimed
from loaders.images.prepare.photo import Method

PHOTO = jpeg(photo(200, 150))


def prepare(source, target):
    return CliRunner().invoke(app, ["prepare", str(source), str(target), "--quality", "85", "--workers", "1"])


@pytest.fixture
def source(tmp_path):
    """Two classes of one photo each, and notes."""
    for name, content in {"cat/1.jpg": PHOTO, "dog/2.jpg": PHOTO, "notes.txt": b"no photo"}.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "source"


def content(folder):
    """Names of all files and links, links not followed."""
    found = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    return sorted(str(path.relative_to(folder)) for path in found if path.name not in (NAME, SETTINGS))


def names(root):
    return [os.path.relpath(path, root) for path in ImageFolder(root).paths]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["cat/1.jpg", "notes.txt"])
@pytest.mark.parametrize("bits", [0o4755, 0o2755, 0o6711, 0o1644])
def test_a_copy_runs_as_nobody_else(bits, name, source, tmp_path):
    (source / name).chmod(bits)
    assert prepare(source, tmp_path / "target").exit_code == 0
    assert mode(tmp_path / "target" / name) == bits & 0o777


def test_what_only_its_owner_may_read_is_so_from_its_first_byte_on(source, tmp_path, monkeypatch):
    (source / "notes.txt").chmod(0o600)
    (source / "cat").chmod(0o2700)
    (source / "dog").chmod(0o555)
    seen, copy = [], outcome.shutil.copyfileobj

    def noted(content, unfinished):
        seen.append(stat.S_IMODE(os.fstat(unfinished.fileno()).st_mode))
        copy(content, unfinished)

    monkeypatch.setattr(outcome.shutil, "copyfileobj", noted)
    assert prepare(source, tmp_path / "target").exit_code == 0
    assert seen == [0o600]
    found = {name: mode(tmp_path / "target" / name) for name in ("notes.txt", "cat", "dog")}
    assert found == {"notes.txt": 0o600, "cat": 0o700, "dog": 0o755}


def test_a_second_run_at_the_same_time_is_refused_and_takes_nothing_away(source, tmp_path):
    target = tmp_path / "target"
    with claimed(source, target, Method(None, 85)):
        (target / ".loaders-0.part").write_bytes(b"of the first run")
        done = prepare(source, target)
        assert done.exit_code == 1
        assert f'Another run is using "{target}"' in done.output.replace("\n", "")
        assert (target / ".loaders-0.part").exists()
    assert prepare(source, target).exit_code == 0  # the first one is over, and has left that
    assert not (target / ".loaders-0.part").exists()


def test_where_the_file_system_knows_no_locks_nothing_is_removed(source, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(fd, how):
        raise OSError(95, "Operation not supported")

    assert prepare(source, tmp_path / "target").exit_code == 0
    (tmp_path / "target" / ".loaders-0.part").touch()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert prepare(source, tmp_path / "target").exit_code == 0
    assert (tmp_path / "target" / ".loaders-0.part").exists()


def test_settings_are_not_written_through_a_link(source, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "precious").write_text("not JSON")
    (tmp_path / "target" / SETTINGS).symlink_to(tmp_path / "precious")
    assert prepare(source, tmp_path / "target").exit_code == 1
    assert (tmp_path / "precious").read_text() == "not JSON"


def test_what_an_earlier_run_copied_is_not_copied_again(source, tmp_path):
    (source / "cut.jpg").write_bytes(PHOTO[:-500])
    target = tmp_path / "target"
    assert prepare(source, target).exit_code == 0
    before = {name: (target / name).stat().st_ino for name in content(target)}
    again = prepare(source, target)
    assert "1 other files copied, 1 of them from an earlier run." in again.output
    assert "cut.jpg: the JPEG is cut short" in again.output
    assert {name: (target / name).stat().st_ino for name in content(target)} == before
    status = (source / "notes.txt").stat()
    (source / "notes.txt").write_bytes(b"longer, of the same time")
    os.utime(source / "notes.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "1 other files copied." in prepare(source, target).output
    assert (target / "notes.txt").read_bytes() == b"longer, of the same time"


@pytest.mark.parametrize("where", ["../target", "..", "../target/cat", "../via"])
def test_a_link_from_the_source_to_the_target_is_left_out(where, source, tmp_path):
    (tmp_path / "via").symlink_to("target/dog")
    (source / "cat" / "link").symlink_to(tmp_path / "source" / where)
    (tmp_path / "target" / "cat").mkdir(parents=True)  # so that the link leads somewhere at the first run
    (tmp_path / "target" / SETTINGS).touch()
    for _ in range(3):
        done = prepare(source, tmp_path / "target")
        assert done.exit_code == 0, done.output
        assert "are left out: cat/link" in done.output
        found = content(tmp_path / "target")
        assert [name for name in found if "link" not in name] == ["cat/1.jpg", "dog/2.jpg", "notes.txt"]
        assert all(name.count("link") < 2 for name in found)


def test_links_that_lead_to_themselves_or_round_end_nothing(source, tmp_path):
    (source / "loop").symlink_to("loop")
    (source / "cat" / "around").symlink_to(source)
    done = prepare(source, tmp_path / "target")
    assert done.exit_code == 1
    assert "1 files are missing:\n  loop: Too many levels of symbolic links" in done.output
    assert "1 links lead to a folder that contains them" in done.output
    assert content(tmp_path / "target") == ["cat/1.jpg", "dog/2.jpg", "notes.txt"]


def test_folders_that_link_to_each_other_are_written_once_and_read_as_before(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "3.jpg").write_bytes(PHOTO)
    for number in range(7):
        (source / f"c{number}").mkdir()
        (source / f"c{number}" / "more").symlink_to(tmp_path / "elsewhere")
        for other in range(7):
            (source / f"c{number}" / f"to {other}").symlink_to(f"../c{other}")
    (source / "cat again").symlink_to("cat")
    target = tmp_path / "target"
    assert prepare(source, target).exit_code == 0
    files_of = [name for name in content(target) if not (target / name).is_symlink()]
    assert files_of == ["c0/more/3.jpg", "cat/1.jpg", "dog/2.jpg", "notes.txt"]
    assert names(target) == names(source)
    assert prepare(source, target).exit_code == 0
    (source / "cat again").unlink()
    assert "no longer have a source and would still be read: delete them: cat again" in " ".join(
        prepare(source, target).output.split()
    )


def test_a_linked_folder_is_read_by_the_index(source, tmp_path, monkeypatch):
    (source / "cat again").symlink_to("cat")
    assert prepare(source, tmp_path / "target").exit_code == 0
    monkeypatch.setattr(files._LocalFile, "read", None)
    assert read_image(tmp_path / "target" / "cat again" / "1.jpg", region=(0, 0, 9, 9)).shape == (9, 9, 3)


def test_a_folder_that_became_a_link_is_named_and_nothing_is_written_through_the_link(source, tmp_path):
    target = tmp_path / "target"
    assert prepare(source, target).exit_code == 0
    os.rename(source / "dog", source / "dogs")
    (source / "dog").symlink_to("dogs")
    done = prepare(source, target)
    assert done.exit_code == 1
    assert "dog: it is a link now, but an earlier run wrote something else in its place" in done.output
    (target / "dog" / "2.jpg").unlink()
    (target / "dog").rmdir()
    assert prepare(source, target).exit_code == 0
    assert (target / "dog").is_symlink()
    (source / "dog").unlink()
    os.rename(source / "dogs", source / "dog")
    done = prepare(source, target)
    assert "delete them: dogs/2.jpg" in done.output.replace("\n", " ")
    assert not (target / "dog").is_symlink()
    assert (target / "dog" / "2.jpg").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_device_is_missing_and_nothing_waits_for_it(source, tmp_path):
    os.mkfifo(source / "cat" / "0.jpg")
    (source / "cat" / "zero.jpg").symlink_to("/dev/zero")
    done = prepare(source, tmp_path / "target")
    assert done.exit_code == 1
    assert (
        "2 files are missing:\n  cat/0.jpg: it is not a regular file\n  cat/zero.jpg: it is not a regular file"
        in done.output
    )


def test_a_folder_that_cannot_be_listed_is_missing_and_all_others_are_written(source, tmp_path, monkeypatch):
    assert prepare(source, tmp_path / "target").exit_code == 0
    (source / "dog" / "new.jpg").write_bytes(PHOTO)
    scandir = os.scandir

    def refused(path):
        if os.fsdecode(path) == str(source / "cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    done = prepare(source, tmp_path / "target")
    assert done.exit_code == 1
    assert "1 files are missing:\n  cat: Permission denied" in done.output
    assert "no longer have a source" not in done.output  # of what is in there nothing is known
    assert (tmp_path / "target" / "dog" / "new.jpg").exists()


def test_an_index_that_cannot_be_written_is_an_error(source, tmp_path, monkeypatch):
    replace = os.replace

    def full(before, after):
        if os.path.basename(after) == NAME:
            raise OSError(28, "No space left on device")
        replace(before, after)

    monkeypatch.setattr(os, "replace", full)
    done = prepare(source, tmp_path / "target")
    assert done.exit_code == 1
    assert "cannot be written" in done.output


def test_threads_that_fill_a_full_index_do_not_disturb_each_other(monkeypatch):
    from loaders.images.decode import restart_index
    from loaders.images.decode.header import read_header
    from loaders.images.decode.restart import find_restarts

    monkeypatch.setattr(restart_index, "_UNSAVED", 3)
    data = jpeg(photo(), restart=3)
    index, restarts, failed = restart_index.RestartIndex(None), find_restarts(data, read_header(data).jpeg), []

    def fill(first):
        try:
            for number in range(first, first + 300):
                index.add(b"%d" % number, 1, 1, restarts)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=fill, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(index) == 3
