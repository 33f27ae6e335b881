"""Image files of every kind, made from real photographs: name → bytes. Small, of odd sizes, each decodable."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import cv2
import numpy as np
from PIL import Image

from examples.demo.photos import read_photo

WIDTH, HEIGHT = 131, 97
SAMPLINGS = ("444", "422", "420", "440", "411")


@cache
def photo(width: int = WIDTH, height: int = HEIGHT, name: str = "cat") -> Any:
    """uint8 (height, width, 3), BGR; do not write to it."""
    whole = read_photo(name)
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


def encode(extension: str, picture: Any, *flags: int) -> bytes:
    done, encoded = cv2.imencode(extension, picture, list(flags))
    assert done
    return encoded.tobytes()


def jpeg(
    picture: Any, sampling: str = "420", *, progressive: bool = False, restart: int = 0, quality: int = 90
) -> bytes:
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    flags += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    return encode(".jpg", picture, *flags, *([cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor] if picture.ndim == 3 else []))


def exif(orientation: int, order: str = ">", *, kind: int = 3, before: bytes = b"", count: int = 1) -> bytes:
    """A TIFF block that holds an orientation; `before` is an entry of 12 bytes ahead of it."""
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    entries = before + struct.pack(order + "HHI", 0x0112, kind, count) + value
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(entries) // 12) + entries + bytes(4)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg_file: bytes, *segments: bytes) -> bytes:
    return jpeg_file[:2] + b"".join(segments) + jpeg_file[2:]


def with_exif(jpeg_file: bytes, block: bytes) -> bytes:
    return with_segments(jpeg_file, segment(0xE1, b"Exif\0\0" + block))


def with_png_chunk(png: bytes, kind: bytes, body: bytes, *, last: bool = False) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    at = len(png) - 12 if last else 33
    return png[:at] + chunk + png[at:]


def pillow(kind: str, picture: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def zoo() -> dict[str, bytes]:
    bgr = photo()
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    deep = bgr.astype(np.uint16) * 257 + 100
    bgra = np.dstack([bgr, np.linspace(0, 255, bgr[..., 0].size).reshape(grey.shape).astype(np.uint8)])
    whole = Image.fromarray(rgb)
    files = {}
    for sampling in SAMPLINGS:
        files[f"jpeg {sampling}"] = jpeg(bgr, sampling)
        files[f"jpeg {sampling} progressive"] = jpeg(bgr, sampling, progressive=True)
        files[f"jpeg {sampling} restarts"] = jpeg(bgr, sampling, restart=3)
    files |= {
        "jpeg grey": jpeg(grey),
        "jpeg grey progressive": jpeg(grey, progressive=True),
        "jpeg one pixel": jpeg(bgr[:1, :1]),
        "jpeg one row": jpeg(bgr[:1]),
        "jpeg one column": jpeg(bgr[:, :1]),
        "jpeg cmyk": pillow("JPEG", whole.convert("CMYK")),
        "jpeg stored as rgb": pillow("JPEG", whole, keep_rgb=True, subsampling=0),
        "jpeg with a tail": jpeg(bgr) + b"\xff\xd8 what cameras append",
        "jpeg with a thumbnail": with_exif(jpeg(bgr), exif(1) + jpeg(bgr[:16, :16])),
    }
    for orientation in range(1, 9):
        files[f"jpeg exif {orientation}"] = with_exif(jpeg(bgr), exif(orientation))
        files[f"jpeg exif {orientation} little-endian"] = with_exif(jpeg(bgr, "422"), exif(orientation, "<"))
    files |= {
        "png": encode(".png", bgr),
        "png grey": encode(".png", grey),
        "png 16 bit": encode(".png", deep),
        "png alpha": encode(".png", bgra),
        "png palette": pillow("PNG", whole.quantize(32)),
        "png palette with alpha": pillow("PNG", whole.quantize(32), transparency=3),
        "png one bit": pillow("PNG", whole.convert("1")),
        "png exif": with_png_chunk(encode(".png", bgr), b"eXIf", exif(6)),
        "png exif at the end": with_png_chunk(encode(".png", bgr), b"eXIf", exif(6), last=True),
        "webp": encode(".webp", bgr, cv2.IMWRITE_WEBP_QUALITY, 80),
        "webp lossless": encode(".webp", bgr, cv2.IMWRITE_WEBP_QUALITY, 101),
        "webp alpha": pillow("WEBP", Image.fromarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA)), quality=80),
        "webp alpha lossless": pillow("WEBP", Image.fromarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA)), lossless=True),
        "webp exif": pillow("WEBP", whole, exif=b"Exif\0\0" + exif(6)),
        "bmp": encode(".bmp", bgr),
        "bmp grey": encode(".bmp", grey),
        "bmp palette": pillow("BMP", whole.quantize(32)),
        "tiff": encode(".tiff", bgr),
        "tiff 16 bit": encode(".tiff", deep),
        "tiff plain": pillow("TIFF", whole),
        "tiff big-endian grey": pillow("TIFF", Image.fromarray(grey.astype(">u2") * 257)),
        "tiff turned": pillow("TIFF", whole, tiffinfo={274: 6}),
        "tiff upside down": pillow("TIFF", whole, tiffinfo={274: 3}),
        "ppm": encode(".ppm", bgr),
        "pgm 16 bit": encode(".pgm", deep[..., 0]),
        "jpeg 2000": encode(".jp2", bgr),
    }
    return files


# -- files that are no images, written to the path that a test gives


def make_missing(path):
    pass


def make_empty(path):
    path.write_bytes(b"")


def make_text(path):
    path.write_text("<html>404</html>")
