"""Photographs for every test that needs some, cut once a session; nothing is written to the user's own cache."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import waiting

# Albumentations asks a server for its newest version when it is imported, also in the processes that tests start.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _a_module_leaves_no_worker() -> Iterator[None]:
    # Many tests collect garbage. What the imports and the modules before left is none, and is not searched each time.
    gc.collect()
    gc.freeze()
    yield
    waiting.assert_no_workers()


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for $XDG_CACHE_HOME in which the demo's photographs are cut."""
    from examples.demo.photos import demo_photos

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        demo_photos()
    return cache


@pytest.fixture(scope="session")
def few_photos(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the demo's classes with 24 training and 8 validation photographs each: train/<class>, val/<class>."""
    photos = next(demo_cache.glob("loaders/*/photos"))
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 24), ("val", 8)):
        for name in ("coffee", "galaxies", "pagoda"):
            (folder / split / name).mkdir(parents=True)
            for file in sorted((photos / split / name).iterdir())[:count]:
                shutil.copy(file, folder / split / name)
    return folder
