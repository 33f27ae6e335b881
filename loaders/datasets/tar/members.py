"""A member of a shard: an image that the decoders read in place, or bytes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from loaders.datasets.tar.headers import BLOCK
from loaders.datasets.tar.index import TarIndex
from loaders.datasets.tar.shards import OpenShards, Shard
from loaders.images.decode.files import Parts, Stored
from loaders.timing.stages import READ, count_read


class Member(Stored):
    """The content of one member.

    The header before it is compared with the one that was indexed, so that a shard whose members have moved is noticed.

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
    def extension(self) -> str:
        """In lower case, without the first dot."""
        return self._index.extensions[self._index.kinds[self._member]]

    @property
    def name(self) -> str:
        """The path of the shard, and the member's name in it, as if the shard were a folder."""
        return f"{self._index.paths[self._shard]}/{self._index.keys[self._sample]}.{self.extension}"

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
        start, nbytes = int(index.starts[number]), int(index.sizes[number])
        with READ:
            content = _read(self._shards[self._shard], int(index.checksums[number]), start, nbytes, [0], [nbytes])[0]
            count_read(nbytes)
        return content


class _MemberParts:
    def __init__(self, shard: Shard, name: str, start: int, nbytes: int, checksum: int) -> None:
        self.path: str | None = name
        self.nbytes = nbytes
        self.mtime_ns: int | None = shard.mtime_ns or None
        self._shard, self._start = shard, start
        self._checksum: int | None = checksum

    def read(self) -> bytes:
        return self._read([0], [self.nbytes])[0]

    def read_parts(self, starts: Sequence[int], ends: Sequence[int]) -> bytearray:
        return bytearray().join(self._read(starts, ends))

    def close(self) -> None:
        pass  # the shard stays open

    def _read(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        found = _read(self._shard, self._checksum, self._start, self.nbytes, starts, ends)
        self._checksum = None
        return found


def _read(
    shard: Shard, checksum: int | None, start: int, nbytes: int, starts: Sequence[int], ends: Sequence[int]
) -> list[bytes]:
    """The bytes of some parts of a member; fewer where they extend past its end.

    Args:
        shard: the open shard.
        checksum: of the header block, which is read in the same request and compared; None if it has been.
        start, nbytes: where the content of the member is.
        starts, ends: of the parts in the member.
    """
    begins = [start + min(at, nbytes) for at in starts]
    lasts = [start + min(at, nbytes) for at in ends]
    if checksum is None:
        found = shard.read(begins, lasts)
    else:
        header, *found = shard.read([start - BLOCK, *begins], [start, *lasts])
        if zlib.crc32(header) != checksum:
            raise OSError("its shard has changed since its members were found: another header precedes it")
    if sum(map(len, found)) != sum(lasts) - sum(begins):
        raise OSError("its shard has been cut short since its members were found")
    return found
