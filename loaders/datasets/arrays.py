"""Samples from arrays in memory or in memory-mapped `.npy` files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loaders.datasets.protocol import IndexedDataset
from loaders.datasets.read_into import checked_rows, owns_read_into, take_rows
from loaders.errors import DatasetError


class ArrayDataset(IndexedDataset):
    """Row i of every field: `ArrayDataset({"image": "images.npy", "label": labels})`.

    Rows are read-only views: nothing is copied, and the dataset cannot be changed through a sample. Copy a row before
    writing to it. (torch's own `default_collate` warns once that it is not writable; `numpy_collate` does not.)

    Args:
        fields: name → array with one row per sample, or the path of a `.npy` file. A file is memory-mapped, and only
            its path is pickled, so workers share its pages with any start method; an array is pickled whole under
            spawn, so pass large ones as files.
        transform: sample → sample, applied to the dict.

    Sample:
        {name: ndarray, or NumPy scalar if the array has one dimension; dtype as stored}

    Raises:
        DatasetError: no fields, fields of different lengths, or a file that is not one array with rows.
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray | str | os.PathLike[str]],
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform)
        self.fields = dict(fields)
        self._opened: dict[str, np.ndarray] | None = None
        lengths = {name: len(array) for name, array in self._arrays().items()}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{name!r} has {length:,}" for name, length in lengths.items()) or "there are none"
            raise DatasetError(f"All fields of a dataset must have one row per sample: {found}.")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self._arrays().items()}

    @property
    def read_rows_into(self) -> Callable[[Sequence[int], dict[str, Any]], None]:
        """`read_rows_into(indices, out)` writes several samples into the arrays of `out`, with one row for each.

        It exists without a transform. A subclass that overrides the indexing has none.

        Raises:
            AttributeError: it does not exist.
        """
        if self.transform is None and owns_read_into(type(self), "read_rows_into"):
            return self._read_rows_into
        raise AttributeError(f"this {type(self).__name__} has no read_rows_into: its samples are transformed")

    def _read_rows_into(self, indices: Sequence[int], out: dict[str, Any]) -> None:
        rows = checked_rows(indices, len(self))
        for name, array in self._arrays().items():
            take_rows(array, rows, out[name])

    def _arrays(self) -> dict[str, np.ndarray]:
        if self._opened is None:
            self._opened = {name: _open(name, field) for name, field in self.fields.items()}
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {a.dtype} {a.shape[1:]}" for name, a in self._arrays().items())
        return f"ArrayDataset({len(self):,} samples, {fields})"


def _open(name: str, field: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any]
    if isinstance(field, (str, os.PathLike)):
        try:
            array = np.load(field, mmap_mode="r")
        except (ValueError, EOFError) as error:  # raised by NumPy for another format or a truncated file
            raise DatasetError(
                f"field {name!r}: {os.fspath(field)!r} cannot be mapped as a .npy file: {error}"
            ) from error
        if not isinstance(array, np.ndarray):
            raise DatasetError(
                f"field {name!r}: {os.fspath(field)!r} is an archive; save each array as its own .npy file."
            )
        array = array.view(np.ndarray)
    else:
        array = np.asarray(field).view()
    if array.ndim == 0:
        raise DatasetError(f"field {name!r} is a single value; a field has one row per sample.")
    array.flags.writeable = False
    return array
