"""An open image file: its size, and its picture or regions of it, for which only the necessary bytes are read."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import cv2
import numpy as np

from loaders.errors import DecodeError, describe_sample
from loaders.images.decode import nvimagecodec, opencv
from loaders.images.decode.files import MarkedParts, Parts, Source, Stored, open_parts
from loaders.images.decode.header import Header, read_header
from loaders.images.decode.jpeg import SIGNATURE, jpeg_has_end, least_nbytes_of
from loaders.images.decode.opencv import UndecodableError
from loaders.images.decode.region import Region, around, shrink, turn_upright
from loaders.images.decode.restart import Restarts, Window, find_restarts
from loaders.images.decode.restart_index import known_restarts, remember_restarts
from loaders.images.decode.whole import decode_indices, decode_whole
from loaders.system.opencv_threads import quiet_opencv
from loaders.timing.stages import DECODE, READ, is_looked_at

Backend = Literal["opencv", "nvimagecodec", "restarts"]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels

# Share of a photo's segments: in a window with more of them, splicing costs more than leaving out the rest saves.
_MOST = 0.9
# Share of a photo's pixels: for a region with more, nvImageCodec takes longer than OpenCV for the whole photo.
_MUCH = 2 / 3
_HEAD_NBYTES = 16 * 1024  # of a file, to search for its size; in most it comes far earlier


class SourceTypeError(DecodeError, TypeError):
    """The source is neither a path, a URL nor bytes."""


class EncodedImage:
    """An open image file, made by `open_image`; for use by one thread.

    Args:
        parts: the bytes of the file.
        index: the number of the sample, for messages.
        backend: the decoder for regions of JPEGs: see `read_image`.
    """

    def __init__(self, parts: Parts, index: int | None = None, backend: Backend | None = None) -> None:
        self._parts = parts
        self.index = index
        self._backend = backend
        self._bytes = parts.read() if parts.path is None else None
        self._header: Header | None = None
        self._is_checked = False
        self._whole: dict[str, np.ndarray[Any, Any]] = {}
        self._restarts: Restarts | None = None
        self._has_looked = backend not in (None, "restarts")
        if not self._has_looked and parts.path is not None:
            self._restarts = known_restarts(parts.path, parts.nbytes, parts.mtime_ns)
        self._is_confirmed = False  # whether the file's own header matches what an index says

    @property
    def name(self) -> str | None:
        """The path, printable; None for bytes."""
        return None if self._parts.path is None else printable(self._parts.path)

    @property
    def subject(self) -> str:
        """The name of the image in messages."""
        return _subject(self.index, self.name, self.nbytes)

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return self._parts.nbytes

    @property
    def is_jpeg(self) -> bool:
        """Whether the file is a JPEG, by an index or its signature."""
        return self._restarts is not None or self._data.startswith(SIGNATURE)

    @property
    def restarts(self) -> Restarts | None:
        """Where the segments of a JPEG with restart markers are, if they can be decoded separately."""
        if not self._has_looked and self._restarts is None:
            self._has_looked = True
            data, header = self._data, self._checked_header()
            if header is not None and header.jpeg is not None and header.jpeg.restart_interval:
                self._restarts, self._is_confirmed = find_restarts(data, header.jpeg), True
                if self._restarts is not None and self._parts.path is not None:
                    remember_restarts(self._parts.path, self.nbytes, self._parts.mtime_ns, self._restarts)
        return self._restarts

    def size(self) -> tuple[int, int]:
        """(width, height) of the picture that `read` returns at full scale.

        Raises:
            UndecodableError, cv2.error: the header does not determine it, and the file cannot be decoded.
        """
        if self._restarts is not None and self._confirm():
            return self._restarts.size
        header = None
        if self._bytes is None:
            head = bytes(self._parts.read_parts([0], [_HEAD_NBYTES]))
            header = read_header(head, is_whole=len(head) < _HEAD_NBYTES)
            _refuse_unfit(header, self.nbytes)
        header = header or self._checked_header()
        if header is not None:
            return header.width, header.height
        height, width = self.picture("GRAY").shape
        return width, height

    def read(self, mode: str = "RGB", region: Box | None = None, scale: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Decode the picture or a region of it, as documented for `read_image`.

        Raises:
            UndecodableError, cv2.error, OSError: it is damaged, or not an image that OpenCV can decode.
            ValueError: the region is not inside the picture.
        """
        if region is None and scale == 1:
            return decode_whole(self._data, self._checked_header(), mode)
        restarts = self.restarts
        if restarts is not None and region is not None and not Region(*region).is_inside(*restarts.size):
            self._confirm()  # the file may have changed, and the region be inside it now
            restarts = self.restarts
        if restarts is not None:
            stored = _inside(region, *restarts.size).stored(*restarts.size, restarts.orientation)
            window = restarts.window(stored, scale)
            if restarts.share(window) < _MOST:
                part = self._read_window(restarts, window, stored, mode, scale)
                if part is not None:
                    return turn_upright(part, restarts.orientation)
                if not self._is_confirmed:
                    return self.read(mode, region, scale)
                self._restarts, self._has_looked = None, True  # the file has changed, or is damaged
        header = self._checked_header()
        if header is None or header.jpeg is None:
            return _cut(self.picture(mode), header, region, scale)
        wanted = _inside(region, header.width, header.height)
        stored = wanted.stored(header.width, header.height, header.jpeg.orientation)
        part = None
        is_little = wanted.width * wanted.height < _MUCH * header.width * header.height
        if scale == 1 and header.jpeg.is_usual and (is_little or self._backend) and self._decodes_regions():
            part = nvimagecodec.decode_jpeg_region(self._data, stored, mode)
        if part is None:
            part = opencv.decode_jpeg_region(self._data, stored, mode, scale)
        return turn_upright(part, header.jpeg.orientation)

    def read_regions(self, regions: Sequence[Box], scale: int = 1) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Decode once, and cut out several regions: each has the pixels that `read` gives for it, bit for bit.

        Returns:
            uint8 (H, W, 3) RGB each; they share memory, so do not modify them.

        Raises:
            as `read`.
        """
        width, height = self.size()
        union, wanted = around(regions), [_inside(region, width, height) for region in regions]
        together = self.read("RGB", union, scale)
        # Blocks of a reduced scale are counted in the file's orientation.
        header = None if self._restarts is not None else self._checked_header()
        orientation = 1
        if self._restarts is not None:
            orientation = self._restarts.orientation
        elif header is not None and header.jpeg is not None:
            orientation = header.jpeg.orientation
        whole, *parts = (each.stored(width, height, orientation).reduced(scale) for each in (union, *wanted))
        inner = (part._replace(left=part.left - whole.left, top=part.top - whole.top) for part in parts)
        return [part.upright(whole.width, whole.height, orientation).of(together) for part in inner]

    def picture(self, mode: str = "RGB") -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The whole picture, decoded once and kept; do not modify it.

        Raises:
            UndecodableError, cv2.error, OSError: it is damaged, or not an image that OpenCV can decode.
        """
        if mode not in self._whole:
            self._whole[mode] = self.read(mode)
        return self._whole[mode]

    def indices(self) -> np.ndarray[Any, Any]:
        """What a PNG stores for each pixel, as documented for `read_indices`.

        Raises:
            UndecodableError, cv2.error, OSError: it is damaged, no PNG, or has several numbers per pixel.
        """
        self._checked_header()
        return decode_indices(self._data)

    def reads_all(self) -> bool:
        """Whether a region costs as much as the whole picture."""
        return self.restarts is None and not (self.is_jpeg and self._decodes_regions())

    def _decodes_regions(self) -> bool:
        return self._backend in (None, "nvimagecodec") and nvimagecodec.agrees_with_opencv()

    def _read_window(
        self, restarts: Restarts, window: Window, stored: Region, mode: str, scale: int
    ) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """A region as stored, decoded from a window that contains it.

        None if the segments do not match the index, or are damaged.
        """
        starts, ends = restarts.ranges(window)
        head_nbytes = 0 if self._is_confirmed else restarts.scan_at
        if head_nbytes:  # in the same request, if the file is remote
            starts, ends = [0, *starts], [head_nbytes, *ends]
        if self._bytes is None:
            pieces = self._parts.read_parts(starts, ends)
        else:
            view = memoryview(self._bytes)
            pieces = bytearray().join([view[start:end] for start, end in zip(starts, ends, strict=True)])
        if head_nbytes:
            if not self._confirm(bytes(pieces[:head_nbytes])):
                return None
            del pieces[:head_nbytes]
        small = restarts.splice(window, pieces)
        if small is None:
            return None
        down, across = restarts.pixels
        inner = stored._replace(left=stored.left - window.left * across, top=stored.top - window.top * down)
        try:
            return opencv.decode_jpeg_region(small, inner, mode, scale)
        except (UndecodableError, cv2.error):
            return None

    def _confirm(self, head: bytes | None = None) -> bool:
        """Whether the file's header matches the index; if not, the entry of the index is discarded.

        Args:
            head: the bytes of the file up to the scan; None reads them.
        """
        if not self._is_confirmed:
            assert self._restarts is not None
            if head is None:
                nbytes = self._restarts.scan_at
                head = self._bytes[:nbytes] if self._bytes else bytes(self._parts.read_parts([0], [nbytes]))
            self._is_confirmed = self._restarts.has_header(head)
            if not self._is_confirmed:
                self._restarts, self._has_looked = None, False
        return self._is_confirmed

    @property
    def _data(self) -> bytes:
        if self._bytes is None:
            self._bytes = self._parts.read()
        return self._bytes

    def _checked_header(self) -> Header | None:
        """The header, or None if it does not determine the picture.

        Raises:
            UndecodableError: the file is empty, cut short or refused.
        """
        if self._is_checked:
            return self._header
        data = self._data
        if not data:
            raise UndecodableError("the file is empty")
        header = read_header(data)
        if data.startswith(SIGNATURE) and not jpeg_has_end(data):
            raise UndecodableError(f"the JPEG is cut short: its {len(data):,} bytes end before the picture does")
        if header is None and data.startswith(SIGNATURE) and least_nbytes_of(data) > len(data):
            raise UndecodableError(f"the JPEG is damaged: its {len(data):,} bytes cannot hold its pixels")
        _refuse_unfit(header, len(data))
        self._header, self._is_checked = header, True
        return header


