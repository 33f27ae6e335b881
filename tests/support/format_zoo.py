"""Image files that OpenCV does not decode as `read_image` promises, made from known pixels."""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from support.photo_zoo import encode, exif, pillow

from loaders.images.decode.region import turn_upright

HEIGHT, WIDTH = 24, 37
RNG = np.random.default_rng(12)
DEEP: Any = RNG.integers(0, 1 << 16, (HEIGHT, WIDTH, 4), np.uint16)
RGB = np.ascontiguousarray((DEEP >> 8).astype(np.uint8)[..., :3])
GREY = np.ascontiguousarray(RGB[..., 0])
ALPHA = (DEEP >> 8).astype(np.uint8)[..., 3:]
RGBA = np.dstack([RGB, ALPHA])


class Known(NamedTuple):
    """A file, and the picture in it: uint8 (H, W, 3), or (H, W) for grey."""

    file: bytes
    picture: Any


def tiff(
    samples: Any,
    *,
    order: str = "<",
    bits: int | None = None,
    photometric: int = 2,
    extra: int | None = None,
    separate: bool = False,
    sample_format: int = 1,
    orientation: int = 1,
    big: bool = False,
) -> bytes:
    """An uncompressed TIFF of samples (H, W, bands), in one strip, or in one strip per plane."""
    height, width, bands = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    planes = [samples[..., band] for band in range(bands)] if separate else [samples]
    if bits in (8, 16, 32, 64):
        strips = [plane.astype(samples.dtype.newbyteorder(order)).tobytes() for plane in planes]
    else:
        strips = [_packed(plane, bits) for plane in planes]
    head = 16 if big else 8
    starts = [head + sum(map(len, strips[:number])) for number in range(len(strips))]
    tags: list[tuple[int, str, list[int]]] = [
        (0x100, "I", [width]),
        (0x101, "I", [height]),
        (0x102, "H", [bits] * bands),
        (0x103, "H", [1]),
        (0x106, "H", [photometric]),
        (0x111, "I", starts),
        (0x112, "H", [orientation]),
        (0x115, "H", [bands]),
        (0x116, "I", [height]),
        (0x117, "I", list(map(len, strips))),
        (0x11C, "H", [2 if separate else 1]),
        *([(0x152, "H", [extra])] if extra is not None else []),
        (0x153, "H", [sample_format] * bands),
    ]
    at = head + sum(map(len, strips))
    pointer, count, room = ("Q", "Q", 8) if big else ("I", "H", 4)
    beyond = at + struct.calcsize("<" + count) + len(tags) * (12 if room == 4 else 20) + room
    directory, values = struct.pack(order + count, len(tags)), b""
    for tag, kind, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        directory += struct.pack(order + "HH" + pointer, tag, {"H": 3, "I": 4}[kind], len(numbers))
        if len(packed) > room:
            directory += struct.pack(order + pointer, beyond + len(values))
            values += packed
        else:
            directory += packed.ljust(room, b"\0")
    start = struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at)
    return (b"II" if order == "<" else b"MM") + start + b"".join(strips) + directory + bytes(room) + values


