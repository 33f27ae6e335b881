"""Compares our loader with others: `python -m benchmarks.compare [--peers all] [--rounds 5] [--seconds 2]`.

Every run is a fresh process in the peer's own environment (`python -m benchmarks.peers.install`). A round runs all
peers in turn, the order alternates from round to round, and ratios are taken within a round. Results are saved after
every round in results/NAME.json; `python -m benchmarks.tables` makes the tables and plots from them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import keep, machine, run_fresh
from benchmarks.peers import PEERS
from benchmarks.peers.install import python_of
from benchmarks.runs import RUNS, does, peer_module
from benchmarks.tables import comparison

FILES, REPEATED = 512, 8  # JPEG files, and how often each occurs in an epoch
_TIMEOUT_S = 180
_LAST_WORDS = 200


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parsed(argv)
    peers = list(PEERS) if arguments.peers == "all" else arguments.peers.split(",")
    names = list(RUNS) if arguments.only == "all" else arguments.only.split(",")
    unknown = sorted({*peers} - {*PEERS}) + sorted({*names} - {*RUNS})
    if unknown:
        print(f"unknown: {', '.join(unknown)}; peers: {', '.join(PEERS)}; runs: {', '.join(RUNS)}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), peers, names, arguments.seconds, print)
        for number in range(arguments.rounds):
            suite.round(number)
            keep(arguments.out, suite.content(arguments.rounds, short=arguments.short))
    print(f"\n{comparison(suite.content(arguments.rounds, short=arguments.short))}")
    print(f"\n{time.perf_counter() - began:.0f} s; saved in benchmarks/results/{arguments.out}.json")
    return 0


class Suite:
    """All runs of all peers, round by round.

    Args:
        folder: for the photographs, and the files that peers make from them.
        tell: called with a line before each run.
    """

    def __init__(
        self, folder: Path, peers: Sequence[str], names: Sequence[str], seconds: float, tell: Callable[[str], Any]
    ) -> None:
        self._folder = folder
        self._names = names
        self._seconds = seconds
        self._tell = tell
        self._missing: dict[str, str] = {}
        self._figures: dict[str, dict[str, list[dict[str, Any] | None]]] = {name: {} for name in names}
        self._peers = [peer for peer in peers if self._is_there(peer)]
        self._source, photos = self._write_photos(folder)
        self._files = folder / "files.json"
        self._files.write_text(json.dumps(photos))
        for peer in self._peers:
            if hasattr(peer_module(peer), "prepare") and any(RUNS[name].of == "photos" for name in names):
                self._tell(f"preparing {peer}")
                self._do(peer, "prepare", "prepare")

    def round(self, number: int) -> None:
        """Every run of every peer once."""
        for name in self._names:
            able = [peer for peer in self._peers if does(peer, name)]
            for peer in able if number % 2 == 0 else reversed(able):
                if (peer, name) in self._failed():
                    continue
                self._tell(f"round {number + 1}: {name}, {peer}")
                found = self._do(peer, name, "run", name=name, seconds=self._seconds)
                self._figures[name].setdefault(peer, []).append(found)

    def content(self, rounds: int, *, short: bool) -> dict[str, Any]:
        """The result to save. `short` marks a trial, which is not a measurement."""
        return {
            "machine": machine(),
            "short": short,
            "rounds": rounds,
            "seconds": self._seconds,
            "photographs": self._source,
            "versions": {peer: _versions(peer_module(peer)) for peer in self._peers},
            "not_measured": self._missing,
            "figures": self._figures,
        }

    def _is_there(self, peer: str) -> bool:
        if python_of(peer) is not None:
            return True
        why = getattr(peer_module(peer), "WHY_NOT", None)
        self._missing[peer] = why or f"not installed: python -m benchmarks.peers.install {peer}"
        return False

    def _write_photos(self, folder: Path) -> tuple[str, list[str]]:
        if not any(RUNS[name].of == "photos" for name in self._names):
            return "", []
        from benchmarks.photos import write_jpegs

        jpegs = folder / "jpegs"
        jpegs.mkdir()
        source = write_jpegs(jpegs, FILES)
        return source, sorted(map(str, jpegs.iterdir())) * REPEATED

    def _do(self, peer: str, run: str, function: str, **arguments: Any) -> dict[str, Any] | None:
        """Run one process. A failed run is recorded, and not tried again."""
        python = python_of(peer)
        assert python is not None
        about = {"peer": peer, "files": str(self._files), "prepared": str(self._folder / peer), **arguments}
        try:
            return run_fresh("benchmarks.runs", function, python=python, timeout_s=_TIMEOUT_S, **about)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            timed_out = isinstance(error, subprocess.TimeoutExpired)
            why = f"took longer than {_TIMEOUT_S} s" if timed_out else lines[-1][:_LAST_WORDS]
            why = why.replace(str(self._folder), "…")
            self._missing[f"{peer}, {run}"] = why
            self._tell(f"  not measured: {why}")
            return None

    def _failed(self) -> set[tuple[str, str]]:
        pairs = {tuple(key.split(", ", 1)) for key in self._missing if ", " in key}
        unprepared = {peer for peer, run in pairs if run == "prepare"}
        return pairs | {(peer, name) for peer in unprepared for name in RUNS if RUNS[name].of == "photos"}


def _versions(module: Any) -> list[str]:
    """A peer's pinned packages, or the installed versions of those it uses."""
    found = list(module.REQUIREMENTS)
    for name in getattr(module, "PACKAGES", ()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={importlib.metadata.version(name)}")
    return found


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="ours,torch_loader", help="comma-separated names, or all")
    parser.add_argument("--only", default="all", help=f"comma-separated runs: {', '.join(RUNS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of each pass")
    parser.add_argument("--out", default="bench", help="name of the result file in benchmarks/results")
    parser.add_argument("--short", action="store_true", help="mark the result as a trial that tables leave out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
