"""read_indices: what a PNG stores for each pixel."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from loaders import DecodeError
from loaders.images.decode.indices import read_indices

STORED = np.random.default_rng(0).integers(0, 256, (13, 11), np.uint8)


def png(array, mode=None, bits=8, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array, "L").convert("L")
    if mode == "P":
        image.putpalette([(13 * n + 5) % 256 for n in range(3 << bits)])
    data = io.BytesIO()
    image.save(data, "PNG", **({"bits": bits} if mode == "P" else {}), **options)
    return data.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparency", [False, True])
def test_of_a_palette_the_indices_are_read_whatever_their_colours(bits, transparency):
    indices = STORED & np.uint8((1 << bits) - 1)
    data = png(indices, "P", bits, **({"transparency": 0} if transparency else {}))
    assert data[24:26] == bytes([bits, 3])
    read = read_indices(data)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, indices)


def test_of_grey_the_values_are_read_also_of_one_bit_and_of_sixteen():
    np.testing.assert_array_equal(read_indices(png(STORED)), STORED)
    np.testing.assert_array_equal(read_indices(png(STORED > 100)), STORED > 100)
    wide = STORED.astype(np.uint16) * 257
    read = read_indices(cv2.imencode(".png", wide)[1].tobytes())
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, wide)


def test_an_orientation_turns_no_mask():
    image = Image.fromarray(STORED)
    exif = image.getexif()
    exif[0x112] = 6
    data = io.BytesIO()
    image.save(data, "PNG", exif=exif)
    np.testing.assert_array_equal(read_indices(data.getvalue()), STORED)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_and_alpha_are_refused(channels):
    array = np.zeros((5, 4, channels), np.uint8)
    data = png(array) if channels != 2 else png_grey_alpha()
    with pytest.raises(DecodeError, match="one number per pixel"):
        read_indices(data)


def png_grey_alpha():
    data = io.BytesIO()
    Image.new("LA", (4, 5)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("data", [b"", b"text", cv2.imencode(".jpg", STORED)[1].tobytes()])
def test_other_files_are_refused(data):
    with pytest.raises(DecodeError):
        read_indices(data, index=3)


def test_every_cut_and_most_changes_of_a_byte_are_an_error_and_never_other_pixels():
    data = png(STORED & np.uint8(15), "P", 4)
    for end in range(len(data) - 1):
        with pytest.raises(DecodeError):
            read_indices(data[:end])
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            read = read_indices(damaged)
        except DecodeError:
            continue
        np.testing.assert_array_equal(read, STORED & np.uint8(15))  # a byte that no pixel depends on
