"""The benchmark of prepared JPEGs, on few and small photos: all peers see parts of the same pictures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from benchmarks import patches
from loaders.images.decode import files
from loaders.images.decode.restart_index import RestartIndex


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "_LARGE", (500, 500))
        patch.setattr(patches, "_COUNTS", {"patches": 2, "recipe": 3})
        patches.write_photos(found)
    return found


def test_both_kinds_of_file_hold_the_same_pixels_and_one_has_an_index(folder):
    for work, count in (("patches", 2), ("recipe", 3)):
        originals = sorted((folder / work / "original").glob("*.jpg"))
        assert len(originals) == count == len(RestartIndex(str(folder / work / "prepared")))
        for original in originals:
            prepared = cv2.imread(str(folder / work / "prepared" / original.name))
            np.testing.assert_array_equal(prepared, cv2.imread(str(original)))


@pytest.mark.parametrize("work", patches.WORKS)
@pytest.mark.parametrize("peer", patches.PEERS)
def test_every_peer_runs(folder, peer, work, monkeypatch):
    threads = torch.get_num_threads()
    try:
        figures = patches.through_loader(peer, work, str(folder), samples=5 * patches.BATCH, workers=1)
    finally:
        torch.set_num_threads(threads)
    assert figures["samples_per_s"] > 0


def test_the_bytes_of_patches_are_counted(folder, monkeypatch):
    monkeypatch.setattr(files._LocalFile, "read_parts", files._LocalFile.read_parts)  # so that it is put back
    taken = patches.bytes_of_patches(str(folder), 20)
    assert 0 < taken["share"] <= taken["largest_share"] < 1
    assert 0 < taken["grown"] < 0.1
    assert 0 < taken["index_share"] < 0.1
