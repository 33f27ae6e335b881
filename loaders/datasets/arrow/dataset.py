"""Samples from tables of Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from loaders.datasets.arrow.faults import RowError
from loaders.datasets.image_samples import ImageSamples
from loaders.datasets.protocol import in_range
from loaders.datasets.read_into import checked_rows, owns_read_into
from loaders.errors import DatasetError, MissingExtraError, SampleError, describe_sample
from loaders.images.crops import Crop
from loaders.images.decode import Source, read_image
from loaders.images.multi_crop import MultiCrop
from loaders.timing.stages import READ, count_read

if TYPE_CHECKING:
    from loaders.datasets.arrow.fields import FieldPlan
    from loaders.datasets.arrow.pieces import Piece

_FIELDS_SHOWN = 4


class ArrowDataset(ImageSamples):
    """Row i of a table: `ArrowDataset("train-*.parquet", ["image", "label"], crop=RandomResizedCrop(224))`.

    Nothing is converted. Arrow files are mapped, and numbers are read-only views of Arrow's memory until they are
    written into a batch. Parquet is decoded one row group at a time: in a random order each sample costs a row group
    unless it is kept, so draw from few at a time: `GroupedSampler(dataset.group_sizes)`.

    | Arrow's type | value of the sample |
    | --- | --- |
    | numbers, booleans | NumPy scalar of the same dtype |
    | fixed-size lists and fixed-shape tensors of these | ndarray of that shape |
    | lists of these | ndarray; lists of lists of equal length have more dimensions |
    | dates, times, timestamps, durations | NumPy datetime64 or timedelta64, of UTC; torch has neither: see `dtypes` |
    | decimals | float |
    | dictionary-encoded values | the values, not the codes |
    | strings, binary | str, bytes |
    | structs | dict |
    | lists of strings or structs | list |
    | maps, unions, null | refused |

    Args:
        source: a `pyarrow.Table`, a list of record batches, a `datasets.Dataset` of Hugging Face, or files: a path, a
            glob pattern, or a list of these. Parquet, Arrow (Feather) and streams of Arrow are told apart by their
            content. Files are opened by each worker for itself, and only their paths are pickled.
        columns: the columns to read, in this order; no others are decoded. A mapping gives the fields names, and may
            stack columns of numbers: `{"x": ["age", "height"], "label": "y"}`. None reads all.
        transform: sample → sample, applied to the dict.
        image: the column of encoded images: binary, or a struct with "bytes" and "path". None finds those that Hugging
            Face's `datasets` declared. Images are decoded by `read_image`. A column declared as an image is not decoded
            if another one is named here.
        crop: the region of each image to decode; as in `ImageFiles`.
        normalize: (mean, std), for float32 (3, H, W); as in `ImageFiles`.
        dtypes: field → dtype that its numbers are cast to, as by NumPy's `astype`. Stacked columns otherwise have the
            dtype that NumPy promotes theirs to; dates become integers in their unit.
        nulls: field → the value in place of nulls, also of numbers in lists and tensors of fixed size. A null in any
            other field, or inside a struct or a list of varying length, or in place of a list in another, is an error.
        cache_nbytes: bytes of decoded row groups that each worker keeps, the last ones used. The last one is always
            kept, and another may be in memory while it is decoded.

    Attributes:
        group_sizes: int64, samples per unit of reading, in order: of Parquet the row groups, of compressed Arrow files
            the batches, of compressed streams the whole; a single one where rows are read one by one.

    Sample:
        {field: value as above, image: uint8 (H, W, 3) RGB}

    Raises:
        MissingExtraError: pyarrow is not installed.
        DatasetError: a file cannot be read as a table, columns are missing or of a type that has no form in a sample.
        SampleError: on reading; names the row, its file, and the column that is null, or the row group that is damaged.
        DecodeError: on reading; an image cannot be decoded.
    """

    def __init__(
        self,
        source: Any,
        columns: Iterable[str] | Mapping[str, str | Sequence[str]] | None = None,
        transform: Callable[[Any], Any] | None = None,
        *,
        image: str | None = None,
        crop: Crop | MultiCrop | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        nulls: Mapping[str, Any] | None = None,
        cache_nbytes: int = 256 << 20,
    ) -> None:
        super().__init__(transform, crop, normalize)
        _require_pyarrow()
        from loaders.datasets.arrow.fields import plan_fields
        from loaders.datasets.arrow.sources import source_of

        self._source = source_of(source)
        self._fields = plan_fields(
            self._source.schema,
            self._source.columns if columns is None else columns,
            image,
            self._source.images,
            dict(dtypes or {}),
            dict(nulls or {}),
        )
        self._source.use(self._fields, cache_nbytes)
        self.cache_nbytes = cache_nbytes
        self._images = tuple(field for field in self._fields if field.is_image)
        self._others = tuple(field for field in self._fields if not field.is_image)
        if crop is not None or normalize is not None:
            if len(self._images) != 1:
                found = ", ".join(f'"{field.name}"' for field in self._images) or "none"
                raise DatasetError(
                    f"crop= and normalize= are for one image per sample, and the fields that are images are: {found}.\n"
                    "  Name the column of images with image=."
                )
            self.image_field = self._images[0].name
        self.group_sizes = self._source.units * self._per_file
        self._length = int(self.group_sizes.sum())

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> dict[str, Any]:
        piece, row = self._find(index)
        sample = {field.name: self._value(piece, field, row, index) for field in self._fields}
        for field in self._images:
            encoded = sample[field.name]
            image = read_image(encoded, index=index) if self.crop is None else self.crop.read(encoded, index=index)
            sample[field.name] = image
        return sample

    read_into = ImageSamples.read_into  # `_read` returns what it writes

    def _image_source(self, index: int) -> Source:
        piece, row = self._find(index)
        source: Source = self._value(piece, self._images[0], row, index)
        return source

    def _other_fields(self, index: int) -> dict[str, Any]:
        piece, row = self._find(index)
        return {field.name: self._value(piece, field, row, index) for field in self._others}

    def _others_are_fixed(self) -> bool:
        return all(field.row is not None and field.row[0].kind not in "mM" for field in self._others)

    def _find(self, index: int) -> tuple[Piece, int]:
        try:
            with READ:
                return self._source.find(index // self._per_file)
        except RowError as error:
            raise self._error(error, index) from error

    def _value(self, piece: Piece, field: FieldPlan, row: int, index: int) -> Any:
        try:
            value = piece.value(field, row)
        except RowError as error:
            raise self._error(error, index) from error
        if field.is_image and isinstance(value, memoryview):
            count_read(value.nbytes)
        return value

    def _error(self, error: RowError, index: int) -> SampleError:
        source = self.describe(index)
        where = "" if error.field is None else f', field "{error.field}"'
        told = f"{describe_sample(index, source)}{where}: {error}"
        return SampleError(told, index=index, source=source or None, field=error.field)

    @property
    def read_rows_into(self) -> Callable[[Sequence[int], dict[str, Any]], None]:
        """`read_rows_into(indices, out)` writes several samples into the arrays of `out`, with one row for each.

        It exists without a transform, where all fields are numbers of fixed shape. A subclass that overrides the
        indexing has none.

        Raises:
            AttributeError: it does not exist.
        """
        is_plain = self.transform is None and not self._images and self._others_are_fixed()
        if is_plain and owns_read_into(type(self), "read_rows_into"):
            return self._read_rows_into
        raise AttributeError(f"this {type(self).__name__} has no read_rows_into: not all of its fields are numbers")

    def _read_rows_into(self, indices: Sequence[int], out: dict[str, Any]) -> None:
        rows = checked_rows(indices, len(self))
        for field in self._fields:
            place = out[field.name]
            if field.row != (place.dtype, place.shape[1:]):
                raise TypeError(f"field {field.name!r} has rows of {field.row}, not {place.dtype} {place.shape[1:]}")
        self._source.take(rows, out)

    def describe(self, index: SupportsIndex) -> str:
        """The file of a sample and its row there; empty for tables in memory."""
        return self._source.name(in_range(index, len(self)) // self._per_file)

    def __repr__(self) -> str:
        names = [field.name for field in self._fields]
        shown = ", ".join(names[:_FIELDS_SHOWN]) + (", …" if len(names) > _FIELDS_SHOWN else "")
        units = "" if len(self.group_sizes) == 1 else f" in {len(self.group_sizes):,} groups"
        return f"ArrowDataset({len(self):,} samples{units}: {shown})"


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401  only whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "ArrowDataset needs pyarrow, which is missing: pip install 'loaders[arrow]'."
        ) from error
