"""Files of Arrow's own format: mapped as a whole, unless they are compressed; then their batches are units of reading.

Feather files, and the files of Hugging Face's `datasets`, are such files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

MAGIC = b"ARROW1"


def scan(path: str) -> tuple[Any, list[int], bool]:
    """The schema of a file, the rows of each unit of reading, and whether they are mapped.

    A file that is mapped is one unit, and so is a stream.
    """
    memory, base = _mapped(path)
    if not _is_file(memory):
        table = _stream(memory).read_all()
        return table.schema, [table.num_rows], all(_lies_in(base, batch) for batch in table.to_batches())
    reader = pa.ipc.open_file(memory)
    count = reader.num_record_batches
    if _is_mapped(base, reader):
        return reader.schema, [sum(reader.get_batch(number).num_rows for number in range(count))], True
    # With one column only, the cheapest way to the number of rows.
    one = pa.ipc.open_file(memory, options=pa.ipc.IpcReadOptions(included_fields=[_narrowest(reader.schema)]))
    return reader.schema, [one.get_batch(number).num_rows for number in range(count)], False


class IpcReader:
    """An Arrow file that is mapped.

    Args:
        path: of the file.
        columns: to read.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._memory, self._base = _mapped(path)
        self._reader: Any = None
        self._is_whole = True
        if _is_file(self._memory):
            self._reader = pa.ipc.open_file(self._memory)
            self._is_whole = _is_mapped(self._base, self._reader)
            if not self._is_whole:
                fields = sorted({self._reader.schema.get_field_index(name) for name in columns})
                options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
                self._reader = pa.ipc.open_file(self._memory, options=options)

    def read(self, unit: int) -> tuple[Any, int]:
        """The table of a unit of reading, and its bytes in memory that are not those of the file."""
        if not self._is_whole:
            table = pa.Table.from_batches([self._reader.get_batch(unit)])
            table.validate(full=True)  # nothing else checks what was decompressed
            return table, table.get_total_buffer_size()
        whole = (self._reader or _stream(self._memory)).read_all()
        is_mapped = all(_lies_in(self._base, batch) for batch in whole.to_batches())
        whole.validate(full=not is_mapped)  # of mapped columns, the offsets are checked when they are read
        return whole.select(self._columns), 0 if is_mapped else whole.get_total_buffer_size()

    def close(self) -> None:
        """Drop it; its pages stay mapped while arrays over them are in use."""
        self._reader = self._memory = None


def _mapped(path: str) -> tuple[Any, tuple[int, int]]:
    """All bytes of a file, as a buffer, and the addresses between which they lie."""
    with pa.memory_map(path) as file:
        buffer = file.read_buffer(file.size())
    return buffer, (buffer.address, buffer.address + buffer.size)


def _is_file(memory: Any) -> bool:
    return bool(memory.slice(0, len(MAGIC)).to_pybytes() == MAGIC)


def _stream(memory: Any) -> Any:
    return pa.ipc.open_stream(memory, options=pa.ipc.IpcReadOptions(use_threads=False))


def _is_mapped(base: tuple[int, int], reader: Any) -> bool:
    """Whether the batches of a file are not compressed: the first one that has rows shows it."""
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        if batch.num_rows:
            return _lies_in(base, batch)
    return True


def _lies_in(base: tuple[int, int], batch: Any) -> bool:
    """Whether the memory of a batch is that of the file."""
    buffers = [buffer for column in batch.columns for buffer in _buffers(column) if buffer is not None and buffer.size]
    return all(base[0] <= buffer.address < base[1] for buffer in buffers)


def _buffers(array: Any) -> list[Any]:
    found: list[Any] = array.buffers()
    return found if not isinstance(array, pa.DictionaryArray) else found[:2]


def _narrowest(schema: Any) -> int:
    """The column whose values are smallest."""
    widths = [field.type.bit_width if pa.types.is_primitive(field.type) else 1 << 20 for field in schema]
    return widths.index(min(widths)) if widths else 0
