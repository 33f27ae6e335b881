"""Exceptions of the user's code, on their way from a worker to the caller; and the list of those a policy let pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loaders.engines.work import Failure
from loaders.errors import SampleError, describe_sample


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is missing from an epoch because `on_error` said so.

    Attributes:
        index: what the dataset was asked for.
        source: what the dataset says the sample is, usually its path.
        error: one line: the exception's type and message.
    """

    index: Any
    source: str | None
    error: str


def skipped(failure: Failure) -> SkippedSample:
    """The entry for the loader's list of errors."""
    lines = failure.text.strip().splitlines() or [str(failure.error)]
    return SkippedSample(failure.key, failure.source, lines[-1])


def exception_of(failure: Failure, worker: int | None) -> BaseException:
    """What to raise: the user's exception, of its own type where it could be rebuilt, naming the sample.

    Its `__cause__` is a SampleError with the worker's traceback; `worker` is None where there is none apart.
    """
    error = failure.error
    name = describe_sample(failure.key, failure.source) if failure.row is not None else ""
    where = f"while {failure.doing}{f' {name}' if name else ''}{f' in worker {worker}' if worker is not None else ''}"
    index = failure.key if isinstance(failure.key, int) else None
    cause = SampleError(f"{where}:\n{failure.text}".rstrip(), index=index, source=failure.source)
    if error is None or isinstance(error, StopIteration):
        # A StopIteration that went on from here would end the epoch in silence.
        error = SampleError(f"{_last_line(failure)}\n  {where}", index=index, source=failure.source)
    elif not isinstance(error, SampleError):
        _say_where(error, where)
    if worker is not None or error is not failure.error:
        error.__cause__ = cause
    return error


def _last_line(failure: Failure) -> str:
    lines = failure.text.strip().splitlines()
    return lines[-1] if lines else failure.kind


def _say_where(error: BaseException, where: str) -> None:
    """Add to the message what was being read, where the exception's message is one plain string; else as a note."""
    if type(error).__str__ in (Exception.__str__, BaseException.__str__) and len(error.args) <= 1:
        message = str(error.args[0]) if error.args else type(error).__name__
        error.args = (f"{message}\n  {where}",)
    elif hasattr(error, "add_note"):
        error.add_note(where)
