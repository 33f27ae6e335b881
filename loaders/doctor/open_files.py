"""Whether a dataset holds open files or databases that forked workers would share."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from loaders.datasets.per_worker import PerWorker
from loaders.datasets.wrapped import bases
from loaders.doctor.finding import Finding

# Handles by the module that has them. None is imported: a dataset that holds one has done so.
_HANDLES = {
    "h5py": ("File", "Group", "Dataset"),
    "lmdb": ("Environment", "Transaction", "Cursor"),
    "netCDF4": ("Dataset",),
    "pyarrow.parquet": ("ParquetFile",),
    "sqlite3": ("Connection", "Cursor"),
    "tables": ("File",),
    "tarfile": ("TarFile",),
    "zarr.storage": ("ZipStore",),
    "zipfile": ("ZipFile",),
}
_DEPTH = 4
_MOST = 64  # items of a container that are looked at
_MOST_OBJECTS = 4096
# Objects of these hold no files, or many others.
_SKIPPED = ("builtins", "numpy", "torch", "albumentations", "threading", "logging")


def check_open_files(dataset: Any) -> Finding:
    """Whether the dataset holds open files or databases, itself or through what it holds."""
    for base in bases(dataset):
        for path, value in _held_by(base):
            if _is_open(value):
                kind = type(value)
                package = kind.__module__.partition(".")[0]
                name = kind.__qualname__ if package in ("builtins", "_io") else f"{package}.{kind.__qualname__}"
                return Finding(
                    "open files in workers",
                    "problem",
                    f"attribute {path!r} is an open {name}: forked workers share its position, locks and buffers, and "
                    "may read each other's bytes; spawned ones cannot get it",
                    "Let each worker open its own: hold a loaders.PerWorker(open, path) there, and call it in "
                    "__getitem__.",
                )
    return Finding("open files in workers", "fine", "none is open")


def _held_by(base: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of what an object holds, and of what that holds: attributes, and items of containers."""
    seen: set[int] = {id(base)}
    level: list[tuple[str, Any]] = [("", base)]
    for _ in range(_DEPTH):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            for name, each in _parts(path, value):
                if id(each) in seen or isinstance(each, PerWorker):
                    continue
                if len(seen) > _MOST_OBJECTS:
                    return
                seen.add(id(each))
                below.append((name, each))
                yield name, each
        level = below


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", each) for key, each in list(value.items())[:_MOST])
    elif isinstance(value, (list, tuple)):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(value[:_MOST]))
    elif not isinstance(value, type) and (not path or type(value).__module__.partition(".")[0] not in _SKIPPED):
        dot = f"{path}." if path else ""
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        yield from ((f"{dot}{name}", each) for name, each in list(attributes.items()))


def _is_open(value: Any) -> bool:
    if isinstance(value, io.IOBase) and not isinstance(value, (io.BytesIO, io.StringIO)):
        try:
            return not value.closed
        except ValueError:  # its buffer was detached
            return False
    for name, kinds in _HANDLES.items():
        module = sys.modules.get(name)
        found = tuple(kind for each in kinds if isinstance(kind := getattr(module, each, None), type))
        if found and isinstance(value, found):
            return not _is_closed(name, module, value)
    return False


def _is_closed(name: str, module: Any, value: Any) -> bool:
    if name == "h5py":
        return not value
    try:
        if name == "sqlite3":
            _ = getattr(value, "connection", value).in_transaction
        elif name == "lmdb" and isinstance(value, module.Environment):
            value.path()
    except module.Error:  # raised by those that are closed
        return True
    if name == "zarr.storage":
        return getattr(value, "_is_open", True) is False
    return getattr(value, "closed", False) is True or getattr(value, "fp", True) is None
