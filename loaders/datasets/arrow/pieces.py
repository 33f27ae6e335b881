"""A table in memory, or mapped, and its rows as samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.datasets.arrow.blocks import Indices, Layout
from loaders.datasets.arrow.columns import as_column
from loaders.datasets.arrow.faults import DamagedError, NullError, RaggedError, RowError
from loaders.datasets.arrow.fields import FieldPlan


class Piece:
    """The rows of one table, by number.

    Args:
        table: an Arrow table with the columns of the fields.
        plans: the fields.
    """

    def __init__(self, table: Any, plans: Sequence[FieldPlan]) -> None:
        self._plans = plans
        layouts: dict[bytes, Layout] = {}
        self._columns = {plan.name: as_column(plan, table, layouts) for plan in plans}

    def value(self, plan: FieldPlan, row: int) -> Any:
        """The value of a field; of an image the encoded bytes, or a path.

        Raises:
            RowError: it cannot be read.
        """
        column = self._columns[plan.name]
        try:
            return column.encoded(row) if plan.is_image else column.value(row)
        except NullError as error:
            raise RowError(_null(plan, *error.args), plan.name) from None
        except RaggedError:
            raise RowError(
                f'column "{plan.columns[0]}" has a list of lists of different lengths.\n'
                "  Such a value is no array: flatten it in the table, or leave it out with columns=.",
                plan.name,
            ) from None
        except (DamagedError, UnicodeDecodeError) as error:
            raise RowError(f'column "{plan.columns[0]}" is damaged: {error}.', plan.name) from error

    def take(self, plan: FieldPlan, rows: Indices, out: np.ndarray[Any, Any]) -> None:
        """Write the values of a field of fixed size, in many rows, to `out` (rows, …).

        Raises:
            NullError: one of them is null.
        """
        self._columns[plan.name].take(rows, out)


def _null(plan: FieldPlan, column: str = "") -> str:
    if plan.fill is not None:
        return (
            f'column "{column or plan.columns[0]}": a value inside it is null, and nulls= replaces whole values only.\n'
            "  Fill it in the table."
        )
    remedy = "leave such rows out" if plan.is_image else f'pass nulls={{"{plan.name}": value}} to use a value instead'
    return f'column "{column or plan.columns[0]}" is null, or contains a null.\n  Filter the table, or {remedy}.'
