"""What a worker process imports when it is started by "spawn", or once by the server of "forkserver"."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from loaders.doctor.finding import Finding
from loaders.workers.messages import Job
from loaders.workers.preload import modules_of

_TIMEOUT_S = 120
_LISTED = 5
_LINE = re.compile(r"import time:\s*\d+ \|\s*(\d+) \| *(\S+)")
_PROGRAM = (
    "import json, sys; path, names = json.loads(sys.argv[1]); sys.path[:] = path; "
    "import loaders.workers.process_main\n"
    "for name in names:\n    try:\n        __import__(name)\n    except Exception:\n        pass"
)


def check_worker_imports(dataset: Any) -> Finding:
    """Which packages a started worker imports for this dataset, and how long each takes with all that it imports."""
    check = "imports of a started worker"
    names = sorted(modules_of(Job(dataset, "each", None, True, {}, False, 1, False, 1, 0, None)))
    try:
        times = import_times(names)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "See what `python -X importtime -c 'import loaders.workers.process_main'` prints."
        return Finding(check, "warning", f"could not be measured: {type(error).__name__}", remedy)
    packages: dict[str, float] = {}
    for name, seconds in times:
        package = name.partition(".")[0]
        packages[package] = max(packages.get(package, 0.0), seconds)
    dearest = sorted(packages.items(), key=lambda pair: -pair[1])[:_LISTED]
    listed = ", ".join(f"{package} {seconds * 1e3:,.0f} ms" for package, seconds in dearest)
    told = f"{listed} (each with what it imports)"
    if "torch" in packages:
        told += "; torch comes with the dataset's own modules or the main program, workers do not need it"
    return Finding(check, "fine", told)


def import_times(names: Iterable[str]) -> list[tuple[str, float]]:
    """(module, seconds with all that it imports) of what a fresh worker loads, and then of these modules."""
    command = [sys.executable, "-X", "importtime", "-c", _PROGRAM, json.dumps([sys.path, list(names)])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    return [(found[2], int(found[1]) / 1e6) for found in map(_LINE.match, done.stderr.splitlines()) if found]
