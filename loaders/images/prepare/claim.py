"""Claims the folder that prepared files are written to: for one method, for one run at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loaders.errors import DatasetError
from loaders.images.prepare.outcome import is_unfinished, permissions
from loaders.images.prepare.photo import Method

if sys.platform != "win32":
    import fcntl

SETTINGS = ".loaders-prepare.json"


@contextmanager
def claimed(source: Path, target: Path, method: Method) -> Iterator[None]:
    """Claim the target for this run inside the `with` block. Incomplete files of a killed run are removed first.

    Raises:
        DatasetError: the folders are unsuitable, or another run is using the target.
    """
    if not source.is_dir():
        raise DatasetError(f'"{source}" is not a folder.')
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise DatasetError(f'"{target}" and "{source}" overlap: the prepared files need a separate folder.')
    if target.exists() and not target.is_dir():
        raise DatasetError(f'"{target}" is not a folder.')
    file = target / SETTINGS
    if not file.exists() and target.exists() and not all(map(is_unfinished, os.listdir(target))):
        raise DatasetError(f'"{target}" is not empty, and not from an earlier run.\n  Use a new folder.')
    if not target.exists():
        target.mkdir(parents=True)
        target.chmod(permissions(source.stat()) | 0o700)
    with open(file, "r+", encoding="utf-8", errors="replace", opener=_open_or_make) as settings:
        is_alone = _lock(settings.fileno(), target)
        if not _is_of(method, settings.read(), target):
            settings.seek(0)
            settings.write(json.dumps(_as_json(method)) + "\n")
            settings.truncate()
            settings.flush()
        if is_alone:
            _remove_unfinished(target)
        yield


def _open_or_make(path: str, flags: int) -> int:
    # Not through a link: it might point to any file.
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(fd: int, target: Path) -> bool:
    """Lock out other runs for as long as the file is open, however this process ends.

    Returns:
        False if the file system does not support locks.
    """
    if sys.platform == "win32":  # where an open file cannot be removed anyway
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DatasetError(f'Another run is using "{target}".\n  Wait for it to end, or stop it.') from error
    except OSError:
        return False
    return True


def _remove_unfinished(target: Path) -> None:
    for folder, _, names in os.walk(target):
        for name in filter(is_unfinished, names):
            os.unlink(os.path.join(folder, name))


def _is_of(method: Method, content: str, target: Path) -> bool:
    """Whether this method is recorded already; False if none is, or if the record is unreadable.

    Raises:
        DatasetError: another method is recorded.
    """
    try:
        found = json.loads(content)
    except ValueError:
        return False
    if found != _as_json(method):
        raise DatasetError(
            f'"{target}" was prepared with {found}, and now {_as_json(method)} is requested.\n'
            "  Use another folder, or delete this one."
        )
    return True


def _as_json(method: Method) -> dict[str, bool | int | None]:
    return {"lossless": method.jpegtran is not None, "quality": method.quality, "max_side": method.max_side}
