"""Rebuilds exceptions of user code, which workers report, for the caller."""

from __future__ import annotations

from loaders.errors import SampleError, UserCodeError, add_note, describe_sample, describe_samples
from loaders.workers.messages import Failure


def exception_of(failure: Failure, *, apart: bool) -> BaseException:
    """The exception to raise: the user's, of its own type where it could be rebuilt, naming the sample.

    Its `__cause__` is a SampleError with the original traceback if the exception could not be rebuilt, or if the work
    was done `apart` from the consumer.
    """
    # Removed from the failure: the traceback will refer to frames that hold the failure, and the cycle would keep them,
    # and the workers of their iterator, alive until the garbage collector runs.
    error, failure.error = failure.error, None
    rebuilt = error is not None and not isinstance(error, StopIteration)
    where = f"while {failure.doing}"
    if failure.row is not None:
        where += f" {describe_sample(failure.key, failure.source)}"
    elif isinstance(failure.key, list):
        where += f" {describe_samples(failure.key)}"
    if apart:
        where += f" in worker {failure.worker}"
    index = failure.key if isinstance(failure.key, int) else None
    cause = SampleError(f"{where}:\n{failure.text}".rstrip(), index=index, source=failure.source)
    if error is None or not rebuilt:
        # A StopIteration raised to the caller would silently end the epoch.
        error = UserCodeError(f"{failure.summary}\n  {where}", index=index, source=failure.source)
    elif not isinstance(error, SampleError):
        say_more(error, where)
    if apart or not rebuilt:
        error.__cause__ = cause
    return error


def say_more(error: BaseException, line: str) -> None:
    """Append a line to the message if the exception has one string argument; else add it as a note."""
    if type(error).__str__ is Exception.__str__ and len(error.args) == 1 and type(error.args[0]) is str:
        error.args = (f"{error.args[0]}\n  {line}",)
    else:
        add_note(error, line)
