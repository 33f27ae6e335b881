"""Prepares one file of a folder: written with markers, or copied, in either case atomically."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from loaders.images.decode.header import read_header
from loaders.images.decode.jpeg import SIGNATURE
from loaders.images.decode.restart import Restarts, find_restarts
from loaders.images.prepare.photo import Method, UnpreparedError, with_markers

_UNFINISHED = (".loaders-", ".part")
_PERMISSIONS = 0o777  # the bits of a mode that are kept: a copy must not run with the rights of whoever made it


class Outcome(NamedTuple):
    """The outcome of one file: a JPEG with markers if there are `restarts`, else a copy; nothing if it `failed`.

    `why` is empty unless a JPEG got no markers or the file failed; `earlier` says that an earlier run wrote it.
    """

    name: str
    restarts: Restarts | None = None
    why: str = ""
    failed: bool = False
    earlier: bool = False
    nbytes: tuple[int, int] = (0, 0)


@dataclass
class Summary:
    """What a run has done, for the user.

    Attributes:
        prepared: JPEGs that have markers now; `as_before` of them were written by an earlier run.
        copied: files that are not JPEGs; `copied_before` of them were written by an earlier run.
        left: (name, why) of JPEGs that are copied unchanged.
        failed: (name, why) of files and folders that could not be read or written; they are missing from the target.
        round_trips: links to a folder that contains them, or to the target; they are left out on purpose.
        stale: names of files in the target that no longer have a source.
        nbytes: total size of the JPEGs that this run has prepared, before and after.
    """

    prepared: int = 0
    as_before: int = 0
    copied: int = 0
    copied_before: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    round_trips: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    nbytes: tuple[int, int] = (0, 0)

    def count(self, outcome: Outcome) -> None:
        """Add the outcome of a file."""
        if outcome.failed:
            self.failed.append((outcome.name, outcome.why))
        elif outcome.restarts is not None:
            self.prepared += 1
            self.as_before += outcome.earlier
            before, after = self.nbytes
            self.nbytes = (before + outcome.nbytes[0], after + outcome.nbytes[1])
        elif outcome.why:
            self.left.append((outcome.name, outcome.why))
        else:
            self.copied += 1
            self.copied_before += outcome.earlier


def prepare_file(source: Path, target: Path, name: str, method: Method) -> Outcome:
    """Write one file, unless an earlier run did and its source still has the same modification time."""
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):  # checked first: opening a device may have side effects
            return Outcome(name, why="it is not a regular file", failed=True)
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            written = written_from(status, target)
            is_same_size = written is not None and written.st_size == status.st_size
            start = file.read(len(SIGNATURE))
            if start != SIGNATURE:
                if not is_same_size:
                    file.seek(0)
                    write_whole(target, lambda unfinished: shutil.copyfileobj(file, unfinished), status)
                return Outcome(name, earlier=is_same_size)
            data = start + file.read()
        restarts = None if written is None else _restarts_of(target.read_bytes())
        if restarts is not None:  # an earlier run was killed before it could record this
            return Outcome(name, restarts, earlier=True)
        try:
            found, why = with_markers(data, method), ""
        except UnpreparedError as error:
            found, why = data, str(error)
        if not (why and is_same_size):
            write_whole(target, lambda unfinished: unfinished.write(found), status)
    except OSError as error:
        return Outcome(name, why=error.strerror or str(error), failed=True)
    return Outcome(name, None if why else _restarts_of(found), why, nbytes=(len(data), len(found)))


def written_from(source: os.stat_result, target: Path) -> os.stat_result | None:
    """The status of the target, if it is a file that was written from the source in its current state."""
    try:
        written = os.stat(target)
    except OSError:
        return None
    return written if stat.S_ISREG(written.st_mode) and written.st_mtime_ns == source.st_mtime_ns else None


def write_whole(target: Path, fill: Callable[[BinaryIO], object], like: os.stat_result | None = None) -> None:
    """Write a file atomically: it gets its name when `fill` has completed it.

    Args:
        target: its name.
        fill: called with the file, open for writing. Until it is complete, only its owner may read it.
        like: status of a file whose times and `permissions` it gets.
    """
    unfinished = target.with_name(secrets.token_hex(8).join(_UNFINISHED))
    try:
        with open(unfinished, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            fill(file)
        if like is not None:
            os.chmod(unfinished, permissions(like))
            os.utime(unfinished, ns=(like.st_atime_ns, like.st_mtime_ns))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def permissions(status: os.stat_result) -> int:
    """The permission bits of a file's mode, without set-user-ID, set-group-ID and sticky bits."""
    return status.st_mode & _PERMISSIONS


def is_unfinished(name: str) -> bool:
    """Whether a name is that of a file that `write_whole` did not complete."""
    return name.startswith(_UNFINISHED[0]) and name.endswith(_UNFINISHED[1])


def _restarts_of(data: bytes) -> Restarts | None:
    header = read_header(data)
    return None if header is None or header.jpeg is None else find_restarts(data, header.jpeg)