@contextmanager
def open_image(source: Source, index: int | None = None, backend: Backend | None = None) -> Iterator[EncodedImage]:
    """An image file, open inside the `with` block; its errors there become a DecodeError that names the sample.

    Args:
        source: a path, encoded bytes, or a part of another file.
        index: the number of the sample, for error messages.
        backend: the decoder for regions of JPEGs: see `read_image`.
    """
    if backend == "nvimagecodec":
        nvimagecodec.require()
    if not isinstance(source, (str, os.PathLike, Stored)):
        _require_bytes(source, index)
    quiet_opencv()
    try:
        if not is_looked_at():  # the usual case: timing marks would take 1 % of the smallest pictures' time
            with closing(_opened(source, is_sample=index is not None)) as parts:
                yield EncodedImage(parts, index, backend)
            return
        with READ:
            parts = _opened(source, is_sample=index is not None)
        with closing(parts), DECODE:
            yield EncodedImage(MarkedParts(parts), index, backend)
    except (OSError, UndecodableError, cv2.error) as error:
        name, nbytes = None, 0
        if isinstance(source, (str, os.PathLike, Stored)):
            name = printable(source.name if isinstance(source, Stored) else os.fspath(source))
        else:
            nbytes = memoryview(source).nbytes
        subject = _subject(index, name, nbytes)
        why = getattr(error, "strerror", None) or str(error).strip()
        remedy = "Replace the file, or leave it out of the dataset."
        if isinstance(source, Stored):
            remedy = "Write the shard again, or leave the sample out."
        hint = "" if isinstance(source, Stored) and "\n" in why else f"\n  {remedy}"
        raise DecodeError(f"{subject}: {why}.{hint}", index=index, source=name) from error


