"""Decodes a region of a JPEG with nvImageCodec, on the CPU, without computing the pixels below and beside it.

CUDA is not used: only the package's libjpeg-turbo extension is loaded, unless the program has imported the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from loaders.errors import MissingExtraError
from loaders.images.decode import opencv
from loaders.images.decode.region import Region

_NAME = "nvidia.nvimgcodec"
_PART = "libjpeg_turbo_ext"  # the file of the extension that is used
# Version 0.9 decodes wrong colours in some regions of 4:2:0 that are one pixel wide; narrow ones are left to OpenCV.
_LEAST_WIDTH = 16
# Read once, at import: no messages on stderr (failures are reported by our errors), and no other extensions.
_VERBOSITY, _PARTS = "PYNVIMGCODEC_VERBOSITY", "NVIMGCODEC_EXTENSIONS_PATH"
_import_lock = threading.Lock()


class _Decoder:
    """A decoder and its parameters; for one thread of one process."""

    def __init__(self, codec: Any) -> None:
        self.pid = os.getpid()
        self._codec = codec
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.CPU_ONLY)],
            options=":fancy_upsampling=1",  # libjpeg's default, and OpenCV's
        )
        self._params = {
            mode: codec.DecodeParams(apply_exif_orientation=False, color_spec=color)
            for mode, color in (("RGB", codec.ColorSpec.SRGB), ("GRAY", codec.ColorSpec.GRAY))
        }

    def decode(self, data: bytes, region: Region, mode: str) -> np.ndarray[Any, Any] | None:
        left, top, width, height = region
        box = self._codec.Region(top, left, top + height, left + width)
        stream = self._codec.CodeStream(data).get_sub_code_stream(region=box)
        image = self._decoder.decode(stream, params=self._params[mode])
        if image is None:
            return None
        pixels: np.ndarray[Any, Any] = np.asarray(image)  # shares the decoder's memory and keeps it alive
        return pixels if mode == "RGB" else pixels.reshape(height, width)


_mine = threading.local()


def decode_jpeg_region(data: bytes, region: Region, mode: str) -> np.ndarray[Any, Any] | None:
    """A region of a JPEG, both in the file's orientation; only where `agrees_with_opencv`.

    Returns:
        None if nvImageCodec cannot decode it; it gives no reason.
    """
    if region.width < _LEAST_WIDTH:
        return None
    # A decoder serves one thread at a time, and cannot be used after a fork.
    decoder = getattr(_mine, "decoder", None)
    if decoder is None or decoder.pid != os.getpid():
        decoder = _mine.decoder = _Decoder(_load())
    try:
        pixels: np.ndarray[Any, Any] | None = decoder.decode(data, region, mode)
    except RuntimeError:  # raised for some damaged files; the result is None for others
        return None
    return pixels


def require() -> None:
    """Check that nvImageCodec is installed.

    Raises:
        MissingExtraError: it is not, or does not run here.
    """
    _load()


@cache
def agrees_with_opencv() -> bool:
    """Whether it is installed and decodes to OpenCV's pixels: both use libjpeg-turbo, but builds can differ."""
    try:
        _load()
    except MissingExtraError:
        return False
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    picture = cv2.resize(noise, (67, 53), interpolation=cv2.INTER_CUBIC)
    region = Region(9, 11, 40, 30)
    for sampling in (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422):
        encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].tobytes()
        expected = opencv.decode_jpeg_region(encoded, region, "RGB", 1)
        pixels = decode_jpeg_region(encoded, region, "RGB")
        if pixels is None or not np.array_equal(pixels, expected):
            return False
    return True


def _load() -> Any:
    """The imported package.

    Raises:
        MissingExtraError: it is not installed, or does not run here.
    """
    with _import_lock:
        try:
            codec = _import_quietly()
            if hasattr(codec, "NVIMGCODEC_DEVICE_CPU_ONLY"):
                return codec
            why = f"version {codec.__version__} is older than 0.9"
        except (ImportError, OSError) as error:
            why = str(error)
    raise MissingExtraError(f"nvImageCodec is missing ({why}): pip install 'loaders[nvimagecodec]'.")


def _import_quietly() -> Any:
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    found = importlib.util.find_spec(_NAME)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no module {_NAME}")
    with tempfile.TemporaryDirectory() as folder:
        for part in Path(found.submodule_search_locations[0], "extensions").glob(f"{_PART}*"):
            Path(folder, part.name).symlink_to(part)
        ours = {name: value for name, value in ((_VERBOSITY, "0"), (_PARTS, folder)) if name not in os.environ}
        os.environ.update(ours)
        try:
            return importlib.import_module(_NAME)
        finally:
            for name in ours:
                del os.environ[name]
