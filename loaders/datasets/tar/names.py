"""The shards that a pattern stands for: `shard-{000..127}.tar`, `train/*.tar`, a list of these, or URLs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator

from loaders.errors import DatasetError
from loaders.images.decode import printable
from loaders.images.decode.files import file_system, is_remote

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MOST = 1_000_000  # shards
_NAMED = 3

Shards = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def shard_paths(shards: Shards) -> list[str]:
    """The paths or URLs of all shards, in order.

    Braces are expanded as in a shell, in the order in which they are written; wildcards give the files that exist, by
    name. What exists under the very name that was given is not expanded.

    Raises:
        DatasetError: nothing matches, a store cannot be listed, a shard is listed twice, or there are too many.
    """
    given = [shards] if isinstance(shards, (str, os.PathLike)) else shards
    found: list[str] = []
    for each in given:
        pattern = os.fspath(each)
        if not isinstance(pattern, str):
            raise TypeError(f"shards: {pattern!r} is not a str; each shard is a path, a pattern or a URL.")
        for path in _expanded(pattern):
            found.append(path)
            if len(found) > _MOST:
                raise DatasetError(f'shards: "{printable(pattern)}" makes more than {_MOST:,} shards.')
    if not found:
        raise DatasetError("shards: there are none in the list.")
    if len(set(found)) < len(found):
        twice = sorted({path for path in found if found.count(path) > 1})[:_NAMED] if len(found) < 10_000 else []
        raise DatasetError(f"shards: {', '.join(map(printable, twice)) or 'one'} is listed more than once.")
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """What a shell makes of braces: `{a,b}`, `{1..3}`, `{08..12}`, `{0..9..3}`, nested or several of them."""
    span = _first_braces(pattern)
    if span is None:
        yield pattern
        return
    start, end = span
    inner = pattern[start + 1 : end]
    parts = list(_alternatives(inner))
    for first in _numbers(inner) if len(parts) == 1 else (each for part in parts for each in expand_braces(part)):
        for rest in expand_braces(pattern[end + 1 :]):
            yield pattern[:start] + first + rest


def _expanded(pattern: str) -> Iterator[str]:
    if not is_remote(pattern) and os.path.exists(pattern):
        yield pattern
        return
    for path in expand_braces(pattern):
        if not glob.has_magic(path) or (not is_remote(path) and os.path.exists(path)):
            yield path
            continue
        matches = _remote_matches(path) if is_remote(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise DatasetError(f'shards: no file matches "{printable(path)}".')
        yield from matches


def _remote_matches(pattern: str) -> list[str]:
    try:
        files, name = file_system(pattern)
        return sorted(files.unstrip_protocol(each) for each in files.glob(name))
    except (OSError, ValueError) as error:  # an unknown protocol
        why = getattr(error, "strerror", None) or error
        raise DatasetError(f'shards: "{printable(pattern)}" cannot be listed: {why}.') from error


def _first_braces(pattern: str) -> tuple[int, int] | None:
    """Where the first braces that can be expanded begin and end."""
    for start in (at for at, letter in enumerate(pattern) if letter == "{"):
        depth = 0
        for end in range(start, len(pattern)):
            depth += (pattern[end] == "{") - (pattern[end] == "}")
            if depth == 0:
                inner = pattern[start + 1 : end]
                if _RANGE.fullmatch(inner) or len(list(_alternatives(inner))) > 1:
                    return start, end
                break
    return None


def _alternatives(inner: str) -> Iterator[str]:
    """The parts between commas that are not inside further braces."""
    depth, begin = 0, 0
    for at, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            yield inner[begin:at]
            begin = at + 1
    yield inner[begin:]


def _numbers(inner: str) -> Iterator[str]:
    match = _RANGE.fullmatch(inner)
    assert match is not None
    first, last = int(match[1]), int(match[2])
    step = abs(int(match[3] or 1)) or 1
    is_padded = any(re.match(r"-?0\d", side) for side in match.group(1, 2))
    width = max(len(match[1]), len(match[2])) if is_padded else 0
    for number in range(first, last + 1, step) if first <= last else range(first, last - 1, -step):
        yield f"{number:0{width}}"
