"""Tar shards for tests, written by Python's own `tarfile`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.photo_zoo import jpeg, photo

Entry = tuple[str, bytes]


def write_tar(path: Path, entries: Iterable[Entry | tarfile.TarInfo], *, kind: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a shard of files, and of entries without content, in a format of `tarfile`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                tar.addfile(file_entry(*entry), io.BytesIO(entry[1]))
    return path


def file_entry(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


def other_entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A folder, a link or a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: bytes = b"0.txt", size: bytes = b"00000000005\0", kind: bytes = b"0", **fields: Any) -> bytes:
    """One header block, with a correct checksum unless another one is given."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = fields.get("magic", b"ustar\x0000")
    prefix = fields.get("prefix", b"")
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    total = sum(byte - 256 if byte > 127 and fields.get("signed") else byte for byte in block)
    block[148:156] = fields.get("checksum", b"%06o\0 " % (total % 0o1000000))
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = bytes(1024)


def write_photos(root, count=12, per_shard=5, restart=0):
    """Shards of photos with a class each, and the same photos as files; returns the files."""
    files = []
    for first in range(0, count, per_shard):
        entries = []
        for number in range(first, min(count, first + per_shard)):
            content = jpeg(photo(120 + number, 90 - number), restart=restart)
            files.append(root / "files" / f"{number:02}.jpg")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_bytes(content)
            entries += [(f"{number:02}.jpg", content), (f"{number:02}.cls", str(number * 3).encode())]
        write_tar(root / f"{first // per_shard:03}.tar", entries)
    return files
