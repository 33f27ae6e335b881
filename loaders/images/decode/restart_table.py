"""The content of an index of restart markers: one array, with an entry per file, found by the hash of its name."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np

from loaders.images.decode.restart import Restarts

_MAGIC = b"restart\x01"  # with the version of the layout
_HEAD = Struct("<8sQQQ")  # magic, entries, anchors, bytes of headers
_HASH = np.dtype("<u8")
_ANCHOR = np.dtype("<u4")
# Size and time of the file, offsets and lengths of anchors and header, checksum; then the numbers of `Restarts`.
_ENTRY = Struct("<QqQQIIIHHHHHBBB7x")
_HEADER_OF_ENTRY = np.dtype(
    {"names": ["at", "nbytes"], "formats": ["<u8", "<u4"], "offsets": [24, 36], "itemsize": _ENTRY.size}
)


Added = dict[int, tuple[bytes, Restarts]]  # by the hash of the name; the entries as `entry_of` makes them


Read = Callable[[int, int], bytes]  # (at, nbytes) → those bytes of a file; fewer if it is shorter, or cannot be read


class Table:
    """The content of one file: sorted hashes of names, an entry for each, and what the entries point to.

    Only the hashes are kept in memory. The rest is read on demand, and may have changed by then.

    Args:
        read: returns bytes of the file.
        nbytes: the size of the file. If it does not match the first bytes, the table is empty.
    """

    def __init__(self, read: Read, nbytes: int) -> None:
        self._read = read
        counts, head = (0, 0, 0), read(0, _HEAD.size)
        if len(head) == _HEAD.size:
            magic, entries, anchors, headers_nbytes = _HEAD.unpack(head)
            expected = entries * (_HASH.itemsize + _ENTRY.size) + anchors * _ANCHOR.itemsize + headers_nbytes
            if magic == _MAGIC and expected == nbytes - _HEAD.size:
                counts = entries, anchors, headers_nbytes
        hashes = read(_HEAD.size, counts[0] * _HASH.itemsize)
        if len(hashes) < counts[0] * _HASH.itemsize:
            counts, hashes = (0, 0, 0), b""
        self.hashes = memoryview(hashes).cast("Q")
        self._counts = counts
        self._entries_at = _HEAD.size + counts[0] * _HASH.itemsize
        self._anchors_at = self._entries_at + counts[0] * _ENTRY.size
        self._headers_at = self._anchors_at + counts[1] * _ANCHOR.itemsize

    def entry(self, number: int) -> bytes | None:
        """The entry of a file, by the hash of its name."""
        at = bisect_left(self.hashes, number)
        if at == len(self.hashes) or self.hashes[at] != number:
            return None
        entry = self._read(self._entries_at + at * _ENTRY.size, _ENTRY.size)
        return entry if len(entry) == _ENTRY.size else None

    def restarts(self, entry: bytes) -> Restarts | None:
        """The content of an entry; None if it is damaged."""
        _, _, anchors_at, header_at, anchors, header_nbytes, checksum, *numbers = _ENTRY.unpack(entry)
        width, height, interval, stride, size_at, orientation, across, down = numbers
        if anchors_at + anchors > self._counts[1] or header_at + header_nbytes > self._counts[2]:
            return None
        header = self._read(self._headers_at + header_at, header_nbytes)
        places = self._read(self._anchors_at + anchors_at * _ANCHOR.itemsize, anchors * _ANCHOR.itemsize)
        if len(header) < header_nbytes or len(places) < anchors * _ANCHOR.itemsize:
            return None
        offsets = np.frombuffer(places, _ANCHOR)
        found = Restarts(width, height, orientation, (across, down), interval, stride, size_at, header, offsets)
        return found if _checksum(entry, found) == checksum else None

    def with_added(self, added: Added) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The content of the file with these entries added. The data of replaced entries stays in it, unreferenced."""
        count, anchors_at, headers_nbytes = self._counts
        rest = self._read(self._entries_at, self._headers_at + headers_nbytes - self._entries_at)
        hashes, new_hashes = np.frombuffer(self.hashes, _HASH), np.fromiter(added, _HASH, len(added))
        if len(rest) < self._headers_at + headers_nbytes - self._entries_at:  # cut short since it was opened
            count, anchors_at, headers_nbytes, rest, hashes = 0, 0, 0, b"", hashes[:0]
        entries = np.frombuffer(rest, np.dtype((np.void, _ENTRY.size)), count)
        old_anchors = np.frombuffer(rest, _ANCHOR, anchors_at, count * _ENTRY.size)
        old_headers = rest[len(rest) - headers_nbytes :]
        places = np.unique(entries.view(_HEADER_OF_ENTRY))
        headers = {old_headers[at : at + nbytes]: at for at, nbytes in places.tolist()}
        anchor_parts, header_parts = [old_anchors], [old_headers]
        new_entries = []
        for entry, restarts in added.values():
            header_at = headers.setdefault(restarts.header, headers_nbytes)
            if header_at == headers_nbytes:
                header_parts.append(restarts.header)
                headers_nbytes += len(restarts.header)
            fields = list(_ENTRY.unpack(entry))
            fields[2:4] = anchors_at, header_at
            new_entries.append(_ENTRY.pack(*fields))
            anchor_parts.append(restarts.anchors)
            anchors_at += len(restarts.anchors)
        kept = ~np.isin(hashes, new_hashes)
        all_hashes = np.concatenate([hashes[kept], new_hashes])
        all_entries = np.concatenate([entries[kept], np.frombuffer(b"".join(new_entries), entries.dtype)])
        order = np.argsort(all_hashes)
        head = _HEAD.pack(_MAGIC, len(order), anchors_at, headers_nbytes)
        anchors = np.concatenate(anchor_parts, dtype=_ANCHOR)
        parts = (head, all_hashes[order], all_entries[order], anchors, b"".join(header_parts))
        return np.frombuffer(b"".join(part.data if isinstance(part, np.ndarray) else part for part in parts), np.uint8)


def entry_of(nbytes: int, mtime_ns: int, restarts: Restarts) -> bytes:
    """An entry whose offsets are not set yet."""
    numbers = (restarts.width, restarts.height, restarts.interval, restarts.stride, restarts.size_at)
    lengths = len(restarts.anchors), len(restarts.header)
    rest = (*numbers, restarts.orientation, *restarts.sampling)
    checksum = _checksum(_ENTRY.pack(nbytes, mtime_ns, 0, 0, *lengths, 0, *rest), restarts)
    return _ENTRY.pack(nbytes, mtime_ns, 0, 0, *lengths, checksum, *rest)


def _checksum(entry: bytes, restarts: Restarts) -> int:
    """The checksum of an entry and what it points to, without the offsets."""
    checksum = zlib.crc32(entry[:16] + entry[32:40] + entry[44:])
    return zlib.crc32(restarts.header, zlib.crc32(np.ascontiguousarray(restarts.anchors, _ANCHOR).data, checksum))


def is_of(entry: bytes, nbytes: int, mtime_ns: int | None) -> bool:
    """Whether an entry is of a file of this size and time; None matches any time."""
    known_nbytes, known_mtime_ns = _ENTRY.unpack(entry)[:2]
    return bool(known_nbytes == nbytes and mtime_ns in (None, known_mtime_ns))
