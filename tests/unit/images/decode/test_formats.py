import io
import pickle
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from support.format_zoo import ALPHA, DEEP, GREY, HEIGHT, RGB, RGBA, WIDTH, animated, known, netpbm, tiff
from support.photo_zoo import encode, exif, jpeg, photo, pillow, segment, with_segments
from test_decode_damaged import damage

from loaders import DecodeError, image_size, read_image
from loaders.images.decode.region import turn_upright


@pytest.mark.parametrize("name", known())
def test_a_picture_has_the_pixels_that_its_file_holds_whole_and_in_parts(name):
    file, picture = known()[name]
    if name in ("gif", "webp animated") and cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip("this OpenCV does not know the format")
    whole = picture if picture.ndim == 3 else np.dstack([picture] * 3)
    found = read_image(file)
    assert np.array_equal(found, whole)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    height, width = found.shape[:2]
    assert image_size(file) == (width, height)
    region = (3, 5, width - 8, height - 9)
    assert np.array_equal(read_image(file, region=region), whole[5:-4, 3:-5])
    assert read_image(file, region=region, scale=4).shape == (-(-(height - 4) // 4) - 1, -(-(width - 5) // 4), 3)
    grey = read_image(file, "GRAY")
    assert np.abs(grey.astype(int) - cv2.cvtColor(whole, cv2.COLOR_RGB2GRAY)).max() <= (1 if picture.ndim == 3 else 0)
    assert np.array_equal(read_image(file, "GRAY", region=region), grey[5:-4, 3:-5])


@pytest.mark.parametrize("most", [1, 15, 255, 1023, 65535])
def test_netpbm_is_as_pillow_has_it(most):
    for name in (f"P5 {most}", f"P6 {most}"):
        file = known()[name].file
        expected = np.asarray(Image.open(io.BytesIO(file))).astype(int)
        if expected.max() > 255:  # Pillow scales grey to 16 bits
            expected >>= 8
        found = read_image(file) if expected.ndim == 3 else read_image(file, "GRAY")
        assert np.abs(found - expected).max() <= (1 if most > 255 else 0)


def has_avif():
    try:
        return cv2.imencode(".avif", RGB)[0]
    except cv2.error:
        return False


@pytest.mark.skipif(not has_avif(), reason="this OpenCV has no AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_upright_as_its_own_properties_say(orientation):
    file = pillow("AVIF", photo(), quality=100, subsampling="4:4:4", exif=b"Exif\0\0" + exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    assert np.abs(upright.astype(int) - turn_upright(photo(), orientation)).max() < 30
    found = read_image(file)
    assert image_size(file) == found.shape[1::-1] == upright.shape[1::-1]
    assert np.abs(found.astype(int) - upright).max() < 5
    assert np.array_equal(read_image(file, region=(10, 20, 30, 40)), found[20:60, 10:40])


NO_PICTURE = {
    "float": (tiff(RGB.astype(np.float32) / 255, sample_format=3), "32-bit floating-point samples"),
    "double": (tiff(RGB.astype(np.float64) / 255, sample_format=3, order=">"), "64-bit floating-point samples"),
    "half": (tiff(RGB.astype(np.float16) / 255, sample_format=3), "16-bit floating-point samples"),
    "grey float": (tiff(GREY[..., None].astype(np.float32), sample_format=3, photometric=1), "floating-point samples"),
    "32 bit": (tiff(DEEP[..., :1].astype(np.uint32), photometric=1), "32-bit unsigned samples"),
    "signed": (tiff(DEEP[..., :1].astype(np.int16), photometric=1, sample_format=2), "16-bit signed samples"),
    "many bands": (tiff(np.dstack([RGBA, RGB]), photometric=1, extra=0), "7 bands"),
    "three bands": (tiff(RGB, photometric=1, extra=0, separate=True), "3 bands"),
    "two alphas": (tiff(np.dstack([RGBA, ALPHA]), extra=2), "5 samples per pixel"),
    "4 bit": (tiff(GREY[..., None] >> 4, photometric=1, bits=4), "a TIFF of 1 sample per pixel and 4 bits per sample"),
    "cut": (tiff(RGB)[:8] + tiff(RGB)[8 + RGB.nbytes :], "begin with|cut short"),
    "maxval": (b"P5 2 2 70000 " + bytes(16), "Netpbm header"),
    "pfm": (b"PF\n2 1\n-1.0\n" + np.zeros(6, "<f4").tobytes(), "floating-point samples"),
    "heif": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIF"),
}


@pytest.mark.parametrize("name", NO_PICTURE)
def test_what_has_no_picture_of_8_bits_is_refused_with_the_reason(name):
    file, why = NO_PICTURE[name]
    for read in (read_image, image_size) if name not in ("4 bit", "cut") else (read_image,):
        with pytest.raises(DecodeError, match=why) as caught:
            read(file)
        assert name == "cut" or "cut short" not in str(caught.value)


def test_a_tiff_whose_strips_are_missing_is_called_cut_short():
    file = tiff(RGB, order=">")
    at = file.index(struct.pack(">HHI", 0x111, 4, 1)) + 8
    with pytest.raises(DecodeError, match="a TIFF of 3 samples per pixel and 8 bits per sample: it is cut short"):
        read_image(file[:at] + struct.pack(">I", len(file)) + file[at + 4 :])


def with_iccp(file):
    body = b"iCCPbroken\0\0" + zlib.compress(b"no profile")
    return file[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + file[33:]


def test_a_png_with_a_chunk_that_readers_must_know_is_refused_and_others_do_no_harm(capfd):
    file = pillow("PNG", RGB)
    assert np.array_equal(read_image(with_iccp(file)), RGB)
    strange = with_iccp(file).replace(b"iCCP", b"CgBI")
    with pytest.raises(DecodeError, match=r"a critical chunk b'CgBI'"):
        read_image(strange)
    late = file[:8] + with_iccp(file)[33:-12] + file[8:]
    for read in (read_image, image_size):
        with pytest.raises(DecodeError, match="a damaged chunk"):
            read(late)
    assert capfd.readouterr().err == ""


# -- what a header promises

HUGE = 1 << 15


def promising(name):
    """A small file, whose header promises 2**30 pixels."""
    if name in ("jpeg 2000", "jpeg 2000 stream", "jpeg 2000 of fewer"):  # OpenJPEG takes more for each
        file = known()[name.removesuffix(" of fewer")].file[:247]
        at = file.index(b"\xff\x51") + 6
        size = struct.pack(">II", *([8000, 8000] if name == "jpeg 2000 of fewer" else [HUGE, HUGE]))
        return file[:at] + size + file[at + 8 : at + 16] + size + file[at + 24 :]
    if name == "jpeg 2000 of tiles":
        file = known()["jpeg 2000 stream"].file
        return file[:8] + struct.pack(">II8xII", 250, 250, 1, 1) + file[32:]
    if name == "png":
        file = pillow("PNG", RGB)
        head = b"IHDR" + struct.pack(">II", HUGE, HUGE) + file[24:29]
        return file[:12] + head + struct.pack(">I", zlib.crc32(head)) + file[33:]
    if name == "tiff":
        file = tiff(RGB)
        for tag, side in ((0x100, WIDTH), (0x101, HEIGHT)):
            old = struct.pack("<HHII", tag, 4, 1, side)
            file = file.replace(old, old[:8] + struct.pack("<I", HUGE))
        return file
    if name == "jpeg of arithmetic codes":
        file = jpeg(photo())
        at = file.index(b"\xff\xc0")
        return file[: at + 1] + b"\xc9" + file[at + 2 : at + 5] + b"\x7f\xff" * 2 + file[at + 9 :]
    if name == "jpeg with a damaged header":  # which OpenCV reads past
        file = jpeg(photo())
        at = file.index(b"\xff\xc0") + 5
        file = file[:at] + struct.pack(">HH", HUGE - 1, HUGE - 1) + file[at + 4 :]
        return with_segments(
            file, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"), segment(0xE1, b"Exif\0\0" + exif(6))
        )
    short, big = struct.pack("<HH", HUGE, HUGE), struct.pack("<II", HUGE, HUGE)
    canvas = (HUGE - 1).to_bytes(3, "little") * 2
    files = {
        "P6": netpbm("P6", RGB, 255).replace(b"37 24", b"32768 32768"),
        "P2": netpbm("P2", GREY, 255).replace(b"37 24", b"32768 32768"),
        "gif": known()["gif"].file[:6] + short + known()["gif"].file[10:],
        "bmp": encode(".bmp", RGB)[:18] + big + encode(".bmp", RGB)[26:],
        "webp": known()["webp animated"].file[:24] + canvas + known()["webp animated"].file[30:],
        "sun raster": known()["sun raster"].file[:4] + struct.pack(">II", HUGE, HUGE) + known()["sun raster"].file[12:],
        "radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 32768 +X 32768\n" + bytes(100),
    }
    return files[name]


PROMISING = (
    *("jpeg 2000", "jpeg 2000 stream", "jpeg 2000 of fewer", "jpeg 2000 of tiles", "png", "tiff"),
    *("jpeg with a damaged header", "jpeg of arithmetic codes"),
    *("P6", "P2", "gif", "bmp", "webp", "sun raster", "radiance"),
)
PEAK = """
import pickle, resource, sys
from loaders import DecodeError, image_size, read_image
read_image(sys.stdin.buffer.read(int(sys.argv[1])))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in pickle.load(sys.stdin.buffer):
    for read in (image_size, read_image):
        try:
            read(file)
        except DecodeError:
            pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", PROMISING)
def test_a_small_file_that_promises_many_pixels_is_refused(name, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(promising(name))
    for source in (promising(name), path):
        for read in (image_size, read_image):
            with pytest.raises(DecodeError, match=r"bytes.* (cannot hold|too few|cut short|a damaged chunk)"):
                read(source)


def test_no_room_is_made_for_what_a_small_file_promises():
    first = jpeg(photo())  # whose decoding loads what is loaded once
    given = first + pickle.dumps([promising(name) for name in PROMISING])
    done = subprocess.run([sys.executable, "-c", PEAK, str(len(first))], input=given, capture_output=True, check=True)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 32 << 20


def test_a_large_blank_picture_of_few_bytes_is_none_of_those():
    blank = np.zeros((4000, 4000), np.uint8)
    for file in (encode(".png", blank), pillow("WEBP", np.dstack([blank] * 3), lossless=True)):
        assert len(file) < blank.size / 500
        assert image_size(file) == (4000, 4000)
        assert not read_image(file, "GRAY").any()


# -- what goes wrong


class Opaque:
    def read(self):
        return b""


@pytest.mark.parametrize("source", [io.BytesIO(b"abc"), Opaque(), 5, None, ["photo.jpg"]])
def test_what_is_no_source_is_an_error_of_ours_and_a_type_error(source):
    for read in (read_image, image_size):
        for kind in (DecodeError, TypeError):
            with pytest.raises(
                kind, match=rf"^sample 3: a {type(source).__name__} is neither a path, a URL nor enc"
            ) as caught:
                read(source, index=3)
        assert caught.value.index == 3
        assert ("source.read()" in str(caught.value)) == hasattr(source, "read")


def test_a_protocol_that_nobody_knows_is_a_decode_error():
    pytest.importorskip("fsspec")
    for read in (read_image, image_size):
        with pytest.raises(DecodeError, match=r'^sample 3 \("foo://x"\): Protocol not known: foo'):
            read("foo://x", index=3)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_of_every_format_give_an_image_or_our_error_and_no_message(seed, capfd):
    rng = np.random.default_rng(seed)
    files = [file for file, _ in known().values()] + [with_iccp(pillow("PNG", RGB)), animated("GIF", RGB)]
    images = 0
    for number in range(1200):
        damaged = damage(files[number % len(files)], rng)
        try:
            found = read_image(damaged)
        except DecodeError:
            continue
        images += 1
        assert image_size(damaged) == found.shape[1::-1]
        assert found.dtype == np.uint8
        assert found.ndim == 3
    assert 200 < images < 1100
    assert capfd.readouterr().err == ""
