"""A cache file that was truncated, damaged or forged: no code in it runs, and it does not end the process."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import DataLoader, DatasetError, DecodedCache
from loaders.datasets.cache import records
from loaders.datasets.cache.file import LOOKED_AT, TABLE, TAIL_AT, whole_lines

ROOM = 1 << 17
COUNT = 6


class Samples:
    """Small samples with values of every kind."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        image = np.random.default_rng(index).integers(0, 256, (9, 11, 3), np.uint8)
        when = np.array(["2020-01-01"], "M8[D]")
        return {
            "image": image,
            "label": int(index),
            "rest": (b"ab", [1.5, None, "größe"], {3: when}, np.float32(index)),
        }


def same(one: Any, other: Any) -> bool:
    return pickle.dumps(one) == pickle.dumps(other)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cache = DecodedCache(Samples(), ROOM, path=tmp_path / "cache")
    for index in range(COUNT):
        cache[index]
    assert cache.cached_count == COUNT
    return tmp_path / "cache"


def opened(path: Path) -> DecodedCache:
    return DecodedCache(Samples(), ROOM, path=path)


def words_of(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.memmap(path, np.int64, "r+")


def forge(path: Path, index: int, pieces: list[bytes], sizes: list[int] | None = None) -> None:
    """Replace a sample's record by another one with a correct checksum."""
    sizes = [len(piece) for piece in pieces] if sizes is None else sizes
    start = whole_lines((4 + len(sizes)) * 8)
    body = struct.pack(f"{1 + len(sizes)}q", len(sizes), *sizes).ljust(start - 24, b"\0")
    for piece in pieces:
        body += piece.ljust(whole_lines(len(piece)), b"\0")
    record = struct.pack("3q", index, 24 + len(body), zlib.crc32(body)) + body
    words = words_of(path)
    offset = int(words[TABLE + index])
    words.view(np.uint8)[offset : offset + len(record)] = np.frombuffer(record, np.uint8)


# -- code


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_code_in_a_file_is_run(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    names = ["os.system", "subprocess.Popen", "builtins.eval", f"{Runs.__module__}.Runs", "pathlib.Path"]
    named = [json.dumps(["named", name, ["mark"], str(mark)]).encode() for name in names]
    for description in (pickle.dumps(Runs(mark), protocol=5), pickle.dumps(Runs(mark), protocol=0), *named):
        forge(path, 2, [description])
        cache = opened(path)
        try:
            assert same(cache[2], Samples()[2])  # of a class that is not known to be the dataset's: read anew
        except DatasetError as error:
            assert "has an invalid description" in str(error)  # noqa: PT017  both are right
    assert not mark.exists()


def test_what_is_written_is_not_a_pickle(path: Path) -> None:
    content = path.read_bytes()
    assert b"numpy" not in content
    assert b'{"image":["array",' in content


@pytest.mark.parametrize(
    "node",
    [
        ["array", 0, "|O", [12], [0]],
        ["array", 0, "O8", [12], [0]],
        ["array", 0, "<f8", [10**18], [0]],
        ["array", 0, "<f8", [-1, -12], [0, 1]],
        ["array", 0, "<f8", [2**62, 0], [0, 1]],
        ["array", 0, "|V0", [2**62], [0]],
        ["array", 0, "<f8", [12], [1]],
        ["array", 0, "<f8", [12.0], [0]],
        ["array", 99, "<f8", [12], [0]],
        ["array", "0", "<f8", [12], [0]],
        ["array", 0, {"names": ["a"], "formats": ["<f8"], "offsets": [10**9], "itemsize": 8}, [12], [0]],
        ["array", 0, ["<f8", [10**12]], [12], [0]],
        ["tensor", 0, "|u1", [96], [0], "load"],
        ["tensor", 0, "|u1", [96], [0], "hub"],
        ["dict", [["list"]], [1]],
        ["named", ["a"], [], 1],
        ["int", "zz"],
        ["bytes", 7],
        ["no such tag", 1],
        [],
        [[[]]],
    ],
    ids=str,
)
def test_an_invalid_description_is_an_error_that_names_file_and_sample(path: Path, node: Any) -> None:
    forge(path, 3, [json.dumps(node).encode(), bytes(96)])
    cache = opened(path)
    with pytest.raises(DatasetError, match=r'cache" is damaged: the record of sample 3 has an invalid description'):
        cache[3]
    assert same(cache[4], Samples()[4])


@pytest.mark.parametrize(
    "description", [b"[" * 100_000, b'{"a":' * 20_000, b"\xff\xfe", b"", b"null null", b"9" * 9999]
)
def test_a_description_that_is_not_json_is_an_error(path: Path, description: bytes) -> None:
    words_of(path)[TABLE + 3] = words_of(path)[TABLE + 1]  # where there is room after it
    forge(path, 3, [description])
    with pytest.raises(DatasetError, match="has an invalid description"):
        opened(path)[3]


@pytest.mark.parametrize("sizes", [[-64], [], [10**15], [2**62, 2**62], [1] * 3, [0] * 500])
def test_pieces_that_do_not_fit_are_an_error(path: Path, sizes: list[int]) -> None:
    words_of(path)[TABLE + 3] = words_of(path)[TABLE + 1]
    forge(path, 3, [b"null"], sizes)
    with pytest.raises(DatasetError, match="of sample 3 has pieces that do not fit"):
        opened(path)[3]


# -- the table and the header

WORDS = [1, -64, 63, 64, 8 * TABLE, ROOM - 8, ROOM, ROOM * 64, 2**62, -(2**63)]


@pytest.mark.parametrize("word", WORDS)
def test_a_damaged_word_of_the_table_is_a_clear_error_when_opened_and_in_use(path: Path, word: int) -> None:
    cache = opened(path)
    words_of(path)[TABLE + 2] = word
    with pytest.raises(
        DatasetError, match=rf'cache" is damaged: its table has sample 2 at byte {word:,}.*\n.*Delete it'
    ):
        cache[2]
    assert same(cache[1], Samples()[1])
    with pytest.raises(DatasetError, match="its table has sample 2 at byte"):
        opened(path)


@pytest.mark.parametrize("word", WORDS)
def test_a_damaged_end_overwrites_nothing(path: Path, word: int) -> None:
    cache = opened(path)
    words = words_of(path)
    words[TABLE + 2], words[TAIL_AT] = 0, word
    before = bytes(words[TABLE:])
    if word == ROOM:  # indistinguishable from a full file
        return
    with pytest.raises(DatasetError, match="it says that its records end at byte"):
        cache[2]
    assert bytes(words[TABLE:]) == before
    with pytest.raises(DatasetError, match="it says that its records end at byte"):
        opened(path)


def test_a_sample_whose_word_points_to_the_record_of_another_is_read_anew(path: Path) -> None:
    words = words_of(path)
    words[TABLE + 2] = words[TABLE + 4]
    cache = opened(path)
    assert same(cache[2], Samples()[2])
    assert same(cache[4], Samples()[4])


# -- truncated while in use


def use(cache: DecodedCache, nbytes: int, then: int | None) -> None:
    with open(cache._records.path or "", "r+b") as file:
        file.truncate(nbytes)
        if then is not None:
            file.truncate(then)
    uses: list[Callable[[int], Any]] = [
        cache.__getitem__,
        cache._records.view,
        lambda index: cache._records.put(index, 1),
        lambda index: opened(Path(cache._records.path or "")),
        lambda index: (repr(cache), cache.hit_rate, cache.cached_count, cache.cached_nbytes),
    ]
    for read in uses:
        for index in range(COUNT):
            try:
                found = read(index)
                assert not isinstance(found, dict) or same(found, Samples()[index])
            except DatasetError as error:
                assert "cache" in str(error)  # noqa: PT017  both are right
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("then", [None, ROOM, 2 * ROOM])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, TABLE * 8, TABLE * 8 + 16, 12_000, ROOM // 2, ROOM - 1])
@pytest.mark.parametrize("is_read", [True, False])
def test_a_file_that_is_truncated_in_use_ends_no_process(
    path: Path, nbytes: int, then: int | None, is_read: bool
) -> None:
    cache = opened(path)
    # A record is verified only once: do not cut one in two after that and then restore the length of the file.
    is_read = is_read and not (nbytes == 12_000 and then == ROOM)
    for index in range(COUNT if is_read else 0):
        cache[index]
    process = multiprocessing.get_context("fork").Process(target=use, args=(cache, nbytes, then))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_loader_over_a_file_that_is_truncated_raises(path: Path) -> None:
    loader = DataLoader(opened(path), 1, num_workers=1, collate_fn=len)
    os.truncate(path, 4096)
    with pytest.raises(DatasetError, match=r"was changed while in use: it has 4,096 bytes, not 131,072"):
        list(loader)


def test_a_descriptor_that_other_code_has_closed_is_an_error_and_not_another_files_bytes(path: Path) -> None:
    cache = opened(path)
    other = os.open(path.parent / "other", os.O_RDWR | os.O_CREAT)
    os.truncate(other, ROOM)
    os.dup2(other, cache._records._fd)
    with pytest.raises(DatasetError, match="other code in this process has closed the descriptor"):
        cache[2]
    number = cache._records._fd
    del cache
    os.fstat(number)  # the other file's, which was not closed
    os.close(number)
    os.close(other)
    assert (path.parent / "other").read_bytes() == bytes(ROOM)


# -- random damage


def seal(content: bytearray, index: int) -> None:
    """Correct the checksum of a sample's record, if there is one."""
    offset = struct.unpack_from("q", content, (TABLE + index) * 8)[0]
    if 0 < offset < ROOM - 64:
        nbytes = struct.unpack_from("q", content, offset + 8)[0]
        if 24 < nbytes <= ROOM - offset:
            struct.pack_into("q", content, offset + 16, zlib.crc32(content[offset + 24 : offset + nbytes]))


def test_reading_a_randomly_damaged_file_gives_a_sample_or_an_error_of_ours(path: Path) -> None:
    original, rng = path.read_bytes(), random.Random(5)
    table = struct.unpack_from(f"{COUNT}q", original, TABLE * 8)
    outcomes = {"sample": 0, "error": 0}
    for _ in range(400):
        content = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            index = rng.randrange(COUNT)
            where = rng.choice(["head", "text", "table", "header", "tail"])
            if where == "head":
                struct.pack_into("q", content, table[index] + 8 * rng.randrange(12), rng.choice([*WORDS, 0, 2, 3, 100]))
            elif where == "text":
                at = table[index] + 64 + rng.randrange(400)
                content[at] = rng.choice(b'0123456789[]{}",:-eE\\ truefalsn<|OVU\x00\xff')
            elif where == "table":
                struct.pack_into("q", content, (TABLE + index) * 8, rng.choice([*WORDS, 0, *table]))
            elif where == "header":
                struct.pack_into("q", content, 8 * rng.choice([TAIL_AT, LOOKED_AT, 5]), rng.choice(WORDS))
            else:
                content[table[index] + rng.randrange(2000)] = rng.randrange(256)
        for index in range(COUNT):
            seal(content, index)
        path.write_bytes(content)
        try:
            cache = opened(path)
        except DatasetError:
            outcomes["error"] += 1
            continue
        for index in range(COUNT):
            for read in (cache.__getitem__, cache._records.view):
                try:
                    read(index)
                    outcomes["sample"] += 1
                except DatasetError:
                    outcomes["error"] += 1
    assert outcomes["sample"] > 500
    assert outcomes["error"] > 100


def test_forged_records_have_the_format_of_the_library(path: Path) -> None:
    description = json.dumps(["tuple", 1, ["array", 0, "|u1", [2, 3], [1, 0]]]).encode()
    forge(path, 2, [description, bytes(range(6))])
    number, array = opened(path)[2]
    assert (number, array.tolist(), records.ABSENT is array) == (1, [[0, 3], [1, 4], [2, 5]], False)
