"""A folder of files written anew: by many processes, each file whole or not at all, going on where it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2

from loaders.errors import DatasetError, MissingExtraError
from loaders.images.decode.header import read_header
from loaders.images.decode.jpeg import SIGNATURE
from loaders.images.decode.restart import Restarts, find_restarts
from loaders.images.decode.restart_index import NAME, RestartIndex, index_of
from loaders.images.prepare.photo import DEFAULT_QUALITY, Method, UnpreparedError, with_markers

SETTINGS = ".loaders-prepare.json"

_UNFINISHED = (".loaders-", ".part")
_AT_ONCE = 8  # files of one task: what a task costs is little beside that
_TASKS_AHEAD = 4  # per process


class Outcome(NamedTuple):
    """What became of one file: a JPEG with markers if there are `restarts`, else a copy; or nothing, if it `failed`.

    `why` is empty unless a JPEG has no markers now, or it failed; `earlier`: it was there before this run.
    """

    name: str
    restarts: Restarts | None = None
    why: str = ""
    failed: bool = False
    earlier: bool = False
    nbytes: tuple[int, int] = (0, 0)


@dataclass
class Summary:
    """What a run has done, for a person to read.

    Attributes:
        prepared: JPEGs that have markers now; `as_before` of them had been written by an earlier run.
        copied: files that are no JPEGs.
        left: (name, why) of JPEGs that are copied as they were.
        failed: (name, why) of files that could not be read or written; they are missing.
        stale: names of files in the target that have no source any more.
        nbytes: of the JPEGs that this run has prepared, before and after.
    """

    prepared: int = 0
    as_before: int = 0
    copied: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    nbytes: tuple[int, int] = (0, 0)

    def count(self, outcome: Outcome) -> None:
        """Add what became of a file."""
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


def choose_method(quality: int | None, max_side: int | None) -> Method:
    """Lossless unless something is asked for that cannot be.

    Raises:
        MissingExtraError: `jpegtran` is not installed.
    """
    if quality is not None or max_side is not None:
        return Method(None, DEFAULT_QUALITY if quality is None else quality, max_side)
    jpegtran = shutil.which("jpegtran")
    if jpegtran is None:
        raise MissingExtraError(
            "jpegtran is not installed, and only it adds restart markers without changing a pixel: install "
            "libjpeg-turbo-progs (Debian, Ubuntu), libjpeg-turbo-utils (Fedora) or jpeg-turbo (Homebrew).\n  Or pass "
            "--quality or --max-side, to encode the photos anew."
        )
    return Method(jpegtran)


def prepare_tree(
    source: Path, target: Path, method: Method, processes: int, progress: Callable[[int, int], None]
) -> Summary:
    """Write all files below `source` to the same places below `target`, JPEGs with restart markers.

    What an earlier run with the same method has finished is not done again, unless its source has changed. It may be
    killed at any time; nothing half-written has a name that counts.

    Args:
        source: a folder; links in it are followed.
        target: a folder that is empty, missing, or of an earlier run.
        method: how JPEGs get their markers.
        processes: how many of them work; 1 is this one.
        progress: called with (files done, files in all).

    Raises:
        DatasetError: the folders cannot be what they are to be, or a worker process was killed.
    """
    _claim(source, target, method)
    index = index_of(target)
    names = list(_files_below(source, target))
    summary = Summary(stale=sorted({*_files_in(target)} - {*names}))
    ahead = []
    for name in names:
        known = _known(source / name, target / name, name, index)
        if known is None:
            ahead.append(name)
        else:
            summary.count(Outcome(name, known, earlier=True))
    progress(len(names) - len(ahead), len(names))
    try:
        for count, outcome in enumerate(_outcomes(source, target, ahead, method, processes), 1):
            summary.count(outcome)
            if outcome.restarts is not None:
                status = os.stat(target / outcome.name)
                index.add(os.fsencode(outcome.name), status.st_size, status.st_mtime_ns, outcome.restarts)
            progress(len(names) - len(ahead) + count, len(names))
    except BrokenProcessPool as error:
        raise DatasetError(
            "a worker process was killed, likely for want of memory.\n  Run it again, with fewer --workers: it goes on "
            "where it was."
        ) from error
    finally:
        index.save()
    return summary


def _claim(source: Path, target: Path, method: Method) -> None:
    """See that the target is ours, and tidy up what a killed run left there."""
    if not source.is_dir():
        raise DatasetError(f'"{source}" is not a folder.')
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise DatasetError(
            f'"{target}" and "{source}" lie in each other: the prepared files need a folder of their own.'
        )
    if target.exists() and not target.is_dir():
        raise DatasetError(f'"{target}" is not a folder.')
    settings = {"lossless": method.jpegtran is not None, "quality": method.quality, "max_side": method.max_side}
    file = target / SETTINGS
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    if found is not None and found != settings:
        raise DatasetError(
            f'"{target}" was prepared with {found}, and now {settings} is asked for.\n'
            "  Name another folder, or delete it."
        )
    is_ours = found is not None or file.exists()
    if not is_ours and target.exists() and not all(map(_is_unfinished, os.listdir(target))):
        raise DatasetError(f'"{target}" is not empty, and of no earlier run.\n  Name a new folder.')
    target.mkdir(parents=True, exist_ok=True)
    for folder, _, files in os.walk(target):
        for name in filter(_is_unfinished, files):
            os.unlink(os.path.join(folder, name))
    _write(file, lambda unfinished: unfinished.write_text(json.dumps(settings) + "\n"))


def _is_unfinished(name: str) -> bool:
    return name.startswith(_UNFINISHED[0]) and name.endswith(_UNFINISHED[1])


def _files_below(source: Path, target: Path) -> Iterator[str]:
    """Names of all files as seen from the source; folders are made on the way."""
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(source / folder)
        chain = (*above, (status.st_dev, status.st_ino))
        if chain[-1] in above:  # a link to a folder that it lies in
            continue
        (target / folder).mkdir(exist_ok=True)
        with os.scandir(source / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = os.path.join(folder, entry.name)
                if entry.is_dir():
                    pending.append((name, chain))
                elif entry.name not in (NAME, SETTINGS) and not _is_unfinished(entry.name):
                    yield name


def _files_in(target: Path) -> Iterator[str]:
    """Names of all files as seen from the target, but those that are not from the source."""
    for folder, _, files in os.walk(target):
        for name in files:
            if name not in (NAME, SETTINGS) and not _is_unfinished(name):
                yield os.path.relpath(os.path.join(folder, name), target)


def _known(source: Path, target: Path, name: str, index: RestartIndex) -> Restarts | None:
    """What the index says of a JPEG that an earlier run wrote, if its source is of the same time still."""
    written = _written(source, target)
    return None if written is None else index.get(os.fsencode(name), written.st_size, written.st_mtime_ns)


def _written(source: Path, target: Path) -> os.stat_result | None:
    """The target as it stands, if it was written from the source as that stands."""
    try:
        written = os.stat(target)
        return written if written.st_mtime_ns == os.stat(source).st_mtime_ns else None
    except OSError:
        return None


def _outcomes(source: Path, target: Path, names: list[str], method: Method, processes: int) -> Iterator[Outcome]:
    """What became of each file, in the order in which they are finished."""
    if processes == 1:
        for name in names:
            yield _prepare_file(source / name, target / name, name, method)
        return
    tasks = (names[at : at + _AT_ONCE] for at in range(0, len(names), _AT_ONCE))
    # Not forked: the progress bar has a thread.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin_worker) as pool:
        running: set[Future[list[Outcome]]] = set()
        try:
            while True:
                for task in islice(tasks, _TASKS_AHEAD * processes - len(running)):
                    running.add(pool.submit(_prepare_files, source, target, task, method))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave when the parent is gone, also when that was killed; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    cv2.setNumThreads(0)


def _prepare_files(source: Path, target: Path, names: list[str], method: Method) -> list[Outcome]:
    return [_prepare_file(source / name, target / name, name, method) for name in names]


def _prepare_file(source: Path, target: Path, name: str, method: Method) -> Outcome:
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            return Outcome(name, why="it is no file", failed=True)
        with open(source, "rb") as file:
            start = file.read(len(SIGNATURE))
            data = start + file.read() if start == SIGNATURE else None
        if data is None:
            _write(target, lambda unfinished: shutil.copyfile(source, unfinished), status)
            return Outcome(name)
        restarts = _restarts_of(target.read_bytes()) if _written(source, target) else None
        if restarts is not None:  # an earlier run was killed before it could note this
            return Outcome(name, restarts, earlier=True)
        try:
            found, why = with_markers(data, method), ""
        except UnpreparedError as error:
            found, why = data, str(error)
        _write(target, lambda unfinished: unfinished.write_bytes(found), status)
    except OSError as error:
        return Outcome(name, why=error.strerror or str(error), failed=True)
    return Outcome(name, None if why else _restarts_of(found), why, nbytes=(len(data), len(found)))


def _restarts_of(data: bytes) -> Restarts | None:
    header = read_header(data)
    return None if header is None or header.jpeg is None else find_restarts(data, header.jpeg)


def _write(target: Path, fill: Callable[[Path], object], like: os.stat_result | None = None) -> None:
    """Let `fill` write a file, which gets its name when it is complete, with the times and permissions of another."""
    unfinished = target.with_name(secrets.token_hex(8).join(_UNFINISHED))
    try:
        fill(unfinished)
        if like is not None:
            os.chmod(unfinished, stat.S_IMODE(like.st_mode))
            os.utime(unfinished, ns=(like.st_atime_ns, like.st_mtime_ns))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
