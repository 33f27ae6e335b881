import itertools
import resource
import struct
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
from support.photo_zoo import encode, jpeg, photo, zoo

from loaders import DecodeError, image_size, read_image

HEADER_NBYTES = 700  # half of the damage goes where it does most


def damage(whole, rng):
    """One to three changes: bits, bytes, cuts, insertions, swapped and copied numbers; now and then the end is lost."""
    damaged = bytearray(whole)
    reach = min(len(whole), HEADER_NBYTES) if rng.random() < 0.5 else len(whole)
    for _ in range(rng.integers(1, 4)):
        at, other, nbytes = (int(number) for number in rng.integers(0, (reach, reach, 20)))
        at = min(at, len(damaged) - 1)
        match rng.integers(6):
            case 0:
                damaged[at] ^= 1 << rng.integers(8)
            case 1:
                damaged[at] = rng.integers(256)
            case 2 if len(damaged) > 30:
                del damaged[at : at + nbytes]
            case 3:
                damaged[at:at] = rng.bytes(nbytes)
            case 4:
                damaged[at : at + 2] = damaged[at : at + 2][::-1]
            case 5:
                damaged[at : at + 4] = damaged[other : other + 4]
    if rng.random() < 0.1:
        del damaged[int(rng.integers(1, len(damaged))) :]
    return bytes(damaged)


def outcome(read, *arguments, **options):
    try:
        return read(*arguments, **options)
    except DecodeError:
        return None


@pytest.mark.parametrize("seed", range(6))
def test_thousands_of_damaged_files_give_an_image_or_our_error(seed, capfd):
    rng = np.random.default_rng(seed)
    names, images, refused = sorted(zoo()), 0, 0
    for number in range(1000):
        name = names[number % len(names)]
        damaged = damage(zoo()[name], rng)
        size, image = outcome(image_size, damaged), outcome(read_image, damaged)
        if image is None:
            refused += 1
            if size is None or size[0] * size[1] > 1 << 22:  # nothing that four threads would wait for
                continue
            region = (size[0] // 3, size[1] // 3, size[0] - size[0] // 3, size[1] - size[1] // 3)
            outcome(read_image, damaged, region=region)
            continue
        images += 1
        assert size == image.shape[1::-1]
        left, top = int(rng.integers(size[0])), int(rng.integers(size[1]))
        region = (left, top, int(rng.integers(1, size[0] - left + 1)), int(rng.integers(1, size[1] - top + 1)))
        expected = image[top : top + region[3], left : left + region[2]]
        for backend in ("opencv", None):
            assert np.array_equal(outcome(read_image, damaged, region=region, backend=backend), expected), number
        assert outcome(read_image, damaged, region=region, scale=8) is not None
    assert min(images, refused) > 250  # neither is too rare to tell anything


@pytest.mark.parametrize("name", ["jpeg 420", "jpeg 444 progressive", "jpeg exif 6", "jpeg grey"])
@pytest.mark.parametrize("kept", [0.3, 0.9, -1])
def test_a_cut_jpeg_is_refused_wherever_the_region_lies(name, kept):
    whole = zoo()[name]
    damaged = whole[: int(len(whole) * kept) if kept > 0 else kept]
    for options in ({"region": (0, 0, 8, 8)}, {"scale": 8}, {"region": (0, 0, 8, 8), "scale": 2}):
        with pytest.raises(DecodeError, match="the JPEG is cut short"):
            read_image(damaged, **options)


def with_jpeg_size(encoded, width, height):
    at = encoded.index(b"\xff\xc0") + 5
    return encoded[:at] + struct.pack(">HH", height, width) + encoded[at + 4 :]


def test_a_jpeg_that_promises_more_pixels_than_its_bytes_can_hold_is_refused():
    encoded = jpeg(photo())
    for options in ({}, {"region": (0, 0, 8, 8)}, {"scale": 8}):
        with pytest.raises(DecodeError, match=r"cannot hold the 30000 x 30000 pixels"):
            read_image(with_jpeg_size(encoded, 30_000, 30_000), **options)


def test_a_jpeg_of_few_bytes_and_many_pixels_is_none_of_those():
    blank = np.full((4000, 4000), 128, np.uint8)
    encoded = encode(".jpg", blank, cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1)
    assert len(encoded) < blank.size / 250  # two bits per block of 64; the check demands one
    assert np.array_equal(read_image(encoded, "GRAY"), blank)


def test_a_png_whose_chunk_promises_gigabytes_takes_neither_time_nor_memory():
    encoded = encode(".png", photo())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for kind, nbytes in itertools.product((b"IDAT", b"IEND"), (200_000, 1 << 30, 0xFFFFFFFF)):
        at = encoded.index(kind) - 4
        with pytest.raises(DecodeError, match="no end, or a damaged chunk"):
            read_image(encoded[:at] + struct.pack(">I", nbytes) + encoded[at + 4 :])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 100 << 20
    assert time.monotonic() - start < 0.5


def test_a_header_that_promises_another_size_than_there_is_gives_our_error():
    encoded = encode(".png", photo())
    head = struct.pack(">II", 4000, 3000) + encoded[24:29]
    larger = encoded[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + encoded[33:]
    assert image_size(larger) == (4000, 3000)
    with pytest.raises(DecodeError):
        read_image(larger, region=(3000, 2000, 500, 500))
