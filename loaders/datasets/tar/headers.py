"""One header block of a tar file, and the extended records that may precede it (POSIX.1-2008, pax; GNU tar)."""

from __future__ import annotations

import zlib
from typing import NamedTuple

BLOCK = 512
END = bytes(BLOCK)

# Types of the header block.
REGULAR = (b"0", b"\0", b"7")  # the last one asks for contiguous storage
LONG_NAME, LONG_LINK = b"L", b"K"
RECORDS, RECORDS_OF_SOLARIS, GLOBAL_RECORDS = b"x", b"X", b"g"
SPARSE = b"S"
# Of these a header may state a size, but no content follows.
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")

_NAME, _SIZE, _CHECKSUM, _MAGIC, _PREFIX = (
    slice(100),
    slice(124, 136),
    slice(148, 156),
    slice(257, 265),
    slice(345, 500),
)
_USTAR, _GNU = b"ustar", b"ustar  \0"  # GNU's has no prefix
_DIGITS = 18
_ADLER = 65521
_BLANK_CHECKSUM = 8 * 0x20  # while the sum is computed, its own field counts as spaces


class HeaderError(ValueError):
    """A header is damaged or of an unsupported kind; the text becomes part of a DatasetError."""


class Header(NamedTuple):
    """What one block states.

    Attributes:
        kind: the type flag.
        name: bytes up to the first NUL, with the prefix of POSIX.
        nbytes: the size it states.
    """

    kind: bytes
    name: bytes
    nbytes: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file; one whose name ends in a slash is a folder of the oldest format."""
        return self.kind in REGULAR and not (self.kind == b"\0" and self.name.endswith(b"/"))

    @property
    def content_nbytes(self) -> int:
        """The bytes that follow the block, without padding."""
        is_old_folder = self.kind == b"\0" and self.name.endswith(b"/")
        return 0 if self.kind in _WITHOUT_CONTENT or is_old_folder else self.nbytes


def read_header(block: bytes) -> Header:
    """Read a block that is not `END`.

    Raises:
        HeaderError: its checksum or its size is wrong, or it is cut short.
    """
    if len(block) < BLOCK:
        raise HeaderError("the shard is cut short: a header is incomplete")
    if not _has_checksum(block):
        raise HeaderError("no header of a tar file, or a damaged one: its checksum is wrong")
    name = block[_NAME].split(b"\0", 1)[0]
    magic = block[_MAGIC]
    if magic.startswith(_USTAR) and magic != _GNU and (prefix := block[_PREFIX].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return Header(block[156:157], name, _number(block[_SIZE], "size"))


def read_records(content: bytes) -> dict[bytes, bytes]:
    """The records of a pax header: lines of `length keyword=value`, where the length counts the whole line.

    Raises:
        HeaderError: one is damaged.
    """
    records, at = dict[bytes, bytes](), 0
    while at < len(content) and content[at]:  # some writers pad with NUL
        digits, space, _ = content[at : at + 21].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        keyword, equals, value = content[at + len(digits) + 1 : at + length].partition(b"=")
        if at + length > len(content) or not equals or value[-1:] != b"\n":
            raise HeaderError("a record of an extended header is damaged")
        records[keyword] = value[:-1]
        at += length
    return records


def apply_records(header: Header, records: dict[bytes, bytes]) -> Header:
    """The header with the name and size that its records state.

    Raises:
        HeaderError: the size is damaged, or the file is sparse.
    """
    if header.kind == SPARSE or any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        raise HeaderError(
            "a sparse file, whose content is not stored as it is.\n  Write the shard again without --sparse"
        )
    if not records:
        return header
    size = records.get(b"size")
    if size is not None:
        if not size.isdigit() or len(size) > _DIGITS:
            raise HeaderError("a record of an extended header is damaged: its size is no number")
        header = header._replace(nbytes=int(size))
    return header._replace(name=records.get(b"path", header.name))


def padded(nbytes: int) -> int:
    """The size of a member's content with its padding."""
    return -(-nbytes // BLOCK) * BLOCK


def _has_checksum(block: bytes) -> bool:
    field = block[_CHECKSUM]
    try:
        stated = _number(field, "checksum")
    except HeaderError:
        return False
    # Adler-32 sums bytes in its lower half, 20 times faster than Python: 1 + their sum, modulo a prime.
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(field) + _BLANK_CHECKSUM
    if (total - stated) % _ADLER == 0:
        return True
    # Some old writers added signed bytes.
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + _BLANK_CHECKSUM
    return signed == stated


def _number(field: bytes, what: str) -> int:
    """A number in octal digits, or in base 256 if the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
        if field[0] not in (0x80, 0xFF) or value < 0 or value >= 1 << 63:
            raise HeaderError(f"a header is damaged: its {what} is impossible")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:  # int() also takes signs and underscores
        raise HeaderError(f"a header is damaged: its {what} is no number")
    return int(digits, 8)
