"""Reads GIF files by blocks (GIF89a, sections 17 and later)."""

from __future__ import annotations

SIGNATURES = (b"GIF87a", b"GIF89a")

_EXTENSION, _GRAPHIC_CONTROL = 0x21, 0xF9
_IS_TRANSPARENT = 1


def opaque(data: bytes) -> bytes:
    """The same file without a transparent colour in its first picture: OpenCV would replace that colour."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 5 < len(data) and data[at] == _EXTENSION:
        if data[at + 1] == _GRAPHIC_CONTROL and data[at + 3] & _IS_TRANSPARENT:
            return data[: at + 3] + bytes([data[at + 3] & ~_IS_TRANSPARENT]) + data[at + 4 :]
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return data
