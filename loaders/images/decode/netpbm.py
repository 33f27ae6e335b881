"""Decodes Netpbm pictures (PBM, PGM, PPM and PAM) with NumPy: OpenCV ignores the maximum value in the header."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from loaders.images.decode.opencv import UndecodableError, grey_of

_NUMBER = re.compile(rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,10})")
_FIELD = re.compile(rb"\s*(?:#[^\n]*\n\s*)*([A-Z]+)[ \t]*([^\n]*)\n")
_COMMENT = re.compile(rb"#[^\n\r]*")
_SAMPLES = {b"P1": 1, b"P2": 1, b"P3": 3, b"P4": 1, b"P5": 1, b"P6": 3}
_BITMAPS = (b"P1", b"P4")
_TEXTS = (b"P1", b"P2", b"P3")
_MOST = 65535
SIGNATURES = (*_SAMPLES, b"P7")


class NetpbmHeader(NamedTuple):
    """The header of a Netpbm file.

    Attributes:
        width, height: in pixels.
        samples: per pixel; the first, or the first three, are the colours.
        most: the maximum value of a sample in the header, 1 to 65535.
        at: offset of the first sample in the file.
        least_nbytes: the fewest bytes that the samples can take.
    """

    width: int
    height: int
    samples: int
    most: int
    at: int
    least_nbytes: int


def read_netpbm_header(data: bytes) -> NetpbmHeader:
    """Read the header.

    Raises:
        ValueError: it is not a Netpbm header, or is damaged.
    """
    magic = data[:2]
    if magic == b"P7":
        return _read_pam_header(data)
    samples = _SAMPLES.get(magic)
    if samples is None:
        raise ValueError("no Netpbm")
    numbers, at = [], 2
    for _ in range(2 if magic in _BITMAPS else 3):
        found = _NUMBER.match(data, at)
        if found is None:
            raise ValueError("a number is missing")
        numbers.append(int(found[1]))
        at = found.end()
    width, height, most = (*numbers, 1)[:3]
    return _header(width, height, samples, most, at + 1, magic)


def _read_pam_header(data: bytes) -> NetpbmHeader:
    fields: dict[bytes, bytes] = {}
    at = 3
    while b"ENDHDR" not in fields:
        found = _FIELD.match(data, at)
        if found is None:
            raise ValueError("a field is missing")
        fields.setdefault(found[1], found[2])
        at = found.end()
    try:
        width, height, samples, most = (int(fields[name]) for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"))
    except KeyError as missing:
        raise ValueError(f"no {missing}") from missing
    return _header(width, height, samples, most, at, b"P7")


def _header(width: int, height: int, samples: int, most: int, at: int, magic: bytes) -> NetpbmHeader:
    if min(width, height, samples, most) < 1 or most > _MOST:
        raise ValueError("a number is out of range")
    if magic == b"P4":
        nbytes = height * ((width + 7) // 8)
    elif magic in _TEXTS:
        nbytes = width * height * samples * (1 if magic == b"P1" else 2) - 1  # a digit, and a space between two
    else:
        nbytes = width * height * samples * (1 if most < 256 else 2)
    return NetpbmHeader(width, height, samples, most, at, nbytes)


def decode_netpbm(data: bytes, header: NetpbmHeader, mode: str) -> np.ndarray[Any, Any]:
    """The picture: uint8 (H, W, 3) RGB, or (H, W).

    Samples are scaled so that the maximum becomes 255; if it is above 255, so that it becomes 65535, and the high byte
    is kept. Larger samples are clipped to the maximum.

    Raises:
        UndecodableError: samples are missing, or are not numbers.
    """
    width, height, samples, most = header[:4]
    if len(data) < header.at + header.least_nbytes:
        raise UndecodableError(
            f"cannot decode its {len(data):,} bytes: the header declares {width} x {height} pixels; cut short"
        )
    found = _stored(data, header).reshape(height, width, samples)
    if samples not in (1, 3):
        found = found[..., : 1 if samples == 2 else 3]
    pixels = found.astype(np.uint8, copy=False) if most == 255 else _scale(most)[found]
    if data[:2] in _BITMAPS:
        pixels = 255 - pixels
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2) if mode == "RGB" else np.array(pixels[..., 0])
    return np.array(pixels, order="C") if mode == "RGB" else grey_of(pixels)


def _stored(data: bytes, header: NetpbmHeader) -> np.ndarray[Any, Any]:
    count = header.width * header.height * header.samples
    magic = data[:2]
    if magic == b"P4":
        rows = np.frombuffer(data, np.uint8, header.least_nbytes, header.at).reshape(header.height, -1)
        return np.unpackbits(rows, axis=1, count=header.width)
    if magic in _TEXTS:
        text = _COMMENT.sub(b"", data[header.at :])
        digits = list(text.translate(None, b" \t\n\v\f\r")) if magic == b"P1" else text.split()
        try:
            found = np.array(digits[:count], np.int64) - (ord("0") if magic == b"P1" else 0)
        except (ValueError, OverflowError) as error:
            raise UndecodableError("a sample is not a number") from error
        if len(found) < count or found.min() < 0 or (magic == b"P1" and found.max() > 1):
            raise UndecodableError(
                f"cannot decode its {len(data):,} bytes: {len(found):,} of {count:,} samples; cut short, or damaged"
            )
        return np.minimum(found, header.most)
    return np.frombuffer(data, np.uint8 if header.most < 256 else ">u2", count, header.at)


def _scale(most: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8: the result for each value that a stored sample can have."""
    stored = np.minimum(np.arange(256 if most < 256 else _MOST + 1), most)
    if most < 256:
        return np.rint(stored / most * 255).astype(np.uint8)
    return (np.rint(stored / most * _MOST).astype(np.uint16) >> 8).astype(np.uint8)