def _packed(plane: Any, bits: int) -> bytes:
    rows = plane.reshape(len(plane), -1)
    digits = rows[..., None] >> np.arange(bits - 1, -1, -1, dtype=rows.dtype) & 1
    return np.packbits(digits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def netpbm(magic: str, samples: Any, most: int) -> bytes:
    head = f"{magic} # how many\n{samples.shape[1]} {samples.shape[0]}\n{most}\n".encode()
    if magic in ("P5", "P6"):
        return head + samples.astype(">u2" if most > 255 else np.uint8).tobytes()
    rows = samples.reshape(len(samples), -1)
    return head + b"".join(" ".join(map(str, row)).encode() + b"\n" for row in rows.tolist())


def pam(samples: Any, most: int, kind: str) -> bytes:
    height, width, depth = samples.shape
    head = f"P7\n# how many\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL {most}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + samples.astype(">u2" if most > 255 else np.uint8).tobytes()


def scaled(samples: Any, most: int) -> Any:
    """Samples up to `most` as 8 bits: rounded to 255 levels, or the high byte of 16 bits."""
    if most < 256:
        return np.rint(samples / most * 255).astype(np.uint8)
    return (np.rint(samples / most * 65535).astype(int) >> 8).astype(np.uint8)


def webp(block: bytes) -> bytes:
    """A WebP file with `block` as its EXIF chunk."""
    picture = pillow("WEBP", RGB, lossless=True)[12:]
    size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<II", 10, 8) + size + picture
    chunks += b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) & 1)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def animated(kind: str, first: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    others = [Image.fromarray(255 - first), Image.fromarray(first)]
    Image.fromarray(first).save(file, kind, save_all=True, append_images=others, **options)
    return file.getvalue()


def gif() -> Known:
    """A GIF with a transparent colour, which is used."""
    image = Image.fromarray(RGB).quantize(16)
    return Known(pillow("GIF", image, transparency=5), np.asarray(image.convert("RGB")))


@cache
def known() -> dict[str, Known]:
    """By name. `read_image` must return the picture bit for bit."""
    files: dict[str, Known] = {}
    for order in "<>":
        for separate in (False, True):
            for big in (False, True):
                layout = f"{order}{' planes' * separate}{' big' * big}"
                more = {"order": order, "separate": separate, "big": big}
                files |= {
                    f"tiff rgb 8 {layout}": Known(tiff(RGB, **more), RGB),
                    f"tiff rgb 16 {layout}": Known(tiff(DEEP[..., :3], **more), RGB),
                    f"tiff grey 16 {layout}": Known(tiff(DEEP[..., :1], photometric=1, **more), GREY),
                    f"tiff inverse 16 {layout}": Known(tiff(~DEEP[..., :1], photometric=0, **more), GREY),
                }
                for extra in (0, 1, 2):
                    files[f"tiff rgba 8 {extra} {layout}"] = Known(tiff(RGBA, extra=extra, **more), RGB)
                    files[f"tiff rgba 16 {extra} {layout}"] = Known(tiff(DEEP, extra=extra, **more), RGB)
        stray = tiff(RGBA, order=order, extra=2)
        at = stray.index(struct.pack(order + "HHI", 0x153, 3, 4))
        stray = stray[:at] + struct.pack(order + "HHII", 0xC000, 3, 99, 1 << 30) + stray[at + 12 :]
        files[f"tiff rgba with a stray tag {order}"] = Known(stray, RGB)
        for bits in (10, 12, 14):
            few = DEEP[..., :3] >> 16 - bits
            files[f"tiff rgb {bits} {order}"] = Known(tiff(few, order=order, bits=bits), RGB)
            grey = tiff(few[..., :1], order=order, bits=bits, photometric=1)
            files[f"tiff grey {bits} {order}"] = Known(grey, GREY)
    for most in (1, 2, 6, 15, 100, 254, 255, 256, 1000, 1023, 4095, 65535):
        samples = RNG.integers(0, most + 1, (HEIGHT, WIDTH, 3))
        samples.flat[:2] = 0, most
        picture = scaled(samples, most)
        for magic in ("P3", "P6"):
            files[f"{magic} {most}"] = Known(netpbm(magic, samples, most), picture)
        for magic in ("P2", "P5"):
            files[f"{magic} {most}"] = Known(netpbm(magic, samples[..., 0], most), picture[..., 0])
        with_alpha = np.dstack([samples, samples[..., :1]])
        files[f"P7 rgb {most}"] = Known(pam(samples, most, "RGB"), picture)
        files[f"P7 rgba {most}"] = Known(pam(with_alpha, most, "RGB_ALPHA"), picture)
        files[f"P7 grey and alpha {most}"] = Known(pam(samples[..., :2], most, "GRAYSCALE_ALPHA"), picture[..., 0])
    dots = GREY > 127
    size = f"{WIDTH} {HEIGHT}\n".encode()
    files["P4"] = Known(b"P4\n" + size + np.packbits(~dots, axis=1).tobytes(), dots * np.uint8(255))
    text = b"\n".join(bytes(row) for row in np.where(dots, ord("0"), ord("1")).astype(np.uint8))
    files["P1"] = Known(b"P1\n" + size + text, dots * np.uint8(255))
    for orientation in range(1, 9):
        upright = turn_upright(RGB, orientation)
        for order in "<>":
            block = exif(orientation, order)
            files[f"webp {orientation}{order}"] = Known(webp(block), upright)
            files[f"webp with a name {orientation}{order}"] = Known(webp(b"Exif\0\0" + block), upright)
            files[f"png {orientation}{order}"] = Known(pillow("PNG", RGB, exif=block), upright)
            turned = tiff(RGB, order=order, orientation=orientation)
            files[f"tiff {orientation}{order}"] = Known(turned, upright)
            turned = tiff(DEEP, order=order, orientation=orientation, extra=2, separate=True)
            files[f"tiff rgba 16 {orientation}{order}"] = Known(turned, upright)
    files |= {
        "apng": Known(animated("PNG", RGB), RGB),
        "apng with a hidden picture": Known(animated("PNG", RGB, default_image=True), RGB),
        "apng with a hidden picture and alpha": Known(animated("PNG", RGBA, default_image=True), RGB),
        "png rgba 16": Known(encode(".png", DEEP[..., [2, 1, 0, 3]]), RGB),
        "webp animated": Known(animated("WEBP", RGB, lossless=True), RGB),
        "gif": gif(),
        "bmp alpha": Known(encode(".bmp", cv2.cvtColor(RGBA, cv2.COLOR_RGBA2BGRA)), RGB),
        "jpeg 2000": Known(pillow("JPEG2000", RGB), RGB),
        "jpeg 2000 alpha": Known(pillow("JPEG2000", RGBA), RGB),
        "jpeg 2000 stream": Known(pillow("JPEG2000", RGB, no_jp2=True), RGB),
        "jpeg 2000 16 bit": Known(pillow("JPEG2000", Image.fromarray(DEEP[..., 0].copy())), GREY),
        "sun raster": Known(encode(".ras", RGB[..., ::-1]), RGB),
    }
    return files
