import base64
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from support.photo_zoo import make_empty, make_missing, make_text

from loaders import DecodeError, read_image

RED_TOP_GREEN_BOTTOM = np.zeros((24, 32, 3), np.uint8)
RED_TOP_GREEN_BOTTOM[:12, :, 0] = 255
RED_TOP_GREEN_BOTTOM[12:, :, 1] = 255


def encode(extension, rgb, *flags):
    pixels = rgb[..., ::-1] if rgb.ndim == 3 and rgb.shape[2] == 3 else rgb
    done, encoded = cv2.imencode(extension, pixels, list(flags))
    assert done
    return encoded.tobytes()


def png(width, height, bit_depth, colour_type, rows, *chunks):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")


def with_exif(jpeg, orientation, thumbnail=b""):
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">H", 1) + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)
    body = b"Exif\0\0" + tiff + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def noise(height=120, width=160):
    coarse = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height))


@pytest.mark.parametrize("extension", [".png", ".bmp", ".tiff", ".ppm"])
def test_lossless_formats_come_back_as_rgb_bit_for_bit(extension, tmp_path):
    path = tmp_path / f"photo{extension}"
    path.write_bytes(encode(extension, noise()))
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.array_equal(image, noise())


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_encoded_bytes_are_decoded_as_the_file_is(kind):
    assert np.array_equal(read_image(kind(encode(".png", noise()))), noise())


def test_mode_gray_gives_one_channel_and_an_unknown_mode_is_named():
    assert read_image(encode(".png", noise()), "GRAY").shape == (120, 160)
    with pytest.raises(ValueError, match=r"'BGR' is unknown.*\"RGB\""):
        read_image(encode(".png", noise()), "BGR")


def test_exif_orientation_is_applied_in_all_eight_cases():
    jpeg = encode(".jpg", RED_TOP_GREEN_BOTTOM, cv2.IMWRITE_JPEG_QUALITY, 100)
    # Where the red half must lie; EXIF 2.3, tag 274.
    red = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    for orientation, side in red.items():
        image = read_image(with_exif(jpeg, orientation)).astype(int)
        assert image.shape == ((24, 32, 3) if orientation <= 4 else (32, 24, 3))
        half = {"top": image[:8], "bottom": image[-8:], "left": image[:, :8], "right": image[:, -8:]}[side]
        assert (half[..., 0] > 200).all(), orientation
        assert (half[..., 1] < 60).all(), orientation


def test_grey_images_have_three_equal_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = read_image(encode(".png", grey))
    assert np.array_equal(image, np.dstack([grey] * 3))


@pytest.mark.parametrize("extension", [".png", ".tiff", ".pgm"])
def test_of_16_bit_samples_the_high_byte_is_kept(extension):
    deep = np.array([[0, 1, 255, 256, 257, 511, 512, 0x7FFF, 0x8080, 0xFF00, 0xFFFF]] * 4, np.uint16)
    assert np.array_equal(read_image(encode(extension, deep))[..., 0], deep >> 8)


def test_alpha_is_dropped_and_the_colours_below_it_stay():
    rgba = np.dstack([noise(), np.zeros((120, 160), np.uint8)])
    encoded = cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    assert np.array_equal(read_image(encoded), noise())


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_images_become_their_colours(transparent):
    chunks = [(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))] + ([(b"tRNS", b"\0\xff")] if transparent else [])
    image = read_image(png(2, 2, 8, 3, [(0, 1), (1, 0)], *chunks))
    first, second = [10, 20, 30], [200, 100, 50]
    assert image.tolist() == [[first, second], [second, first]]


def test_one_bit_images_are_black_and_white():
    assert read_image(png(8, 1, 1, 0, [(0b10100000,)]))[0, :, 0].tolist() == [255, 0, 255, 0, 0, 0, 0, 0]


CMYK_RED = base64.b64decode(
    """
    /9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCxAWEBETFBUVFQwPFxgWFB
    gSFBUU/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABQAAQAAAAAAAAAAAAAAAAAAAAn/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/9oADgRDAE0AWQBL
    AAA/AFTFUKoqb//Z
    """
)


def test_cmyk_jpegs_are_converted():
    image = read_image(CMYK_RED).astype(int)
    assert image.shape == (8, 8, 3)
    assert (image[..., 0] > 200).all()
    assert (image[..., 1:] < 60).all()


@pytest.mark.parametrize("flags", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)], ids=["baseline", "progressive"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, -2, -1])
def test_jpegs_that_are_cut_short_are_refused_wherever_the_cut_is(flags, kept):
    jpeg = encode(".jpg", noise(), *flags)
    thumbnail = encode(".jpg", noise(16, 16))
    for whole in (jpeg, with_exif(jpeg, 1, thumbnail)):  # the thumbnail has an end-of-image marker of its own
        part = whole[: int(len(whole) * kept) if kept > 0 else kept]
        with pytest.raises(DecodeError, match=r"cut short.*\n  Replace the file"):
            read_image(part)


def test_what_follows_the_end_of_a_jpeg_does_no_harm():
    jpeg = with_exif(encode(".jpg", noise(), cv2.IMWRITE_JPEG_RST_INTERVAL, 2), 1, encode(".jpg", noise(16, 16)))
    expected = read_image(jpeg)
    for tail in (b"\0" * 100, b"\n", b"\xff\xda\0\x08moving picture"):
        assert np.array_equal(read_image(jpeg + tail), expected)


def test_a_cut_jpeg_is_seen_even_where_opencv_fills_in_grey(monkeypatch):
    grey = np.full((120, 160, 3), 128, np.uint8)
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: grey.copy())  # OpenCV 4.9 on a baseline JPEG
    with pytest.raises(DecodeError, match="cut short"):
        read_image(encode(".jpg", noise())[:-200])


@pytest.mark.parametrize("extension", [".png", ".bmp", ".webp", ".tiff", ".ppm"])
def test_other_formats_that_are_cut_short_are_refused(extension, capfd):
    whole = encode(extension, noise())
    for part in (whole[:-1], whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(DecodeError, match=r"cannot decode its .* bytes"):
            read_image(part)


def make_directory(path):
    path.mkdir()


def make_broken_link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_missing, "No such file"),
        (make_empty, "the file is empty"),
        (make_text, r"begin with b'<html>40'"),
        (make_directory, "Is a directory"),
        (make_broken_link, "No such file"),
    ],
)
def test_unreadable_files_are_named_with_the_reason_and_the_remedy(make, why, tmp_path):
    path = tmp_path / "photo.jpg"
    make(path)
    with pytest.raises(DecodeError, match=why) as caught:
        read_image(path)
    assert str(caught.value).startswith(f'image "{path}": ')
    assert "Replace the file, or leave it out" in str(caught.value)
    assert caught.value.source == str(path)
    assert caught.value.__cause__ is not None
    with pytest.raises(DecodeError, match=rf'^sample 7 \("{path}"\): ') as caught:
        read_image(path, index=7)
    assert caught.value.index == 7


def test_names_that_are_no_text_are_read_and_can_be_printed(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x90\x88.png")
    with open(path, "wb") as file:
        file.write(encode(".png", noise()))
    assert np.array_equal(read_image(path), noise())
    os.truncate(path, 0)
    with pytest.raises(DecodeError) as caught:
        read_image(path)
    str(caught.value).encode("utf-8")
    assert "caf\\xe9 🐈.png" in str(caught.value)


def test_numpy_only_modules_do_not_import_torch_or_albumentations():
    code = (
        "import sys, loaders.images.decode, loaders.datasets, loaders.images.albumentations\n"
        "assert not {'torch', 'albumentations'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
