"""What happens to samples that fail: `on_error="skip"` and `on_error="substitute"`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loaders.batch.rows import Overflow
from loaders.dataloader.dispatch import Dispatch, OpenBatch, new_ticket
from loaders.dataloader.failures import exception_of, say_more
from loaders.randomness.streams import Domain, KeyedGenerator


class LeftOut:
    """Counts the failures that a policy tolerates, in the order in which a single reader would meet them.

    Args:
        max_errors: how many may occur in a row.
        apart: whether samples are read in workers.
    """

    def __init__(self, max_errors: int, *, apart: bool) -> None:
        self._max_errors = max_errors
        self._apart = apart
        self._in_a_row = 0

    def good(self) -> None:
        """A sample was read."""
        self._in_a_row = 0

    def failed(self, batch: OpenBatch, row: int) -> BaseException | None:
        """List a failed sample. Returns its error if too many have failed in a row."""
        failure = batch.received.failures[row]
        batch.left_out.append((batch.first + row, failure.key, failure.source, failure.summary))
        self._in_a_row += 1
        if self._in_a_row <= self._max_errors:
            return None
        error = exception_of(failure, apart=self._apart)
        say_more(error, f"more than max_errors={self._max_errors} samples failed in a row; loader.errors lists them.")
        return error


def skip_failed(batch: OpenBatch, left_out: LeftOut) -> BaseException | None:
    """List the failed samples of a complete batch, which is delivered without them.

    Returns:
        The error to raise before the batch is delivered, if too many have failed in a row.
    """
    error = None
    for row in range(batch.rows):
        if row in batch.received.failures:
            error = left_out.failed(batch, row) or error
        else:
            left_out.good()
    return error


class Substituting:
    """Reads another sample for every failed row, drawn at random, keyed by the failed sample's position.

    Args:
        dataset: the user's; substitutes are drawn from its whole length.
        by_spans: whether single rows can be read again.
    """

    def __init__(self, dataset: Any, *, by_spans: bool) -> None:
        self._dataset = dataset
        self._by_spans = by_spans

    def replace_failed(self, dispatch: Dispatch, batch: OpenBatch, left_out: LeftOut) -> BaseException | None:
        """Request substitutes for the failed samples of a complete batch, which is then incomplete again.

        Returns:
            The error of the last failed sample, if too many have failed in a row.
        """
        keys, generator = list(batch.task.keys), KeyedGenerator()
        received = batch.received
        # The whole batch first, in later calls only the substitutes: the order in which one reader would meet them.
        for row in batch.replaced or range(batch.rows):
            if row not in received.failures:
                left_out.good()
                continue
            error = left_out.failed(batch, row)
            if error is not None:
                return error
            keys[row] = self._other_key(batch, row, generator)
        if received.broken is not None or not received.failures:
            return None
        batch.replaced = sorted(received.failures)
        received.failures = {}
        if not self._by_spans:
            received.overflow = Overflow()
        dispatch.forget(batch)
        batch.task = replace(batch.task, ticket=new_ticket(), keys=keys, attempt=batch.task.attempt + 1)
        dispatch.submit(batch, [(row, row + 1) for row in batch.replaced] if self._by_spans else [(0, len(keys))])
        return None

    def _other_key(self, batch: OpenBatch, row: int, generator: KeyedGenerator) -> Any:
        task = batch.task
        position = task.position + row * task.stride
        draw = generator.rekey(Domain.SUBSTITUTE, task.seed, task.epoch, position, task.attempt)
        if type(task.keys[row]) is int and hasattr(self._dataset, "__len__"):
            return int(draw.integers(len(self._dataset)))
        return task.keys[int(draw.integers(len(task.keys)))]
