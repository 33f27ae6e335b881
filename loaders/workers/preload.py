"""What the fork server imports when it starts, so that no worker forked from it has to.

A worker under "forkserver" imports what its dataset needs, in each worker anew, unless the server has it already. The
consumer knows these modules, since it has imported them itself. The server learns their names through the environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from types import ModuleType
from typing import Any

from loaders.workers.messages import Job

_NAMES = "LOADERS_PRELOAD"
_MAIN = "loaders.workers.process_main"  # and with it what every worker needs


def start_server(job: Job) -> None:
    """Start the fork server, which then imports what the workers of this job need, unless it runs already."""
    server = forkserver._forkserver
    if getattr(server, "_forkserver_pid", None) is None:
        wanted = list(getattr(server, "_preload_modules", ["__main__"]))
        if __name__ not in wanted:
            forkserver.set_forkserver_preload([*wanted, __name__])
        os.environ[_NAMES] = json.dumps({"path": sys.path, "modules": [_MAIN, *sorted(modules_of(job))]})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(_NAMES, None)


def modules_of(job: Job) -> set[str]:
    """The modules that the classes and functions of a job come from, and those that the main program uses."""
    found = set(_modules([job.dataset, *_attributes(job.dataset), job.collate, job.init]))
    main = sys.modules.get("__main__")
    if getattr(main, "__file__", None) is not None:  # a worker imports it again
        found |= set(_modules(vars(main).values()))
    return {name for name in found if name in sys.modules and name not in ("__main__", "builtins")}


def _attributes(value: Any) -> Iterable[Any]:
    return getattr(value, "__dict__", {}).values()


def _modules(values: Iterable[Any]) -> Iterator[str]:
    for value in list(values):
        if isinstance(value, ModuleType):
            yield value.__name__
        else:
            for each in (value, type(value)):
                name = getattr(each, "__module__", None)
                if isinstance(name, str):
                    yield name


def _import_all(path: list[str], modules: list[str]) -> None:
    before, sys.path[:] = list(sys.path), path
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit):  # the worker that needs it reports the error
            continue
    sys.path[:] = before


# In the server.
if _NAMES in os.environ:
    _import_all(**json.loads(os.environ.pop(_NAMES)))
