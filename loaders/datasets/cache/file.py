"""The file of a cache: its header, its creation by one of several processes, and when it is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import stat
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from loaders.datasets.wrapped import describe
from loaders.errors import DatasetError

# Positions in the header, in words of 8 bytes. From COUNTERS on there are PROCESSES counters of LINE words each; the
# table starts at TABLE.
_MAGIC_AT, _LENGTH_AT, _NBYTES_AT, TAIL_AT, LOOKED_AT, REFUSED_AT = range(6)
_FINGERPRINT = slice(8, 12)
COUNTERS, LINE, PROCESSES = 64, 8, 64
TABLE = 1024
# Eight bytes that contain the version of the layout.
_MAGIC = int.from_bytes(b"loaders\x02", "little")

_ALIGNMENT = 64
# Files checked when a cache is reopened; names, labels and settings are compared in full.
_FILES_LOOKED_AT = 256


def whole_lines(nbytes: int) -> int:
    """`nbytes`, rounded up to the alignment of everything in the file."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def first_record(length: int) -> int:
    """Offset of the first record in bytes, after a table of `length` words."""
    return whole_lines((TABLE + length) * 8)


def lay_out(fd: int, length: int, nbytes: int, fingerprint: bytes) -> None:
    """Write the header of an empty file and reserve the table; closes the file if there is no space for them."""
    try:
        os.ftruncate(fd, nbytes)  # sparse: takes no space yet
        os.posix_fallocate(fd, 0, first_record(length))
        header = np.zeros(_FINGERPRINT.stop, np.int64)
        header[[_MAGIC_AT, _LENGTH_AT, _NBYTES_AT]] = _MAGIC, length, nbytes
        header[[TAIL_AT, LOOKED_AT]] = first_record(length)
        header[_FINGERPRINT] = np.frombuffer(fingerprint, np.int64)
        os.pwrite(fd, header.tobytes(), 0)
    except OSError:
        os.close(fd)
        raise


def open_file(path: str, length: int, nbytes: int, fingerprint: bytes) -> int:
    """A descriptor of the file, which is created for this user alone if it does not exist.

    Raises:
        DatasetError: it was made for something else, or other users may write to it.
    """
    if not os.path.exists(path):
        # Created under a temporary name and linked when complete: of several processes, the first to link wins.
        draft = f"{path}.{secrets.token_hex(4)}"
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            lay_out(fd, length, nbytes, fingerprint)
            os.close(fd)
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    status = os.fstat(fd)
    is_file = stat.S_ISREG(status.st_mode)
    header = np.frombuffer((os.pread(fd, TABLE * 8, 0) if is_file else b"").ljust(TABLE * 8, b"\0"), np.int64)
    what = None
    if not is_file:
        what = "it is not a regular file"
    elif status.st_uid != os.geteuid():
        what = f"it belongs to another user, uid {status.st_uid}, who could write anything to it"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"other users may write to it (mode {stat.S_IMODE(status.st_mode):03o})"
    elif header[_MAGIC_AT] != _MAGIC or status.st_size != header[_NBYTES_AT]:
        what = "it is not a cache, or one of another version of this library"
    elif header[_LENGTH_AT] != length:
        what = f"it was made for {header[_LENGTH_AT]:,} samples, the dataset has {length:,}"
    elif header[_NBYTES_AT] != nbytes:
        what = f"it was made with nbytes={header[_NBYTES_AT]:,}, not {nbytes:,}"
    elif header[_FINGERPRINT].tobytes() != fingerprint:
        what = "the dataset has changed: other files, labels or settings"
    if what:
        os.close(fd)
        raise DatasetError(f'"{path}" cannot be used: {what}.\n  Delete it, or give another path.')
    return fd


class _Description(pickle.Pickler):
    """Pickles an object for its fingerprint: classes and functions by name alone."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType, BuiltinFunctionType)) and obj.__module__ != "builtins":
            module = str(obj.__module__)
            # The module of a class within this package may change without any change of the dataset.
            package = __name__.partition(".")[0]
            return str, (f"{package if module.startswith(f'{package}.') else module}.{obj.__qualname__}",)
        return NotImplemented


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=32)

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return len(data)


def fingerprint_of(dataset: Any, length: int) -> bytes:
    """32 bytes that change when the pickled dataset or its files change.

    Raises:
        DatasetError: it cannot be pickled.
    """
    digest = _Digest()
    writer = _Description(digest, protocol=5)
    # With pickle's memo the bytes would depend on which equal strings are one object.
    writer.fast = True
    try:
        writer.dump(dataset)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise DatasetError(
            f"the {type(dataset).__name__} cannot be recognised again, since it cannot be pickled: {error}.\n"
            "  A cache with path= needs a dataset that can be pickled."
        ) from error
    for index in range(0, length, -(-length // _FILES_LOOKED_AT) or 1):
        name = describe(dataset, index, passed_on=True)  # maybe of another sample, but of a file of the dataset
        try:
            status = os.stat(name) if name else None
        except (OSError, ValueError):  # it is not a path
            status = None
        digest.write(repr((name, status and (status.st_size, status.st_mtime_ns))).encode(errors="surrogatepass"))
    return digest.hash.digest()
