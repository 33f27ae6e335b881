"""An index in a file is used for the shards that it was made of, and refused otherwise."""

from __future__ import annotations

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from support.tars import write_tar

from loaders import DatasetError, TarFiles
from loaders.datasets.tar import index_file
from loaders.datasets.tar.index import scan
from loaders.datasets.tar.index_file import _HEAD


@pytest.fixture
def root(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{n}.{e}", bytes([48 + n])) for n in range(4) for e in ("cls", "txt")])
    return tmp_path


def made(root, **options):
    return TarFiles(root / "*.tar", index=root / "index", **options)


def labels(dataset):
    return [sample["label"] for sample in dataset]


def test_headers_are_read_once_and_then_no_more(root, monkeypatch):
    first = made(root)
    assert sorted(os.listdir(root)) == ["0.tar", "1.tar", "2.tar", "index"]
    monkeypatch.setattr("loaders.datasets.tar.tar_files.scan", None)
    again = made(root)
    assert labels(again) == labels(first) == [0, 1, 2, 3] * 3
    for name, value in vars(first._index).items():
        other = vars(again._index)[name]
        assert list(value) == list(other), name
        assert getattr(value, "dtype", None) == getattr(other, "dtype", None), name


def test_without_an_index_nothing_is_written(root):
    labels(TarFiles(root / "*.tar"))
    assert sorted(os.listdir(root)) == ["0.tar", "1.tar", "2.tar"]


def test_shards_and_index_may_move_together(root, tmp_path, monkeypatch):
    made(root)
    shutil.copytree(root, root / "moved")  # keeps the times
    monkeypatch.setattr("loaders.datasets.tar.tar_files.scan", None)
    moved = made(root / "moved")
    assert moved.describe(4) == f"{root}/moved/1.tar/0"
    assert labels(moved) == [0, 1, 2, 3] * 3


def test_an_index_of_shards_that_changed_is_refused_with_the_remedy(root):
    made(root)
    before = (root / "index").read_bytes()
    status = os.stat(root / "1.tar")
    os.utime(root / "1.tar", ns=(0, 5))
    with pytest.raises(DatasetError, match=r'1.tar" has another modification time.*\n  Delete it, and it will be made'):
        made(root)
    os.utime(root / "1.tar", ns=(0, status.st_mtime_ns))
    assert len(made(root)) == 12
    write_tar(root / "1.tar", [("0.cls", bytes(20_000))])
    with pytest.raises(DatasetError, match=r'1.tar" has another size'):
        made(root)
    os.unlink(root / "1.tar")
    with pytest.raises(
        DatasetError, match=r"it is of other shards, 3 \(0.tar, 1.tar, 2.tar\); the dataset has 2 \(0.*\n  Pass another"
    ):
        made(root)
    assert (root / "index").read_bytes() == before


def test_an_index_is_complete_or_not_there(root, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DatasetError, match="cannot be written: No space left"):
        made(root)
    assert sorted(os.listdir(root)) == ["0.tar", "1.tar", "2.tar"]
    with pytest.raises(DatasetError, match="cannot be written: No such file"):
        TarFiles(root / "*.tar", index=root / "nowhere" / "index")


@pytest.mark.parametrize("damage", ["empty", "text", "version", "short", "long", "flipped"])
def test_a_damaged_index_is_refused(root, damage):
    made(root)
    content = (root / "index").read_bytes()
    damaged = {
        "empty": b"",
        "text": b"PK\3\4 something else" * 20,
        "version": content[:7] + b"\x01" + content[8:],
        "short": content[:-1],
        "long": content + b"\0",
        "flipped": content[:200] + bytes([content[200] ^ 1]) + content[201:],
    }[damage]
    (root / "index").write_bytes(damaged)
    with pytest.raises(
        DatasetError, match=rf'index "{root}/index" cannot be used: it is (damaged|no index|of another version)'
    ):
        made(root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_an_index_that_is_no_file_is_refused(root):
    os.mkfifo(root / "index")
    with pytest.raises(DatasetError, match=r"cannot be used: it is not a file.\n  Pass the path of another file"):
        made(root)


def test_no_remedy_deletes_what_is_no_index(root):
    for path, told in ((root, "it is not a file"), (root / "0.tar", "it is no index of tar shards")):
        with pytest.raises(DatasetError, match=rf"{told}.\n  Pass the path of another file as index=.$"):
            TarFiles(root / "*.tar", index=path)
    with pytest.raises(DatasetError, match=r"it cannot be read: .*\n  Make it readable, or pass another path"):
        TarFiles(root / "*.tar", index="nonsense://index")


def forged(root, name, change):
    """Write an index with a correct checksum in which one array is changed."""
    index = scan([str(root / f"{n}.tar") for n in range(3)])
    arrays = dict(vars(index))
    arrays[name] = change(arrays[name].copy())
    index_file.save(str(root / "index"), type(index)(**arrays))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda a: a - 512 * 100),
        ("starts", lambda a: a + (1 << 60)),
        ("starts", lambda a: a + 1),
        ("sizes", lambda a: a + (1 << 62)),
        ("sizes", lambda a: -a),
        ("kinds", lambda a: a + 7),
        ("shard_starts", lambda a: a[::-1]),
        ("shard_starts", lambda a: a * 2),
        ("member_starts", lambda a: a - 1),
        ("member_starts", lambda a: np.array([0, 2**63 - 1, -2, *a[3:]])),
        ("member_starts", lambda a: np.where(a == 2, 0, a)),
        ("member_starts", lambda a: np.where(a == 2, 5, a)),
        ("shard_sizes", lambda a: a + (1 << 62)),
    ],
)
def test_a_forged_index_reads_nothing_outside_its_shards(root, name, change):
    forged(root, name, change)
    with pytest.raises(DatasetError, match=r"(is damaged|has another size)"):
        made(root)


def test_a_forged_index_that_points_elsewhere_is_noticed_on_reading(root):
    forged(root, "starts", lambda a: a[::-1])
    with pytest.raises(Exception, match="another header precedes it"):
        labels(made(root))


def test_huge_counts_allocate_nothing(root):
    made(root)
    content = bytearray((root / "index").read_bytes())
    struct.pack_into("<Q", content, 16, 1 << 61)
    (root / "index").write_bytes(content)
    with pytest.raises(DatasetError, match="its size is not what it says"):
        made(root)
    assert _HEAD.unpack_from(content)[-1] == zlib.crc32(content[_HEAD.size :])
