"""The members of one shard, found by reading its headers; the content of members is skipped."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from loaders.datasets.tar import headers
from loaders.datasets.tar.headers import BLOCK, Header, HeaderError
from loaders.datasets.tar.shards import Shard, before, open_shard
from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.decode.files import is_remote

_AHEAD_NBYTES = 64 * 1024  # read at once where members are small: a system call costs as much as copying these
_PAGE_NBYTES = 4096
_RECORDS_NBYTES = 1 << 20  # of an extended header, at most
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"\x1f\x9d": ("compress", "uncompress"),
}
# WebDataset reserves such names for what describes a shard.
_RESERVED = re.compile(rb"__[^/]*__(/|$)")


class Found(NamedTuple):
    """The samples of one shard, in the order of their first members; the members of a sample are neighbours.

    Attributes:
        nbytes, mtime_ns: of the shard.
        keys: names without extension, one per sample.
        counts: int64 (samples,), members of each sample.
        extensions: the different ones, in lower case and without the first dot.
        kinds: int64 (members,), numbers of extensions.
        starts, sizes: int64 (members,), where the content of each member is, in bytes.
        checksums: uint32 (members,), CRC-32 of the two blocks before it, the header being the second.
    """

    nbytes: int
    mtime_ns: int
    keys: list[bytes]
    counts: np.ndarray[Any, np.dtype[np.int64]]
    extensions: list[bytes]
    kinds: np.ndarray[Any, np.dtype[np.int64]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    checksums: np.ndarray[Any, np.dtype[np.uint32]]


def scan_shard(path: str) -> Found:
    """Find the samples of a shard.

    A sample is all files of the shard whose names agree up to the first dot after the last slash. Names without an
    extension, hidden files, and names like `__this__` are left out, as are folders, links and devices.

    Raises:
        DatasetError: it cannot be opened, is compressed, cut short or damaged, holds a sparse file, two members of the
            same name, or something behind its end.
    """
    try:
        shard = open_shard(path)
    except (OSError, ValueError) as error:  # a NUL in the path, an unknown protocol
        why = getattr(error, "strerror", None) or error
        raise DatasetError(f'shard "{printable(path)}" cannot be opened: {why}.') from error
    rows: list[tuple[int, int, int, int, int]] = []
    samples: dict[bytes, int] = {}
    extensions: dict[bytes, int] = {}
    known: set[tuple[int, int]] = set()
    for name, start, nbytes, checksum in _files_of(shard):
        parts = split_name(name)
        if parts is None:
            continue
        sample = samples.setdefault(parts[0], len(samples))
        kind = extensions.setdefault(parts[1], len(extensions))
        if (sample, kind) in known:
            raise DatasetError(
                f'shard "{printable(path)}", byte {start - BLOCK:,}: a second "{_text(parts[0] + b"." + parts[1])}". '
                "A key and an extension, upper or lower case, may occur once in a shard.\n  Write the shard again."
            )
        known.add((sample, kind))
        rows.append((sample, kind, start, nbytes, checksum))
    table = np.array(rows, np.int64).reshape(len(rows), 5)
    # Stable: members of a sample need not be neighbours in the shard, and keep their order.
    table = table[np.argsort(table[:, 0], kind="stable")]
    counts = np.bincount(table[:, 0], minlength=len(samples)).astype(np.int64)
    kinds, starts, sizes, checksums = table[:, 1:].T
    found = (counts, list(extensions), kinds, starts, sizes, checksums.astype(np.uint32))
    return Found(shard.nbytes, shard.mtime_ns, list(samples), *found)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, extension) of a member's name, as WebDataset splits it: at the first dot after the last slash.

    None if it belongs to no sample.
    """
    folder_end = name.rfind(b"/") + 1
    dot = name.find(b".", folder_end)
    if dot <= folder_end or dot + 1 == len(name) or (name.startswith(b"__") and _RESERVED.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _files_of(shard: Shard) -> Iterator[tuple[bytes, int, int, int]]:
    """(name, start of the content, its size, CRC-32 of what is before it) of each regular file."""
    at = 0
    read = _Ahead(shard)
    try:
        begin = read(0, BLOCK)
        if not begin:
            raise HeaderError("the shard is empty: was it cut short?")
        for magic, (kind, program) in _COMPRESSED.items():
            if begin.startswith(magic):
                raise HeaderError(
                    f"the shard is compressed by {kind}: no member can be read without decompressing all before it.\n"
                    f"  Decompress it once: {program} {printable(shard.path)}"
                )
        common: dict[bytes, bytes] = {}
        records: dict[bytes, bytes] = {}
        while True:
            # With the block before it, which is compared when the member is read.
            begin_at = before(at + BLOCK)
            blocks = read(begin_at, at + BLOCK - begin_at)
            block = blocks[at - begin_at :]
            if block == headers.END:
                break
            if not block:
                raise HeaderError("the shard is cut short: nothing marks its end")
            header = headers.read_header(block)
            if header.kind in (headers.RECORDS, headers.RECORDS_OF_SOLARIS, headers.GLOBAL_RECORDS):
                target = common if header.kind == headers.GLOBAL_RECORDS else records
                target |= headers.read_records(_extension(read, at, header))
            elif header.kind == headers.LONG_NAME:
                records[b"path"] = _extension(read, at, header).split(b"\0", 1)[0]
            elif header.kind != headers.LONG_LINK:
                header = headers.apply_records(header, common | records)
                records = {}
                if header.is_file:
                    if at + BLOCK + header.nbytes > shard.nbytes:
                        raise HeaderError(f'the shard is cut short: it ends within "{_text(header.name)}"')
                    yield header.name, at + BLOCK, header.nbytes, zlib.crc32(blocks)
            at += BLOCK + headers.padded(header.content_nbytes)
        behind = at + BLOCK
        while rest := read(behind, _AHEAD_NBYTES):
            if rest.strip(b"\0"):
                raise HeaderError(
                    "something follows the end of the archive, which no reader would see.\n"
                    "  Archives are joined by `tar --concatenate`, not by `cat`"
                )
            behind += len(rest)
    except HeaderError as error:
        raise DatasetError(f'shard "{printable(shard.path)}", byte {at:,}: {error}.') from error
    except OSError as error:
        raise DatasetError(
            f'shard "{printable(shard.path)}", byte {at:,}: it cannot be read: {error.strerror or error}.'
        ) from error


def _extension(read: _Ahead, at: int, header: Header) -> bytes:
    """The content that extends the next header."""
    if header.nbytes > _RECORDS_NBYTES:
        raise HeaderError(f"an extended header of {header.nbytes:,} bytes is damaged: none is that long")
    content = read(at + BLOCK, header.nbytes)
    if len(content) < header.nbytes:
        raise HeaderError("the shard is cut short: an extended header is incomplete")
    return content


class _Ahead:
    """Reads bytes of a shard in pages, or in larger blocks as long as these turn out to be used."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._at, self._block = 0, b""
        self._is_remote = is_remote(shard.path)

    def __call__(self, at: int, nbytes: int) -> bytes:
        if at >= self._shard.nbytes:
            return b""
        start = at - self._at
        if not 0 <= start <= start + nbytes <= len(self._block):
            is_near = 0 <= start <= _AHEAD_NBYTES
            ahead = _AHEAD_NBYTES if is_near or self._is_remote else _PAGE_NBYTES
            (self._block,) = self._shard.read([at], [min(at + max(nbytes, ahead), self._shard.nbytes)])
            self._at, start = at, 0
        return self._block[start : start + nbytes]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
