"""A member of a shard: an image that the decoders read in place, or bytes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from loaders.datasets.tar.index import TarIndex
from loaders.datasets.tar.shards import OpenShards, Shard, before
from loaders.images.decode.files import Parts, Stored
from loaders.timing.stages import READ, count_read

_CUT = "its shard has been cut short since its members were found"


class Member(Stored):
    """The content of one member.

    The header before it, and the block before that, which holds a long name, are compared with those that were indexed,
    so that a shard whose members have moved is noticed.

    Args:
        index: where it lies.
        shards: the open shards.
        sample: the number of its sample.
        member: its number.
    """

    def __init__(self, index: TarIndex, shards: OpenShards, sample: int, member: int) -> None:
        self._index, self._shards = index, shards
        self._sample, self._member = sample, member
        self._shard = index.shard_of(sample)

    @property
    def name(self) -> str:
        """The path of the shard, and the member's name in it, as if the shard were a folder."""
        index = self._index
        return f"{index.paths[self._shard]}/{index.keys[self._sample]}.{index.extensions[index.kinds[self._member]]}"

    def open(self) -> Parts:
        """Open it for the image decoders."""
        index, number = self._index, self._member
        place = int(index.starts[number]), int(index.sizes[number]), int(index.checksums[number])
        return _MemberParts(self._shards[self._shard], self.name, *place)

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            OSError: the shard cannot be read, or has changed.
        """
        index, number = self._index, self._member
        place = int(index.starts[number]), int(index.sizes[number]), int(index.checksums[number])
        with READ:
            content = _whole(self._shards[self._shard], *place)
            count_read(len(content))
        return content


class _MemberParts:
    def __init__(self, shard: Shard, name: str, start: int, nbytes: int, checksum: int) -> None:
        self.path: str | None = name
        self.nbytes = nbytes
        self.mtime_ns: int | None = shard.mtime_ns or None
        self._shard, self._start, self._checksum = shard, start, checksum
        self._is_checked = False

    def read(self) -> bytes:
        return _whole(self._shard, self._start, self.nbytes, self._checksum)

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        begins = [self._start + min(at, self.nbytes) for at in starts]
        lasts = [self._start + min(at, self.nbytes) for at in ends]
        if not self._is_checked:  # in the same request, if the shard is remote
            header, *found = self._shard.read([before(self._start), *begins], [self._start, *lasts])
            _check(header, self._checksum)
            self._is_checked = True
        else:
            found = self._shard.read(begins, lasts)
        if sum(map(len, found)) != sum(lasts) - sum(begins):
            raise OSError(_CUT)
        return bytearray().join(found)

    def close(self) -> None:
        pass  # the shard stays open


def _whole(shard: Shard, start: int, nbytes: int, checksum: int) -> bytes:
    """The content of a member, after a look at the header before it."""
    header, content = shard.read_member(start, nbytes)
    _check(header, checksum)
    if len(content) != nbytes:
        raise OSError(_CUT)
    return content


def _check(header: bytes, checksum: int) -> None:
    if zlib.crc32(header) != checksum:
        raise OSError("its shard has changed since its members were found: another header precedes it")