def _require_bytes(source: object, index: int | None) -> None:
    try:
        memoryview(source)  # type: ignore[arg-type]  # the check itself
    except TypeError:
        subject = "image" if index is None else describe_sample(index, None)
        hint = "its bytes, source.read()" if hasattr(source, "read") else "one of them"
        raise SourceTypeError(
            f"{subject}: a {type(source).__name__} is neither a path, a URL nor encoded bytes.\n  Pass {hint}.",
            index=index,
        ) from None


def _opened(source: Source, *, is_sample: bool) -> Parts:
    """Open the file.

    Raises:
        OSError, UndecodableError: it cannot be opened.
    """
    try:
        return open_parts(source, is_sample=is_sample)
    except ValueError as error:  # fsspec does not know the protocol
        raise UndecodableError(str(error)) from error


def printable(path: str) -> str:
    r"""The path for messages: bytes that are not UTF-8 appear as \xNN, so that printing never fails."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _subject(index: int | None, name: str | None, nbytes: int) -> str:
    if index is not None:
        return describe_sample(index, name)
    return f"image of {nbytes:,} bytes" if name is None else f'image "{name}"'


def _refuse_unfit(header: Header | None, nbytes: int) -> None:
    problem = None if header is None else header.problem(nbytes)
    if problem is not None:
        raise UndecodableError(problem)


def _inside(region: Box | None, width: int, height: int) -> Region:
    wanted = Region(0, 0, width, height) if region is None else Region(*map(operator.index, region))
    if not wanted.is_inside(width, height):
        raise ValueError(
            f"region {tuple(wanted)} (left, top, width, height) is not inside the picture of {width} x {height} pixels."
        )
    return wanted


def _cut(picture: np.ndarray[Any, Any], header: Header | None, region: Box | None, scale: int) -> np.ndarray[Any, Any]:
    height, width = picture.shape[:2]
    if header is not None and (header.width, header.height) != (width, height):
        raise UndecodableError(
            f"the file is damaged: its header declares {header.width} x {header.height} pixels, "
            f"but it has {width} x {height}"
        )
    wanted = _inside(region, width, height)
    return wanted.of(picture).copy() if scale == 1 else shrink(picture, wanted, scale)
