"""The arena: one range of memory without a name, reserved before it is used, refused in words."""

import errno
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loaders.errors import BufferMemoryError
from loaders.memory import arena as arena_module
from loaders.memory.arena import PAGE, Arena, round_up
from loaders.system import limits
from loaders.system.limits import available_nbytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd, /proc and /dev/shm are Linux's")


def descriptors() -> dict[str, str]:
    """What each descriptor of this process is."""
    listed = os.listdir("/proc/self/fd")  # with the one that lists them, which is closed by now
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in listed if os.path.lexists(f"/proc/self/fd/{fd}")}


def resident_nbytes(arena: Arena) -> int:
    """What the shared file behind the arena really takes."""
    return os.fstat(arena._fd).st_blocks * 512


@pytest.fixture
def shared():
    arena = Arena(64 << 20, shared=True)
    yield arena
    arena.close()


def test_reserving_takes_the_memory_before_anything_is_written(shared):
    assert resident_nbytes(shared) == 0
    shared.reserve(8 << 20)
    assert resident_nbytes(shared) == 8 << 20


def test_released_memory_is_gone_from_the_machine_and_reads_as_zeros(shared):
    first, second = shared.reserve(4 << 20), shared.reserve(4 << 20)
    shared.buffer[first : first + 3] = shared.buffer[second : second + 3] = b"abc"
    shared.release(first, 4 << 20)
    assert resident_nbytes(shared) == shared.reserved_nbytes == 4 << 20
    assert shared.buffer[first : first + 3] == bytes(3)
    assert shared.buffer[second : second + 3] == b"abc"


def test_private_memory_that_was_released_reads_as_zeros_too():
    arena = Arena(1 << 20, shared=False)
    at = arena.reserve(PAGE)
    arena.buffer[at] = 7
    arena.release(at, PAGE)
    assert arena.buffer[at] == 0


@pytest.mark.parametrize("shared", [True, False])
def test_ranges_that_were_given_back_join_whatever_the_order(shared):
    arena = Arena(4 * PAGE, shared=shared)
    offsets = [arena.reserve(PAGE) for _ in range(4)]
    assert sorted(offsets) == [0, PAGE, 2 * PAGE, 3 * PAGE]
    for offset in (offsets[1], offsets[3], offsets[0], offsets[2]):
        arena.release(offset, PAGE)
    assert arena.reserve(4 * PAGE) == 0


def test_a_range_without_a_large_enough_run_says_so(shared):
    with pytest.raises(BufferMemoryError, match=r"no run of 134,217,728 free bytes .* range of 67,108,864 bytes"):
        shared.reserve(128 << 20)
    assert shared.reserved_nbytes == 0


@linux
def test_nothing_has_a_name_and_two_descriptors_are_all():
    before = descriptors()
    arena = Arena(1 << 20, shared=True)
    opened = [link for fd, link in descriptors().items() if before.get(fd) != link]
    assert 0 < len(opened) <= 2
    assert all(link.startswith("/memfd:loaders") for link in opened)
    assert not any("loaders" in name for name in os.listdir("/dev/shm"))
    arena.close()
    arena.close()  # twice is once
    del arena
    assert descriptors() == before


def test_memory_that_the_machine_has_not_is_refused_with_what_was_asked_and_what_is_left(shared, monkeypatch):
    shared.reserve(PAGE)
    monkeypatch.setattr(arena_module, "available_nbytes", lambda: 100_000_000)
    with pytest.raises(BufferMemoryError) as raised:
        shared.reserve(40 << 20)
    message = str(raised.value)
    assert "41,943,040 bytes was asked for" in message
    assert "100,000,000 bytes of memory are available" in message
    assert "4,096 bytes are in use by this loader" in message
    assert "smaller batch_size" in message
    assert isinstance(raised.value, MemoryError)
    assert shared.reserved_nbytes == PAGE
    shared.reserve(1 << 20)  # less is still to be had


def test_a_full_machine_is_an_error_at_the_reservation_and_not_a_bus_error_later(shared, monkeypatch):
    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        BufferMemoryError, match=r"No space left on device: .* 1,048,576 bytes was asked for, [\d,]+ bytes"
    ):
        shared.reserve(1 << 20)
    assert shared.reserved_nbytes == 0
    monkeypatch.undo()
    assert shared.reserve(1 << 20) == 0  # the refused range is still there to be taken


@linux
def test_a_limit_on_address_space_gives_a_smaller_range_not_an_error():
    code = """
        import resource
        from loaders.memory.arena import Arena
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        for shared in (True, False):
            arena = Arena(1 << 36, shared=shared)
            at = arena.reserve(1 << 20)
            arena.buffer[at : at + 3] = b"abc"
            assert 1 << 24 <= arena.capacity < 1 << 30, arena.capacity
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


LIMITED = """
    import resource, sys
    import numpy as np

    class Numbers:
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return np.full((64, 64), index, np.float32), index

    if __name__ == "__main__":
        from loaders import DataLoader  # not in spawned workers, for which torch takes seconds to import
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
        loader = DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context=sys.argv[1])
        held = [images for images, labels in loader if (images[:, 0, 0] == labels).all()]
        assert len(held) == 8
