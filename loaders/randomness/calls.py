"""Records what a thread calls while it reads its first samples: stateful transforms and torch's `get_worker_info`."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

from loaders.randomness.signatures import is_stateful


class Called(NamedTuple):
    """A transform that was called.

    Attributes:
        transform: the object.
        where: module, function and line of the caller.
    """

    transform: Any
    where: str


class Calls:
    """Inspects every call of this thread inside a `with` block, by `sys.setprofile` unless a profiler is already set.

    Args:
        watch: False to do nothing.

    Attributes:
        transforms: the stateful ones that were called, except by another one or by one that keys itself.
        asked: the callers of torch's `get_worker_info`.
    """

    def __init__(self, *, watch: bool = True) -> None:
        self._watch = watch
        self.transforms: list[Called] = []
        self.asked: list[str] = []
        self._seen: set[int] = set()
        self._opener: FrameType | None = None
        module = sys.modules.get("torch.utils.data._utils.worker")
        self._get_worker_info: CodeType | None = module.get_worker_info.__code__ if module is not None else None

    def __enter__(self) -> Calls:
        if self._watch and sys.getprofile() is None:
            self._opener = sys._getframe(1)
            sys.setprofile(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        if sys.getprofile() == self._look:
            sys.setprofile(None)
        self._opener = None

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame is self._opener:
            sys.setprofile(None)  # an interrupt came before the block was entered or exited
        if event != "call":
            return
        code = frame.f_code
        if code is self._get_worker_info:
            self.asked.append(_where(frame.f_back))
        elif code.co_name == "__call__":
            called = _first_argument(frame)
            if id(called) not in self._seen and is_stateful(type(called)):
                self._seen.add(id(called))
                if not _is_answered_for(frame.f_back):
                    self.transforms.append(Called(called, _where(frame.f_back)))


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_answered_for(frame: FrameType | None) -> bool:
    """Whether a frame, or one of its callers, belongs to a transform that is keyed or keys itself."""
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            kind = type(_first_argument(frame))
            if is_stateful(kind) or getattr(kind, "keys_itself", False):
                return True
        frame = frame.f_back
    return False


def _where(frame: FrameType | None) -> str:
    if frame is None:
        return "the program"
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name} (line {frame.f_lineno})"
