"""What a map-style `datasets.Dataset` of Hugging Face consists of."""

from __future__ import annotations

from typing import Any


def is_huggingface(source: Any) -> bool:
    """Whether it is a `datasets.Dataset`; found by its name, so that `datasets` need not be installed."""
    return any(
        kind.__module__ == "datasets.arrow_dataset" and kind.__qualname__ == "Dataset" for kind in type(source).__mro__
    )


def unformatted(source: Any) -> Any:
    """The same dataset without its format or transform, which pickles as little as it can: names of mapped files."""
    return source.with_format(None)


def table_of(source: Any) -> Any:
    """Its Arrow table; mapped, if it was loaded from files."""
    return source.data.table


def order_of(source: Any) -> Any:
    """The rows of the table that are its samples, in order, as a table with one column; None for all in order."""
    # A filter or a shuffle leaves the table as it is. There is no public name for this.
    indices = source._indices
    return None if indices is None else indices.table


def columns_of(source: Any) -> list[str]:
    """The columns that indexing returns."""
    names: list[str] = list(source.format["columns"])
    return names


def images_of(source: Any) -> list[str]:
    """The columns that indexing decodes as images."""
    features = source.features
    return [name for name, each in features.items() if type(each).__name__ == "Image" and each.decode]
