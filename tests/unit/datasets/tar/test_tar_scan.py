"""What is found in a shard, whatever wrote it, and which shards are refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import tarfile

import numpy as np
import pytest
from support.tars import END, header, other_entry, padded, write_tar

from loaders import DatasetError
from loaders.datasets.tar.index import scan
from loaders.datasets.tar.scan import scan_shard, split_name

LONG = "folder/" * 20 + "n" * 120 + ".txt"


def members(path):
    """name → bytes, as the scan finds them."""
    found, content = scan_shard(str(path)), path.read_bytes()
    keys = np.repeat(np.arange(len(found.keys)), found.counts)
    return {
        os.fsdecode(found.keys[key] + b"." + found.extensions[kind]): content[start : start + size]
        for key, kind, start, size in zip(keys, found.kinds, found.starts, found.sizes, strict=True)
    }


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        scan_shard(str(path))
    assert f'shard "{path}"' in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_are_those_that_tarfile_reads(kind, tmp_path):
    entries = [("0.txt", b"zero"), ("0.bin", bytes(1000)), ("a/b/1.txt", b""), ("2.txt", bytes(range(256)) * 800)]
    names = [("größe.txt", b"umlauts"), ("d/" * 40 + "n" * 90 + ".txt", b"with a prefix")]
    names += [] if kind == tarfile.USTAR_FORMAT else [(LONG, b"long"), ("b" * 300 + ".txt", b"longer")]
    path = write_tar(tmp_path / "0.tar", [*entries, *names], kind=kind)
    with tarfile.open(path) as tar:
        expected = {each.name: tar.extractfile(each).read() for each in tar.getmembers()}
    assert members(path) == expected == dict([*entries, *names])


def test_sizes_of_pax_and_in_base_256_are_understood(tmp_path):
    record = b"15 size=000005\n"
    assert len(record) == 15
    sized = header(b"pax", b"%011o\0" % len(record), b"x") + padded(record) + header(size=b"0" * 11 + b"\0")
    binary = header(b"1.txt", b"\x80" + (5).to_bytes(11, "big"))
    (path := tmp_path / "0.tar").write_bytes(sized + padded(b"first") + binary + padded(b"other") + END)
    assert members(path) == {"0.txt": b"first", "1.txt": b"other"}


def test_records_count_for_one_member_and_global_ones_for_all(tmp_path):
    path = tmp_path / "0.tar"
    mine, all_of_them = b"14 path=9.txt\n", b"20 comment=whatever\n"
    assert (len(mine), len(all_of_them)) == (14, 20)
    blocks = [header(b"g", b"%011o\0" % 20, b"g"), padded(all_of_them), header(b"x", b"%011o\0" % 14, b"x")]
    blocks += [padded(mine), header(), padded(b"first"), header(b"1.txt"), padded(b"other"), END]
    path.write_bytes(b"".join(blocks))
    assert members(path) == {"9.txt": b"first", "1.txt": b"other"}


@pytest.mark.parametrize(
    "options",
    [
        {"magic": bytes(8)},
        {"magic": b"ustar  \0", "prefix": b"13371337"},  # GNU keeps times where POSIX has the prefix
        {"kind": b"\0"},
        {"kind": b"7"},
        {"name": b"0.txt", "size": b"         5 \0"},
    ],
)
def test_headers_of_old_and_unusual_writers_are_read(options, tmp_path):
    (path := tmp_path / "0.tar").write_bytes(header(**options) + padded(b"first") + END)
    assert members(path) == {"0.txt": b"first"}


def test_signed_checksums_of_old_writers_are_accepted(tmp_path):
    (path := tmp_path / "0.tar").write_bytes(header("ü.txt".encode(), signed=True) + padded(b"first") + END)
    assert members(path) == {"ü.txt": b"first"}


def test_what_is_no_file_is_skipped(tmp_path):
    entries = [
        other_entry("folder", tarfile.DIRTYPE),
        other_entry("folder/hard.txt", tarfile.LNKTYPE, "0.txt"),
        other_entry("folder/soft.txt", tarfile.SYMTYPE, "0.txt"),
        other_entry("pipe.txt", tarfile.FIFOTYPE),
        other_entry("device.txt", tarfile.CHRTYPE),
        ("0.txt", b"zero"),
        ("noextension", b"x"),
        ("dot.", b"x"),
        (".hidden.txt", b"x"),
        ("folder/._0.txt", b"x"),
        ("__meta__/0.txt", b"x"),
        ("__meta__", b"x"),
        ("1.txt", b"one"),
    ]
    assert members(write_tar(tmp_path / "0.tar", entries)) == {"0.txt": b"zero", "1.txt": b"one"}


def test_unknown_kinds_are_skipped_with_their_content(tmp_path):
    (path := tmp_path / "0.tar").write_bytes(
        header(b"dump.txt", kind=b"D") + padded(b"12345") + header() + padded(b"first") + END
    )
    assert members(path) == {"0.txt": b"first"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (b"0.jpg", (b"0", b"jpg")),
        (b"a/b.c/0.seg.PNG", (b"a/b.c/0", b"seg.png")),
        (b"./0.jpg", (b"./0", b"jpg")),
        (b"a.b/c", None),
        (b"a/.b.jpg", None),
        (b"a.", None),
        (b"__index__.json", (b"__index__", b"json")),
        (b"__index__/0.json", None),
    ],
)
def test_a_name_is_split_at_the_first_dot_after_the_last_slash(name, parts):
    assert split_name(name) == parts


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("1.a", b"1a"), ("0.a", b"0a"), ("1.b", b"1b"), ("0.b", b"0b")])
    found = scan_shard(str(path))
    assert (found.keys, found.counts.tolist()) == ([b"1", b"0"], [2, 2])
    assert list(members(path).items()) == [("1.a", b"1a"), ("1.b", b"1b"), ("0.a", b"0a"), ("0.b", b"0b")]


def test_headers_are_read_and_large_members_are_not(tmp_path, monkeypatch):
    path, nbytes = write_tar(tmp_path / "0.tar", [(f"{n}.bin", bytes(300_000)) for n in range(20)]), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: nbytes.append(n) or pread(fd, n, at))
    assert len(scan_shard(str(path)).keys) == 20
    assert sum(nbytes) < 0.05 * path.stat().st_size
    small = write_tar(tmp_path / "1.tar", [(f"{n}.cls", b"7") for n in range(1000)])
    nbytes.clear()
    scan_shard(str(small))
    assert len(nbytes) < 25  # and not one call for each


@pytest.mark.parametrize(
    ("compress", "program"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_a_compressed_shard_is_refused_with_the_reason_and_the_remedy(compress, program, tmp_path):
    plain = write_tar(tmp_path / "0.tar", [("0.txt", b"zero")]).read_bytes()
    path = tmp_path / "1.tar.gz"
    told = refused(path, compress(plain))
    assert "no member can be read without decompressing all before it" in told
    assert f"{program} {path}" in told


def test_a_sparse_file_is_refused(tmp_path):
    records = b"22 GNU.sparse.major=1\n"
    assert len(records) == 22
    pax = header(b"x", b"%011o\0" % 22, b"x") + padded(records) + header() + padded(b"first")
    for content in (header(kind=b"S") + padded(b"first"), pax):
        assert "a sparse file" in refused(tmp_path / "0.tar", content + END)


def test_sparse_files_of_gnu_tar_itself_are_refused(tmp_path):
    with open(tmp_path / "0.bin", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"something")
    for kind in ("gnu", "pax"):
        command = ["tar", "--sparse", f"--format={kind}", "-cf", f"{kind}.tar", "0.bin"]
        if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
            pytest.skip("there is no GNU tar that stores sparse files")
        with pytest.raises(DatasetError, match="a sparse file"):
            scan_shard(str(tmp_path / f"{kind}.tar"))


def test_a_shard_that_is_cut_anywhere_is_named_with_the_offset(tmp_path):
    whole = write_tar(
        tmp_path / "0.tar", [("0.txt", b"zero"), (LONG, b"x" * 600)], kind=tarfile.PAX_FORMAT
    ).read_bytes()
    end = whole.rindex(b"xxxxx") + 5
    for nbytes in [*range(0, end, 97), 512, 1024, -(-end // 512) * 512]:
        assert "cut short" in refused(tmp_path / "1.tar", whole[:nbytes])
    # Only padding is lost: nothing of a sample.
    (tmp_path / "1.tar").write_bytes(whole[: -(-end // 512) * 512 + 512])
    assert len(members(tmp_path / "1.tar")) == 2


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (header(checksum=b"0000000\0"), "its checksum is wrong"),
        (header(size=b"0000000000x\0"), "size is no number"),
        (header(size=b"-0000000005\0"), "size is no number"),
        (header(size=b"0000_000005\0"), "size is no number"),
        (header(size=b"\xff" * 12), "size is impossible"),
        (header(size=b"\x80\xff" + bytes(10)), "size is impossible"),
        (header(size=b"77777777777\0"), 'it ends within "0.txt"'),
        (b"<!DOCTYPE html>".ljust(512), "no header of a tar file"),
        (header(b"x", b"%011o\0" % 9, b"x") + padded(b"9 path=0\n"), None),
        (header(b"x", b"%011o\0" % 9, b"x") + padded(b"8 path=0\n"), "record of an extended header is damaged"),
        (header(b"x", b"%011o\0" % 9, b"x") + padded(b"999 path=\n"), "record of an extended header is damaged"),
        (header(b"x", b"%011o\0" % 9, b"x") + padded(b"no record"), "record of an extended header is damaged"),
        (header(b"x", b"%011o\0" % 11, b"x") + padded(b"11 size=-5\n"), "its size is no number"),
        (header(b"x", b"77777777777\0", b"x"), "none is that long"),
    ],
)
def test_a_damaged_header_is_named_with_the_offset(block, told, tmp_path):
    first = header(b"first.txt") + padded(b"first")
    content = first + block + header(b"last.txt") + padded(b"other") + END
    if told is None:
        (tmp_path / "0.tar").write_bytes(content)
        assert len(scan_shard(str(tmp_path / "0.tar")).keys) == 1  # "0" has no extension
        return
    found = refused(tmp_path / "0.tar", content)
    assert told in found
    assert "byte 1,024" in found or "byte 2,048" in found


def test_something_behind_the_end_is_not_passed_over_quietly(tmp_path):
    one = write_tar(tmp_path / "0.tar", [("0.txt", b"zero")]).read_bytes()
    assert "tar --concatenate" in refused(tmp_path / "1.tar", one + one)
    assert "tar --concatenate" in refused(tmp_path / "1.tar", one + bytes(100 * 1024) + one)


def test_two_members_of_one_name_are_an_error(tmp_path):
    path = tmp_path / "0.tar"
    for names in (("0.txt", "0.txt"), ("0.txt", "1.txt", "0.TXT")):
        write_tar(path, [(name, b"zero") for name in names])
        with pytest.raises(DatasetError, match=rf'shard "{path}", byte .*: a second "0.txt"'):
            scan_shard(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_shard_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DatasetError, match=r'0.tar" cannot be opened: it is a folder, a pipe or a device'):
        scan_shard(str(tmp_path / "0.tar"))
    for path in (tmp_path, tmp_path / "nowhere.tar", "nonsense://0.tar", "a\0.tar"):
        with pytest.raises(DatasetError, match=rf'shard "{path}" cannot be opened: '):
            scan_shard(str(path))


def test_the_index_of_many_shards_is_that_of_each_in_order(tmp_path):
    paths = [
        write_tar(tmp_path / f"{n:02}.tar", [(f"{n}/{m}.x{(n + m) % 3}", bytes(m)) for m in range(n)])
        for n in range(40)
    ]
    seen = []
    index = scan(list(map(str, paths)), seen.append)
    assert seen == list(range(1, 41))
    assert index.shard_starts.tolist() == [n * (n - 1) // 2 for n in range(41)]
    assert [index.keys[n] for n in (0, 1, 2, 3)] == ["1/0", "2/0", "2/1", "3/0"]
    assert [index.shard_of(n) for n in range(6)] == [1, 2, 2, 3, 3, 3]
    number = int(index.member_starts[5])
    assert (index.extensions[int(index.kinds[number])], int(index.sizes[number])) == ("x2", 2)
    assert len(index) == 780
    assert index.nbytes < 60 * len(index) + 40 * 200


@pytest.mark.parametrize("is_terminal", [True, False])
def test_many_shards_show_a_bar_on_a_terminal_alone(tmp_path, monkeypatch, capsys, is_terminal):
    paths = [str(write_tar(tmp_path / f"{n}.tar", [("0.txt", b"zero")])) for n in range(16)]
    monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
    monkeypatch.setenv("TERM", "xterm")
    assert len(scan(paths)) == 16
    told = capsys.readouterr()
    assert ("Reading the headers of shards" in told.err) is is_terminal
    assert told.out == ""


def test_an_empty_archive_has_no_samples(tmp_path):
    path = write_tar(tmp_path / "0.tar", [])
    assert scan_shard(str(path)).keys == []
