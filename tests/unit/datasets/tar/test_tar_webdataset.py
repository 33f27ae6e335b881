"""The `webdataset` package and this one agree about the same shards, whichever wrote them."""

from __future__ import annotations

import json
import tarfile
import warnings

import numpy as np
import pytest
import webdataset
from support.photo_zoo import jpeg, photo, zoo
from support.tars import other_entry, write_tar

from loaders import TarFiles


def theirs(shards, **options):
    """All samples, as WebDataset decodes them: pixels by Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings for its shuffling, which is off
        return list(webdataset.WebDataset(shards, shardshuffle=False, **options).decode("rgb8"))


def assert_same_samples(shards, expected):
    """Equal keys, members and values; lossless pixels are equal, those of JPEGs differ by rounding."""
    dataset = TarFiles(shards, {"key": "__key__", "url": "__url__", **members_of(expected[0])})
    assert len(dataset) == len(expected)
    for mine, other in zip(dataset, expected, strict=True):
        assert (mine["key"], mine["url"]) == (other["__key__"], other["__url__"])
        assert {name for name in other if not name.startswith("__")} == set(mine) - {"key", "url"}
        for name in set(mine) - {"key", "url"}:
            if name == "jpg":
                assert mine[name].shape == other[name].shape
                assert np.abs(mine[name].astype(int) - other[name]).max() <= 3
            elif isinstance(mine[name], np.ndarray):
                assert mine[name].dtype == other[name].dtype
                np.testing.assert_array_equal(mine[name], other[name])
            else:
                assert (type(mine[name]), mine[name]) == (type(other[name]), other[name])


def members_of(sample):
    return {name: name for name in sample if not name.startswith("__")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_what_its_shard_writer_wrote_is_read_sample_by_sample(kind, tmp_path):
    rng = np.random.default_rng(0)
    folder = "long/" * (1 if kind == "USTAR_FORMAT" else 30)
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0, format=kind) as writer:
        for number in range(10):
            writer.write(
                {
                    "__key__": f"{folder}{number:04}",
                    "jpg": jpeg(photo(40 + number, 30)),
                    "png": rng.integers(0, 256, (6, 5, 3), np.uint8),
                    "mask.png": rng.integers(0, 256, (6, 5), np.uint8),
                    "cls": number,
                    "json": {"number": number, "name": "größe"},
                    "npy": rng.normal(size=(number % 3, 2)).astype(np.float32),
                    "txt": f"caption {number} ä",
                    "bin": bytes([number]),
                }
            )
    shards = str(tmp_path / "{000..002}.tar")
    expected = theirs(shards)
    assert len(expected) == 10
    assert_same_samples(shards, expected)
    assert TarFiles(shards, {"label": "cls"}).group_sizes.tolist() == [4, 4, 2]


def test_shards_of_the_tar_command_and_odd_names_are_read_alike(tmp_path):
    for number in range(2):
        entries = [
            other_entry("./d.x", tarfile.DIRTYPE),
            other_entry("./d.x/link.jpg", tarfile.SYMTYPE, "0.jpg"),
            ("__about__/0.txt", b"left out by both"),
            ("README", b"no extension"),
            (f"./d.x/{number}.jpg", zoo()["jpeg 420"]),
            (f"./d.x/{number}.CLS", b"5"),
            (f"./d.x/{number}.a.json", json.dumps([number]).encode()),
            (f"./d.x/{number + 1}.jpg", zoo()["jpeg 422"]),
            (f"./d.x/{number + 1}.cls", b" 6\n"),
            (f"./d.x/{number + 1}.a.json", b"{}"),
        ]
        write_tar(tmp_path / f"{number}.tar", entries, kind=tarfile.GNU_FORMAT)
    shards = [str(tmp_path / f"{number}.tar") for number in range(2)]
    expected = theirs(shards)
    assert len(expected) == 4
    assert_same_samples(shards, expected)
