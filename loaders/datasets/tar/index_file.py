"""An index in a file: written on request, and used only for the shards that it was made of.

It holds numbers and names, and nothing that could run. The numbers are checked: a damaged or forged file is refused, or
leads to other members of the same shards at worst, whose headers are compared when they are read.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from struct import Struct
from typing import Any

import numpy as np

from loaders.datasets.image_files import PackedPaths
from loaders.datasets.tar.headers import BLOCK
from loaders.datasets.tar.index import REMOTE_THREADS, TarIndex
from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.decode.files import file_system, is_remote

_MAGIC = b"tarindx\x02"  # with the version of the layout
# Magic; shards, samples, members, extensions; bytes of paths, keys, extensions; CRC-32 of all that follows.
_OTHER_FILE = "Pass the path of another file as index=."
_HEAD = Struct("<8s7QI4x")
_I8, _U4, _U2, _U1 = (np.dtype(each) for each in ("<i8", "<u4", "<u2", "u1"))


class _RefusedError(Exception):
    """Why a file is no index of these shards, and what to do."""

    def __init__(self, why: str, remedy: str = "Delete it, and it will be made anew.") -> None:
        super().__init__(why)
        self.remedy = remedy


def load(path: str, shards: Sequence[str]) -> TarIndex | None:
    """The index in a file; None if there is no such file.

    Args:
        path: of the index, or a URL.
        shards: the paths or URLs of the shards that it must be of. Their folders may have other names by now.

    Raises:
        DatasetError: it is damaged, of another version, or of other shards than these as they are now.
    """
    try:
        content = _content(path)
        if content is None:
            return None
        index = _parsed(content, shards)
        _compare(index, shards)
    except _RefusedError as error:
        raise DatasetError(f'index "{printable(path)}" cannot be used: {error}.\n  {error.remedy}') from error
    return index


def save(path: str, index: TarIndex) -> None:
    """Write an index: the file gets its name when it is complete.

    Raises:
        DatasetError: it cannot be written.
    """
    arrays = _arrays_of(index)
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    lists = _lists_of(index)
    counts = (len(index.paths), len(index.keys), len(index.kinds), len(index.extensions))
    head = _HEAD.pack(_MAGIC, *counts, *(each.arrays[0].nbytes for each in lists), zlib.crc32(body))
    try:
        if is_remote(path):
            files, name = file_system(path)
            files.pipe_file(name, head + body)
            return
        unfinished = Path(f"{path}.{token_hex(8)}.part")
        try:
            with open(unfinished, "xb") as file:
                file.write(head)
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise DatasetError(f'index "{printable(path)}" cannot be written: {error.strerror or error}.') from error


def _lists_of(index: TarIndex) -> tuple[PackedPaths, PackedPaths, PackedPaths]:
    return PackedPaths(index.paths), index.keys, PackedPaths(index.extensions)


def _arrays_of(index: TarIndex) -> list[np.ndarray[Any, Any]]:
    """In the order of the file."""
    lists = [array for each in _lists_of(index) for array in reversed(each.arrays)]
    numbers = [index.shard_sizes, index.shard_times, index.shard_starts, index.member_starts, index.starts, index.sizes]
    wide = [*lists[::2], *numbers]
    return [
        *(array.astype(_I8, copy=False) for array in wide),
        index.checksums.astype(_U4, copy=False),
        index.kinds.astype(_U2, copy=False),
        *lists[1::2],
    ]


def _content(path: str) -> bytes | None:
    try:
        if is_remote(path):
            files, name = file_system(path)
            return bytes(files.cat_file(name))
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _RefusedError("it is not a file", _OTHER_FILE)
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a NUL in the path, an unknown protocol
        why = getattr(error, "strerror", None) or error
        raise _RefusedError(f"it cannot be read: {why}", "Make it readable, or pass another path as index=.") from error


def _parsed(content: bytes, shards: Sequence[str]) -> TarIndex:
    if not content.startswith(_MAGIC[:-1]):
        raise _RefusedError("it is no index of tar shards", _OTHER_FILE)
    if not content.startswith(_MAGIC):
        raise _RefusedError("it is of another version of this library")
    if len(content) < _HEAD.size:
        raise _RefusedError("it is damaged: its size is not what it says")
    _, n_shards, n_samples, n_members, n_extensions, *texts, checksum = _HEAD.unpack_from(content)
    counts = [n_shards + 1, n_samples + 1, n_extensions + 1, n_shards, n_shards, n_shards + 1, n_samples + 1]
    counts += [n_members] * 4 + texts
    dtypes = [*[_I8] * 9, _U4, _U2, *[_U1] * 3]
    if sum(count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)) != len(content) - _HEAD.size:
        raise _RefusedError("it is damaged: its size is not what it says")
    if zlib.crc32(memoryview(content)[_HEAD.size :]) != checksum:
        raise _RefusedError("it is damaged: its checksum is wrong")
    at, arrays = _HEAD.size, []
    for count, dtype in zip(counts, dtypes, strict=True):
        # Views, aligned, since wider numbers come first.
        arrays.append(np.frombuffer(content, dtype, count, at).astype(dtype.newbyteorder("="), copy=False))
        at += count * dtype.itemsize
    path_ends, key_ends, extension_ends, sizes, times, shard_starts, member_starts, starts, nbytes, *rest = arrays
    checksums, kinds, *encoded = rest
    ends_of_texts = (path_ends, key_ends, extension_ends)
    levels = [(shard_starts, n_samples), (member_starts, n_members), *zip(ends_of_texts, texts, strict=True)]
    for ends, last in levels:
        if ends[0] != 0 or ends[-1] != last or (ends[1:] < ends[:-1]).any():
            raise _RefusedError("it is damaged: its numbers contradict each other")
    lists = [PackedPaths.from_arrays(text, ends) for text, ends in zip(encoded, ends_of_texts, strict=True)]
    if list(map(os.path.basename, lists[0])) != list(map(os.path.basename, shards)):
        raise _RefusedError(
            f"it is of other shards, {_named(lists[0])}; the dataset has {_named(shards)}",
            "Pass another path as index=, or delete it, and it will be made anew.",
        )
    keys, extensions = lists[1], list(lists[2])
    places = (kinds, starts, nbytes, checksums)
    found = TarIndex(list(shards), sizes, times, shard_starts, keys, member_starts, extensions, *places)
    _check(found)
    return found


def _check(index: TarIndex) -> None:
    """Whether every member lies inside its shard."""
    per_shard = np.diff(index.member_starts[index.shard_starts])
    room = np.repeat(index.shard_sizes, per_shard) - index.starts
    is_inside = (index.starts >= BLOCK) & (index.starts % BLOCK == 0) & (index.sizes >= 0) & (index.sizes <= room)
    is_known = index.kinds < len(index.extensions)
    has_members = index.member_starts[1:] > index.member_starts[:-1]
    if not (is_inside.all() and is_known.all() and has_members.all()):
        raise _RefusedError("it is damaged: a member lies outside its shard")


def _compare(index: TarIndex, shards: Sequence[str]) -> None:
    """Whether the shards are as they were."""
    for number, (path, found) in enumerate(zip(shards, _sizes_and_times(shards), strict=True)):
        expected = int(index.shard_sizes[number]), int(index.shard_times[number])
        if found != expected:
            what = "size" if found[0] != expected[0] else "modification time"
            raise _RefusedError(f'shard "{printable(path)}" has another {what} since')


def _sizes_and_times(shards: Sequence[str]) -> Iterator[tuple[int, int]]:
    if any(map(is_remote, shards)):
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:  # one after the other, thousands of requests take minutes
            yield from pool.map(_size_and_time, shards)
    else:
        yield from map(_size_and_time, shards)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        if is_remote(path):
            files, name = file_system(path)
            return int(files.size(name) or 0), 0
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError) as error:  # a NUL in the path, an unknown protocol
        why = getattr(error, "strerror", None) or error
        raise DatasetError(f'shard "{printable(path)}" cannot be opened: {why}.') from error


def _named(paths: Sequence[str] | PackedPaths) -> str:
    names = [printable(os.path.basename(paths[number])) for number in range(min(3, len(paths)))]
    return f"{len(paths):,} ({', '.join(names)}{', …' if len(paths) > 3 else ''})"
