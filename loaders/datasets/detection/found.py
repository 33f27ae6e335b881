"""Which of the pictures that annotations name exist, and small files that are read whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from loaders.images.decode import EXTENSIONS
from loaders.images.decode.files import is_remote
from loaders.images.walk import walk


class ExistingFiles:
    """Whether files exist, by listing each folder once. Remote files count as existing; reading finds out."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        if is_remote(path):
            return True
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = _names_in(folder)
        return name in self._names[folder]


def files_below(folder: str, extensions: Iterable[str] = EXTENSIONS) -> list[str]:
    """The files in a folder and below it with one of these endings, sorted.

    Raises:
        OSError: a folder cannot be listed.
    """
    endings = tuple(os.fsencode(each) for each in extensions)
    found = []
    for each in walk(os.fsencode(folder), hidden=False):
        if each.error is not None:
            raise each.error
        before = os.path.join(each.path, b"")
        found += [os.fsdecode(before + name) for name in each.files if name.lower().endswith(endings)]
    return sorted(found)


def read_small(file: str, most_nbytes: int) -> bytes:
    """The content of a file. A pipe is refused: opening it may wait for ever.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, or larger than any file of annotations.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is a pipe or a device, not a file")
    with open(file, "rb") as opened:
        content = opened.read(most_nbytes + 1)
    if len(content) > most_nbytes:
        raise ValueError("the file is too large to be one of annotations")
    return content


def _names_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries}
    except (OSError, ValueError):  # it does not exist, or its name has a NUL
        return set()
