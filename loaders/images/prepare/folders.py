"""Prepares a folder of files: with several processes, each file written atomically, resumable after a stop."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import cv2

from loaders.errors import DatasetError, MissingExtraError
from loaders.images.decode.restart import Restarts
from loaders.images.decode.restart_index import NAME, RestartIndex, index_of
from loaders.images.prepare.claim import SETTINGS, claimed
from loaders.images.prepare.outcome import Outcome, Summary, is_unfinished, permissions, prepare_file, written_from
from loaders.images.prepare.photo import DEFAULT_QUALITY, Method
from loaders.images.walk import walk

_AT_ONCE = 8  # files per task: they take far longer than the overhead of a task
_TASKS_AHEAD = 4  # per process


def choose_method(quality: int | None, max_side: int | None) -> Method:
    """Lossless, unless an option requires re-encoding.

    Raises:
        MissingExtraError: `jpegtran` is needed and not installed.
    """
    if quality is not None or max_side is not None:
        return Method(None, DEFAULT_QUALITY if quality is None else quality, max_side)
    jpegtran = shutil.which("jpegtran")
    if jpegtran is None:
        raise MissingExtraError(
            "jpegtran, which adds restart markers without changing a pixel, is not installed: install "
            "libjpeg-turbo-progs (Debian, Ubuntu), libjpeg-turbo-utils (Fedora) or jpeg-turbo (Homebrew).\n  Or pass "
            "--quality or --max-side, to re-encode the photos."
        )
    return Method(jpegtran)


def prepare_folder(
    source: Path, target: Path, method: Method, processes: int, progress: Callable[[int, int], None]
) -> Summary:
    """Write all files below `source` to the same paths below `target`, JPEGs with restart markers.

    Files that an earlier run with the same method finished are not written again, unless their source has changed. The
    process may be killed at any time: an incomplete file never has its final name.

    Args:
        source: a folder; links in it are followed. If a folder has several paths, all but the first become links.
        target: a folder that is empty, missing, or written by an earlier run.
        method: how JPEGs get their markers.
        processes: number of processes; 1 uses this one.
        progress: called with (files done, files in all).

    Raises:
        DatasetError: the folders are unsuitable, another run is using the target, a worker process was killed, or the
            index cannot be written.
        OSError: the source cannot be listed, or a folder cannot be made in the target.
    """
    with claimed(source, target, method):
        summary = Summary()
        names = _make_folders(source, target, summary)
        index = index_of(target)
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
                    index.save_now_and_then()
                progress(len(names) - len(ahead) + count, len(names))
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process was killed, likely for lack of memory.\n  Run it again with fewer --workers: it "
                "resumes where it stopped."
            ) from error
        finally:
            is_saved = index.save()
        if not is_saved:
            raise DatasetError(f'"{target / NAME}" cannot be written: is the disk full?\n  Run it again to resume.')
        return summary


def _make_folders(source: Path, target: Path, summary: Summary) -> list[str]:
    """Make all folders below the target, and links to them; record in `summary` what is missing or stale.

    Returns:
        The paths of all files, relative to the source.
    """
    names: list[str] = []
    known: set[str] = set()  # files, links, and folders that could not be listed
    top = os.fsencode(source)
    for folder in walk(top, outside=os.fsencode(target)):
        place = os.fsdecode(os.path.relpath(folder.path, top))
        if folder.error is not None:
            if folder.path == top:
                raise folder.error
            summary.failed.append((place, folder.error.strerror or str(folder.error)))
            known.add(place)
        elif folder.first is None:
            _make_folder(target / place, os.stat(folder.path))
            names += [os.path.normpath(os.path.join(place, os.fsdecode(name))) for name in folder.files]
        elif folder.first in (top, os.fsencode(target)) or folder.path.startswith(os.path.join(folder.first, b"")):
            summary.round_trips.append(place)
        else:
            known.add(place)
            try:
                _make_link(target / place, target / os.fsdecode(os.path.relpath(folder.first, top)))
            except FileExistsError:
                summary.failed.append((place, "it is a link now, but an earlier run wrote something else in its place"))
    names = [name for name in names if _is_of_source(os.path.basename(name))]
    known.update(names)
    summary.stale = sorted(name for name in _files_in(target) if not known.intersection(_itself_and_above(name)))
    return names


def _make_folder(target: Path, source: os.stat_result) -> None:
    if target.is_symlink():  # an earlier run reached it by another path
        target.unlink()
    if not target.is_dir():
        target.mkdir(mode=0o700)
        target.chmod(permissions(source) | 0o700)


def _make_link(link: Path, folder: Path) -> None:
    there = os.path.relpath(folder, link.parent)
    if link.is_symlink():
        if os.readlink(link) == there:
            return
        link.unlink()
    link.symlink_to(there, target_is_directory=True)


def _itself_and_above(name: str) -> Iterator[str]:
    while name:
        yield name
        name = os.path.dirname(name)


def _is_of_source(name: str) -> bool:
    return name not in (NAME, SETTINGS) and not is_unfinished(name)


def _files_in(target: Path) -> Iterator[str]:
    """Relative paths of all files and links to folders in the target, except those that are not from the source."""
    for folder, folders, files in os.walk(target):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in filter(_is_of_source, files + links):
            yield os.path.relpath(os.path.join(folder, name), target)


def _known(source: Path, target: Path, name: str, index: RestartIndex) -> Restarts | None:
    """The index's entry of a JPEG that an earlier run wrote, if the source still has the same modification time."""
    try:
        written = written_from(os.stat(source), target)
    except OSError:
        return None
    return None if written is None else index.get(os.fsencode(name), written.st_size, written.st_mtime_ns)


def _outcomes(source: Path, target: Path, names: list[str], method: Method, processes: int) -> Iterator[Outcome]:
    """The outcome of each file, in the order of completion."""
    if processes == 1:
        for name in names:
            yield prepare_file(source / name, target / name, name, method)
        return
    tasks = (names[at : at + _AT_ONCE] for at in range(0, len(names), _AT_ONCE))
    # Not forked: the progress bar runs a thread.
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
    """Exit when the parent has ended, even if it was killed; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    cv2.setNumThreads(0)


def _prepare_files(source: Path, target: Path, names: list[str], method: Method) -> list[Outcome]:
    return [prepare_file(source / name, target / name, name, method) for name in names]
