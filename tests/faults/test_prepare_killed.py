"""`loaders prepare`, killed at any time, leaves only whole files; run again, it makes what one run makes."""

import os
import signal
import subprocess
import sys

import pytest
from support.fake_jpegtran import FakeJpegtran
from support.photo_zoo import jpeg, photo
from support.waiting import is_gone, wait_until

from loaders.images.decode.restart_index import RestartIndex

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find processes that were left")

COUNT = 56  # photos, each of which takes a few hundredths of a second
KILLED_AT = (8, 30)  # files written


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def members(group):
    """The processes of a process group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(name)) == group and not is_gone(int(name)):
                found.append(int(name))
        except ProcessLookupError:
            pass
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return FakeJpegtran(tmp_path_factory.mktemp("programs"), takes_s=0.02)


@pytest.fixture(scope="module")
def source(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(COUNT):
        path, picture = folder / str(number % 3) / f"{number}.jpg", photo(160, 90 + number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(picture))
        programs.knows(jpeg(picture), 5, jpeg(picture, restart=5))
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def start(source, programs, tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "loaders", "prepare", str(source), str(tmp_path / "target"), "--workers", "2"],
            env=os.environ | {"PATH": programs.path},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def written(target):
    """All files except temporary ones."""
    return [path for path in target.rglob("*") if path.is_file() and not path.name.startswith(".")]


def assert_whole(source, target):
    for path in written(target):
        before = source / path.relative_to(target)
        if path.suffix == ".jpg":
            assert path.read_bytes() == jpeg(photo(160, 90 + int(path.stem)), restart=5)
        else:
            assert path.read_bytes() == before.read_bytes()


@pytest.mark.parametrize("victim", ["the command", "a worker", "all"])
def test_killed_repeatedly_it_ends_as_if_it_had_never_been_killed(victim, source, start, tmp_path):
    target = tmp_path / "target"
    for count in KILLED_AT:
        with start() as process:
            wait_until(lambda count=count: len(written(target)) >= count, f"{count} files were written")
            everyone = members(process.pid)
            workers = sorted(pid for pid in everyone if b"spawn_main" in command_line(pid))
            assert len(workers) >= 2  # one more while one of them forks to start jpegtran
            for pid in {"the command": [process.pid], "a worker": workers[:1], "all": everyone}[victim]:
                os.kill(pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        wait_until(lambda group=process.pid: not members(group), "all processes had ended")
        assert process.returncode == (1 if victim == "a worker" else -signal.SIGKILL), output
        assert victim != "a worker" or "a worker process was killed" in output
        assert count <= len(written(target)) < COUNT
        assert_whole(source, target)
    there = len([path for path in written(target) if path.suffix == ".jpg"])
    with start() as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.startswith(f"{COUNT} JPEGs have restart markers, {there} of them from an earlier run.\n")
    assert len(written(target)) == COUNT + 1
    assert_whole(source, target)
    assert not list(target.rglob(".*.part"))
    assert len(RestartIndex(str(target))) == COUNT


def test_ctrl_c_ends_it_and_says_how_to_continue(source, start, tmp_path):
    target = tmp_path / "target"
    with start() as process:
        wait_until(lambda: len(written(target)) > 5, "some files were written")
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == "Stopped. Run it again to continue.\n"
    wait_until(lambda: not members(process.pid), "all processes had ended")
    assert 5 < len(written(target)) < COUNT
    assert_whole(source, target)
