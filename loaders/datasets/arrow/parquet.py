"""Parquet files: their row groups are the units of reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
# What pyarrow raises for damaged files; some of its errors are plain OSError, ValueError or TypeError. Sizes that are
# damaged give its own ArrowMemoryError: Python's MemoryError is no fault of a file.
ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)


def scan(path: str) -> tuple[Any, list[int], bool]:
    """The schema of a file, the rows of each row group, and that they are not mapped."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return file.schema_arrow, rows, False


class ParquetReader:
    """An open Parquet file.

    Args:
        path: of the file.
        columns: to decode.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        # Pages with a checksum are checked. Not mapped: a file that becomes shorter is an error, not a signal.
        self._file = pq.ParquetFile(path, memory_map=False, pre_buffer=False, page_checksum_verification=True)

    def read(self, group: int) -> tuple[Any, int]:
        """The table of a row group, and its bytes in memory."""
        # The workers are the parallelism.
        table = self._file.read_row_group(group, columns=self._columns, use_threads=False)
        return table, table.get_total_buffer_size()

    def close(self) -> None:
        """Close it."""
        self._file.close()
