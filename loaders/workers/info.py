"""`worker_info()`, and the record that `torch.utils.data.get_worker_info()` reads."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

# The private module in which torch keeps the record of its own worker: there is no public way to make
# `get_worker_info()` answer.
_TORCH_WORKER = "torch.utils.data._utils.worker"


@dataclass(frozen=True)
class WorkerInfo:
    """The calling worker.

    Attributes:
        id: from 0 to num_workers - 1.
        num_workers: of the loader.
        seed: of this worker, as in torch: the base seed of the loader plus `id`.
        dataset: this worker's copy.
    """

    id: int
    num_workers: int
    seed: int
    dataset: Any


_thread = threading.local()
_process: WorkerInfo | None = None


def worker_info() -> WorkerInfo | None:
    """The calling worker, in a process or a thread of a `loaders.DataLoader`; None outside of a worker."""
    _thread.has_asked = True
    info: WorkerInfo | None = getattr(_thread, "info", None)
    return info or _process


def set_worker_info(info: WorkerInfo, *, process: bool) -> None:
    """Make this process, or only this thread, the worker that `info` describes.

    A process also gets the random states of a torch worker: recipes for `worker_init_fn` rely on them.
    """
    global _process
    if not process:
        # torch's own record is a module global, which cannot differ between threads.
        _thread.info = info
        return
    _process, _thread.info = info, None  # a fork inherits the info of the forking thread
    random.seed(info.seed)
    base = info.seed - info.id
    entropy = np.random.SeedSequence([info.id, base & 0xFFFFFFFF, base >> 32, 0])
    np.random.seed(entropy.generate_state(4))
    module = sys.modules.get(_TORCH_WORKER)
    if module is not None:
        _tell_torch(module, info)
    else:
        sys.meta_path.insert(0, _LateTorch(info))


def forget_questions() -> None:
    """Reset `has_asked`, which then covers only later calls."""
    _thread.has_asked = False


def has_asked() -> bool:
    """Whether this thread has called `worker_info()`."""
    return bool(_thread.has_asked)


def _tell_torch(module: ModuleType, info: WorkerInfo) -> None:
    module._worker_info = module.WorkerInfo(  # type: ignore[attr-defined]  # private, see above
        id=info.id, num_workers=info.num_workers, seed=info.seed, dataset=info.dataset
    )
    # Only the CPU's generator: workers use no devices.
    module.torch.default_generator.manual_seed(info.seed)


class _LateTorch(importlib.abc.MetaPathFinder):
    """Sets torch's record if the user's dataset imports torch later."""

    def __init__(self, info: WorkerInfo) -> None:
        self._info = info

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TORCH_WORKER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute, info = spec.loader.exec_module, self._info

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _tell_torch(module, info)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # only the loader of this one module
        return spec
