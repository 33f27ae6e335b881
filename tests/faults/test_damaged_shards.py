"""Whatever is wrong with the bytes of a shard: an error that names it, or the right sample, never another one."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.tars import write_tar

from loaders import TarFiles
from loaders.errors import DatasetError, DecodeError

QUIET = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Contents are unlike headers and unlike each other, so that a wrong one is noticed.
CONTENTS = {f"a/{n}.{e}": bytes([n]) * (3 + 100 * n) + e.encode() for n in range(6) for e in ("bin", "dat")}
LONG = {"n" * 150 + f"{n}.bin": bytes([n]) * 40 for n in range(3)} | {"k" * 120 + ".bin": b"k" * 700}
SHARDS = [(CONTENTS, tarfile.USTAR_FORMAT), (LONG, tarfile.GNU_FORMAT), (LONG, tarfile.PAX_FORMAT)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [write_tar(folder / f"{n}.tar", c.items(), kind=kind) for n, (c, kind) in enumerate(SHARDS)]


def extensions(contents: dict[str, bytes]) -> dict[str, str]:
    return {"key": "__key__"} | {name.rpartition(".")[2]: name.rpartition(".")[2] for name in contents}


def contents_of(sample: dict[str, Any]) -> dict[str, bytes]:
    return {f"{sample['key']}.{each}": content for each, content in sample.items() if each != "key"}


def read_or_named(path: Path, read: Callable[[], Any]) -> Any:
    """What is read, or None after an error that names the shard."""
    try:
        return read()
    except (DatasetError, DecodeError) as error:
        told = str(error)
    assert str(path) in told
    return None


def parts_of(blocks: int) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, bit), more often in fields of headers that matter than elsewhere."""
    inside = st.sampled_from([0, 1, 5, 100, 124, 127, 133, 134, 135, 148, 150, 156, 257, 345]) | st.integers(0, 511)
    return st.tuples(
        st.builds(lambda block, at: block * 512 + at, st.integers(0, blocks - 1), inside), st.integers(0, 7)
    )


@QUIET
@given(which=st.integers(0, 2), data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_only_the_content_it_is_in(shards, which, data, tmp_path) -> None:
    whole = shards[which].read_bytes()
    contents = SHARDS[which][0]
    at, bit = data.draw(parts_of(len(whole) // 512))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << bit
    path = tmp_path / "damaged.tar"
    path.write_bytes(damaged)
    found = read_or_named(path, lambda: [contents_of(each) for each in TarFiles(path, extensions(contents))])
    if found is None:
        return
    # A tar file has no checksum of contents: there, and in names that lie in contents, a flipped bit is just another
    # content. All members are there, unless a long name has lost its dot, and none has the content of another.
    members = {name: content for each in found for name, content in each.items()}
    assert len(contents) - (which > 0) <= len(members) <= len(contents)
    changed = [(name, content) for name, content in members.items() if contents.get(name) != content]
    assert len(changed) <= 1
    for name, content in changed:
        original = contents.get(name) or next(each for other, each in contents.items() if other not in members)
        assert len(content) == len(original)
        assert sum((a ^ b).bit_count() for a, b in zip(content, original, strict=True)) <= 1


@QUIET
@given(which=st.integers(0, 2), share=st.floats(0, 1, exclude_max=True))
@example(which=0, share=0.0)
def test_a_shard_that_is_cut_short_is_named(shards, which, share, tmp_path) -> None:
    whole = shards[which].read_bytes()
    path = tmp_path / "cut.tar"
    # Behind the last content and one block of zeros there is only padding.
    last = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: int(share * (-(-last // 512) * 512 + 512))])
    with pytest.raises(DatasetError, match=r"cut.tar.*cut short"):
        TarFiles(path, extensions(SHARDS[which][0]))


@pytest.mark.parametrize("which", [1, 2])
def test_long_names_are_compared_when_members_are_read(shards, which, tmp_path) -> None:
    """Members of one size and time, whose headers differ only in what extends them, are swapped."""
    path = tmp_path / "0.tar"
    shutil.copy2(shards[which], path)
    dataset = TarFiles(path, {"bin": "bin"})
    dataset[0]
    with tarfile.open(path) as tar:
        begins = [each.offset for each in tar]
    whole = path.read_bytes()
    first, second = whole[begins[0] : begins[1]], whole[begins[1] : begins[2]]
    with open(path, "r+b") as file:
        file.seek(begins[0])
        file.write(second + first)
    for number in (0, 1):
        with pytest.raises(DecodeError, match="another header precedes it"):
            dataset[number]
    assert dataset[2]["bin"] == bytes([2]) * 40


@QUIET
@given(data=st.data())
def test_a_shard_that_changes_between_two_reads_gives_no_other_members_bytes(shards, data, tmp_path) -> None:
    """Its size and time stay as they were, and an index from before is used."""
    path, index = tmp_path / "0.tar", tmp_path / "index"
    index.unlink(missing_ok=True)
    shutil.copy2(shards[0], path)
    status = os.stat(path)
    fields = extensions(CONTENTS)
    before = TarFiles(path, fields, index=index)
    before[0]
    whole = path.read_bytes()
    blocks = [whole[at : at + 512] for at in range(0, len(whole), 512)]
    one, other = data.draw(st.tuples(*[st.integers(0, len(blocks) - 1)] * 2))
    kind = data.draw(st.sampled_from(["swap", "rotate", "zero", "copy"]))
    if kind == "swap":
        blocks[one], blocks[other] = blocks[other], blocks[one]
    elif kind == "rotate":
        blocks = blocks[one:] + blocks[:one]
    elif kind == "zero":
        blocks[one] = bytes(512)
    else:
        blocks[one] = blocks[other]
    now = b"".join(blocks)
    with tarfile.open(shards[0]) as tar:
        places = {each.name: each.offset_data for each in tar}
    with open(path, "r+b") as file:
        file.write(now)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for dataset in (before, TarFiles(path, fields, index=index)):
        for number in range(len(dataset)):
            found = read_or_named(path, lambda: contents_of(dataset[number])) or {}  # noqa: B023
            for name, content in found.items():
                # What follows the header that was indexed; blocks of a content have no checksum.
                place = places[name]
                assert now[place - 512 : place] == whole[place - 512 : place]
                assert content == now[place : place + len(CONTENTS[name])]


@QUIET
@given(junk=st.binary(max_size=2000), at=st.integers(0, 6))
def test_anything_at_all_is_read_or_refused(shards, junk, at, tmp_path) -> None:
    whole = shards[2].read_bytes()
    path = tmp_path / "junk.tar"
    path.write_bytes(whole[: at * 512] + junk + whole[at * 512 + len(junk) :])
    found = read_or_named(
        path, lambda: [contents_of(each) for each in TarFiles(path, {"key": "__key__", "bin": "bin"})]
    )
    if found is None:
        return
    with tarfile.open(path) as tar:
        stored = [tar.extractfile(each).read() for each in tar if each.isreg() and each.name.endswith(".bin")]
    assert [content for each in found for content in each.values()] == stored
