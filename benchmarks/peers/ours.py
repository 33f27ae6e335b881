"""`loaders.DataLoader`."""

from __future__ import annotations

from typing import Any

from loaders import DataLoader


def make(dataset: Any, **arguments: Any) -> Any:
    return DataLoader(dataset, **arguments)
