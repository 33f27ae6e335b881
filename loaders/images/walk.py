"""Walks a folder tree, following links and listing each folder once."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from typing import NamedTuple


class Folder(NamedTuple):
    """One folder of a walk.

    Attributes:
        path: its path, below the top of the walk, possibly through links.
        files: the sorted names of its entries that are not folders: files, pipes, broken links.
        first: the path at which the same folder was listed before, or `outside` if the folder lies there; `files` is
            then empty. None if the folder is new.
        error: why it could not be listed, or None.
    """

    path: bytes
    files: list[bytes]
    first: bytes | None = None
    error: OSError | None = None


def walk(top: bytes, *, hidden: bool = True, outside: bytes | None = None) -> Iterator[Folder]:
    """A folder and all folders below it, following links. Each is listed once, so that cycles of links end.

    Folders reached without a link come first, then links in the order of their paths.

    Args:
        top: the folder to start from.
        hidden: whether to include files and folders whose names begin with a dot.
        outside: a folder that is not entered, nor any folder below it.
    """
    places: dict[tuple[int, int], bytes] = {}
    kept_out = None if outside is None else os.path.join(os.path.realpath(outside), b"")
    plain, links = [top], list[bytes]()
    while plain or links:
        path = plain.pop() if plain else heapq.heappop(links)
        try:
            if kept_out is not None and os.path.join(os.path.realpath(path), b"").startswith(kept_out):
                yield Folder(path, [], outside)
                continue
            status = os.stat(path)
            first = places.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                yield Folder(path, [], first)
                continue
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Folder(path, [], error=error)
            continue
        files = []
        for entry in found:
            if not hidden and entry.name.startswith(b"."):
                continue
            if not is_folder(entry):
                files.append(entry.name)
            elif entry.is_symlink():
                heapq.heappush(links, entry.path)
            else:
                plain.append(entry.path)
        yield Folder(path, files)


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one; False for a link that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to a place without permission
        return False
