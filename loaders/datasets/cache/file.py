"""The file that a cache lies in: how it begins, how it is made by one of many, and when it is refused."""

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

# Words of the header, 8 bytes each. From COUNTERS on, each of the PROCESSES counters has a line; then comes the table.
_MAGIC_AT, _LENGTH_AT, _NBYTES_AT, TAIL_AT, LOOKED_AT, REFUSED_AT = range(6)
_FINGERPRINT = slice(8, 12)
COUNTERS, LINE, PROCESSES = 64, 8, 64
TABLE = 1024
# Eight bytes with the version of the layout: another one is another format.
_MAGIC = int.from_bytes(b"loaders\x02", "little")

_ALIGNMENT = 64
# Files looked at when a cache is opened again; names, labels and settings are compared in full.
_FILES_LOOKED_AT = 256


def whole_lines(nbytes: int) -> int:
    """`nbytes`, rounded up to what everything in the file is aligned to."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def first_record(length: int) -> int:
    """Offset of the first record, behind a table of `length` words."""
    return whole_lines((TABLE + length) * 8)


def lay_out(fd: int, length: int, nbytes: int, fingerprint: bytes) -> None:
    """Header and table of an empty file, which is closed if there is no room for them."""
    try:
        os.ftruncate(fd, nbytes)  # sparse: costs nothing yet
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
    """A descriptor of the file, which is made for this user alone if there is none.

    Raises:
        DatasetError: it is of something else, or others may write it.
    """
    if not os.path.exists(path):
        # Made under another name and linked when complete: of several processes the first one's file stays.
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
        what = "it is no regular file"
    elif status.st_uid != os.geteuid():
        what = f"it is another user's, number {status.st_uid}, who could put anything into it"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"other users may write into it (mode {stat.S_IMODE(status.st_mode):03o})"
    elif header[_MAGIC_AT] != _MAGIC or status.st_size != header[_NBYTES_AT]:
        what = "it is no cache, or one of another version of this library"
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
    """Writes what an object is made of; functions by their name alone."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType, BuiltinFunctionType)) and obj.__module__ != "builtins":
            module = str(obj.__module__)
            # Where in this package a class of its own lies says nothing of the dataset.
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
    """32 bytes that change with what the dataset is made of, or with its files.

    Raises:
        DatasetError: it cannot be pickled.
    """
    digest = _Digest()
    writer = _Description(digest, protocol=5)
    # Without it the pickle depends on which equal strings are one object.
    writer.fast = True
    try:
        writer.dump(dataset)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise DatasetError(
            f"the {type(dataset).__name__} cannot be told from another one, since it cannot be pickled: {error}.\n"
            "  A cache with a path= needs a dataset that can be."
        ) from error
    for index in range(0, length, -(-length // _FILES_LOOKED_AT) or 1):
        name = describe(dataset, index, passed_on=True)  # whichever of its samples: a file of the dataset's it is
        try:
            status = os.stat(name) if name else None
        except (OSError, ValueError):  # it says something else than a path
            status = None
        digest.write(repr((name, status and (status.st_size, status.st_mtime_ns))).encode(errors="surrogatepass"))
    return digest.hash.digest()
