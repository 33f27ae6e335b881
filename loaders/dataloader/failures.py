"""Exceptions of the user's code, on their way from a worker to the caller."""

from __future__ import annotations

from loaders.errors import SampleError, UserCodeError, add_note, describe_sample, describe_samples
from loaders.workers.messages import Failure


def exception_of(failure: Failure, *, apart: bool) -> BaseException:
    """What to raise: the user's exception, of its own type where it could be rebuilt, naming the sample.

    Its `__cause__` is a SampleError with the worker's traceback, where the work was done `apart` from the consumer.
    """
    # Taken out of the failure: its traceback is going to know the frames that hold the failure, and a cycle would keep
    # them, and the workers of their iterator, until the garbage collector comes by.
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
        # A StopIteration that went on from here would end the epoch in silence.
        error = UserCodeError(f"{failure.summary}\n  {where}", index=index, source=failure.source)
    elif not isinstance(error, SampleError):
        say_more(error, where)
    if apart or not rebuilt:
        error.__cause__ = cause
    return error


def say_more(error: BaseException, line: str) -> None:
    """Add a line to the message, where the exception has just that, a text; else as a note."""
    if type(error).__str__ is Exception.__str__ and len(error.args) == 1 and type(error.args[0]) is str:
        error.args = (f"{error.args[0]}\n  {line}",)
    else:
        add_note(error, line)
