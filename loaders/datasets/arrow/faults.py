"""Why a value cannot be read; `ArrowDataset` raises a `SampleError` with the reason."""

from __future__ import annotations


class RowError(Exception):
    """A value, or the unit of reading that it is in, cannot be read.

    Args:
        message: says why, and names the column or the unit.
        field: of the value; None if all fields are affected.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NullError(Exception):
    """A value is null, or contains a null. The argument is the column, if it is known."""


class RaggedError(Exception):
    """The lists inside a list differ in length, so they are no array."""


class DamagedError(Exception):
    """The offsets of a value lie outside its column."""
