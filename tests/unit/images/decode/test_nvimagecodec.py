import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from support.photo_zoo import jpeg, photo, zoo

from loaders import read_image
from loaders.errors import MissingExtraError
from loaders.images.decode import nvimagecodec, opencv

REGION = (20, 30, 70, 50)
needs_nvimagecodec = pytest.mark.skipif(
    not nvimagecodec.agrees_with_opencv(), reason="nvImageCodec is not installed: pip install 'loaders[nvimagecodec]'"
)


@pytest.fixture
def forgotten():
    """What is known of the package is forgotten before and after."""
    nvimagecodec.agrees_with_opencv.cache_clear()
    yield
    nvimagecodec.agrees_with_opencv.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The regions that nvImageCodec decoded."""
    nvimagecodec.agrees_with_opencv()  # which decodes two regions, once a process
    made, decode = [], nvimagecodec.decode_jpeg_region

    def counted(data, region, mode):
        pixels = decode(data, region, mode)
        made.extend([region] if pixels is not None else [])
        return pixels

    monkeypatch.setattr(nvimagecodec, "decode_jpeg_region", counted)
    return made


def test_where_it_is_missing_opencv_decodes_and_asking_for_it_is_an_error(monkeypatch, forgotten):
    expected = read_image(zoo()["jpeg 420"], region=REGION, backend="opencv")
    nvimagecodec.agrees_with_opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "nvidia.nvimgcodec", raising=False)
    assert not nvimagecodec.agrees_with_opencv()
    assert np.array_equal(read_image(zoo()["jpeg 420"], region=REGION), expected)
    with pytest.raises(MissingExtraError, match=r"pip install 'loaders\[nvimagecodec\]'"):
        read_image(zoo()["jpeg 420"], region=REGION, backend="nvimagecodec")


def test_an_older_version_counts_as_missing(monkeypatch, forgotten):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", type("Codec", (), {"__version__": "0.8.0"}))
    assert not nvimagecodec.agrees_with_opencv()
    with pytest.raises(MissingExtraError, match=r"version 0\.8\.0 is older than 0\.9"):
        nvimagecodec.require()


@needs_nvimagecodec
@pytest.mark.parametrize("mode", ["RGB", "GRAY"])
@pytest.mark.parametrize("name", ["jpeg 444", "jpeg 420", "jpeg 411 restarts", "jpeg grey", "jpeg exif 6"])
def test_it_decodes_the_regions_of_common_jpegs(name, mode, calls):
    read_image(zoo()[name], mode, region=REGION)
    assert len(calls) == 1


@needs_nvimagecodec
@pytest.mark.parametrize("name", ["jpeg 420 progressive", "jpeg cmyk", "png", "webp", "tiff 16 bit"])
def test_it_is_left_alone_with_all_other_files(name, calls):
    read_image(zoo()[name], region=REGION)
    assert not calls


@needs_nvimagecodec
def test_whole_pictures_and_reduced_ones_are_opencvs_and_so_is_what_was_asked_of_it(calls):
    read_image(zoo()["jpeg 420"])
    read_image(zoo()["jpeg 420"], region=REGION, scale=2)
    read_image(zoo()["jpeg 420"], region=REGION, backend="opencv")
    assert not calls
    read_image(zoo()["jpeg 420"], region=REGION, backend="nvimagecodec")
    assert calls == [REGION]


@needs_nvimagecodec
def test_a_build_that_gives_other_pixels_is_not_used(monkeypatch, forgotten):
    decode = opencv.decode_jpeg_region
    monkeypatch.setattr(opencv, "decode_jpeg_region", lambda *arguments: decode(*arguments) ^ 1)
    assert not nvimagecodec.agrees_with_opencv()
    monkeypatch.undo()
    monkeypatch.setattr(nvimagecodec, "decode_jpeg_region", None)
    assert np.array_equal(read_image(zoo()["jpeg 420"], region=REGION), read_image(zoo()["jpeg 420"])[30:80, 20:90])


@needs_nvimagecodec
def test_the_pixels_outlive_the_thread_and_later_regions():
    kept = {}

    def read():
        kept["part"] = read_image(zoo()["jpeg 420"], region=REGION)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(30)
    expected = kept["part"].copy()
    for _ in range(20):
        read_image(zoo()["jpeg 444"], region=REGION)[:] = 0
    assert np.array_equal(kept["part"], expected)


def report_decoder(before, send):
    part = read_image(zoo()["jpeg 420"], region=REGION, backend="nvimagecodec")
    send.send((part, nvimagecodec._mine.decoder.pid == os.getpid(), nvimagecodec._mine.decoder is before))


@needs_nvimagecodec
def test_a_forked_process_makes_a_decoder_of_its_own():
    expected = read_image(zoo()["jpeg 420"], region=REGION, backend="nvimagecodec")
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=report_decoder, args=(nvimagecodec._mine.decoder, send))
    child.start()
    assert receive.poll(30)
    part, is_its_own, is_the_parents = receive.recv()
    child.join(30)
    assert child.exitcode == 0
    assert np.array_equal(part, expected)
    assert is_its_own
    assert not is_the_parents


QUIET = """
import os, sys
from loaders import read_image
from loaders.images.decode import nvimagecodec
assert "nvidia.nvimgcodec" not in sys.modules
before = dict(os.environ)
data = bytes.fromhex(sys.stdin.read())
read_image(data, region=(0, 0, 20, 9), backend="nvimagecodec")
assert "nvidia.nvimgcodec" in sys.modules and dict(os.environ) == before
scan = data.index(b"\\xff\\xda")
assert nvimagecodec.decode_jpeg_region(data[:scan] + b"\\xff\\xd9", nvimagecodec.Region(0, 0, 20, 9), "RGB") is None
assert nvimagecodec.decode_jpeg_region(b"no JPEG", nvimagecodec.Region(0, 0, 20, 9), "RGB") is None
assert "torch" not in sys.modules
"""


@needs_nvimagecodec
@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc's loader")
def test_it_says_nothing_on_stderr_touches_no_cuda_and_leaves_the_environment_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "NVIMGCODEC" not in name}
    environment |= {"LD_DEBUG": "libs", "LD_DEBUG_OUTPUT": str(tmp_path / "loader")}
    run = subprocess.run(
        [sys.executable, "-c", QUIET], input=jpeg(photo()).hex(), env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    # Every library that was looked for, also on a machine that has none of them.
    told = "".join(file.read_text() for file in tmp_path.glob("loader*"))
    libraries = set(re.findall(r"find library=(\w+)", told))
    assert "libnvimgcodec" in libraries
    assert not libraries & {"libcuda", "libnvjpeg", "libnvjpeg2k", "libnvtiff"}


@needs_nvimagecodec
def test_a_program_that_has_imported_it_keeps_what_it_has(forgotten):
    codec = importlib.import_module("nvidia.nvimgcodec")
    assert nvimagecodec._load() is codec