"""


@linux
@pytest.mark.parametrize(("context", "limit"), [("fork", 0), ("fork", 1 << 16), ("spawn", 4 << 20), ("spawn", 0)])
def test_a_limit_on_the_size_of_files_stops_no_loader_that_can_do_without(tmp_path, context, limit):
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    done = subprocess.run(
        [sys.executable, "-B", str(script), context, str(limit)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    if (context, limit) == ("spawn", 0):
        assert "Files may have 0 bytes (RLIMIT_FSIZE): raise the limit (ulimit -f)" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@linux
def test_memory_without_a_descriptor_is_reserved_and_given_back_as_well():
    arena = Arena(64 << 20, shared=True, travels=False)
    arena._file_limit, arena._fd = 0, (os.close(arena._fd), -1)[1]
    arena.buffer = arena._mapped()
    at = arena.reserve(4 << 20)
    assert resident_of(arena.buffer) >= 4 << 10
    arena.buffer[at] = 7
    arena.release(at, 4 << 20)
    assert arena.buffer[at] == 0
    assert resident_of(arena.buffer) < 1 << 10


def resident_of(buffer: mmap.mmap) -> int:
    """KiB of a mapping that are there, of which this process has none as large besides."""
    with open("/proc/self/smaps") as maps:
        lines = maps.read().splitlines()
    sizes = [(n, int(line.split()[1])) for n, line in enumerate(lines) if line.startswith("Size:")]
    found = [n for n, size in sizes if size == len(buffer) >> 10 and "/dev/zero (deleted)" in lines[n - 1]]
    [at] = found
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


# -- how much is available


def write_files(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_cgroup_v2_counts_the_headroom_of_every_level_above(tmp_path):
    files = {
        "proc/self/cgroup": "0::/job/step",
        "sys/fs/cgroup/job/memory.max": 1000,
        "sys/fs/cgroup/job/memory.current": 700,
        "sys/fs/cgroup/job/memory.stat": "anon 600\ninactive_file 50\nactive_file 20",
        "sys/fs/cgroup/job/step/memory.max": "max",  # no limit at this level
        "sys/fs/cgroup/job/step/memory.current": 700,
        "sys/fs/cgroup/job/step/memory.stat": "inactive_file 0",
    }
    assert limits._cgroup_headrooms(write_files(tmp_path, files)) == [350]


def test_cgroup_v1_counts_droppable_cache_of_the_whole_tree_as_its_usage_does(tmp_path):
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/ignored\n4:memory:/docker/abc\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,  # how version 1 spells "no limit"
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 5,
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 0\ntotal_inactive_file 0",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": 1000,
        "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": 900,
        "sys/fs/cgroup/memory/docker/abc/memory.stat": "inactive_file 1\ntotal_inactive_file 200",
    }
    assert min(limits._cgroup_headrooms(write_files(tmp_path, files))) == 300


def test_inside_a_container_the_limit_at_the_top_is_found_though_the_path_is_the_hosts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/system.slice/docker-abc.scope",
        "sys/fs/cgroup/memory.max": 1000,
        "sys/fs/cgroup/memory.current": 400,
        "sys/fs/cgroup/memory.stat": "inactive_file 0",
    }
    assert limits._cgroup_headrooms(write_files(tmp_path, files)) == [600]


def test_a_group_above_its_limit_leaves_nothing_rather_than_less(monkeypatch):
    monkeypatch.setattr(limits, "_cgroup_headrooms", lambda: [-5])
    assert available_nbytes() == 0


@pytest.mark.parametrize("content", [None, "0::/gone", "3:memory:/gone", "7:cpu:/x"])
def test_without_a_readable_cgroup_the_machine_alone_counts(tmp_path, content):
    if content is not None:
        write_files(tmp_path, {"proc/self/cgroup": content})
    assert limits._cgroup_headrooms(tmp_path) == []


@linux
def test_available_memory_is_never_more_than_the_machine_says():
    with open("/proc/meminfo") as meminfo:
        available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    assert 0 < available_nbytes() <= available + (256 << 20)  # others come and go between the two looks


# -- without memfd_create

FALLBACK = """
    import os, sys
    {remove}
    import numpy as np

    class Numbers:
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return np.full((64, 64), index, np.float32), index

    if __name__ == "__main__":
        from loaders import DataLoader  # not in spawned workers, for which torch takes seconds to import
        loader = DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context="{context}")
        held = []
        for images, labels in loader:
            assert (images[:, 0, 0] == labels).all()
            # What others have there at this moment is none of ours.
            with open("/proc/self/maps") as file:
                named = [line for line in file if "/dev/shm/" in line and "(deleted)" not in line]
            assert named == []
            held.append(images)
        assert len(held) == 8
        with open("/proc/self/maps") as file:
            maps = file.read()
        assert ("/dev/shm/" in maps, "memfd:loaders" in maps) == {in_shm_or_memfd}, maps
"""


@linux
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_without_memfd_create_shared_memory_serves_and_leaves_no_name_and_no_noise(tmp_path, context):
    code = FALLBACK.format(
        remove="if __name__ == '__main__': del os.memfd_create",
        context=context,
        in_shm_or_memfd=(True, False),
    )
    script = tmp_path / "fallback.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@linux
def test_with_memfd_create_nothing_appears_under_dev_shm_while_workers_run(tmp_path):
    code = FALLBACK.format(remove="", context="fork", in_shm_or_memfd=(False, True))
    script = tmp_path / "anonymous.py"
    script.write_text(textwrap.dedent(code))
    subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        check=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def test_sizes_round_up_to_whole_pages():
    assert [round_up(n) for n in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]
    assert PAGE == mmap.PAGESIZE
