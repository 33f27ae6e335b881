"""Datasets of Hugging Face: unchanged in a loader, and through `ArrowDataset` with equal values."""

from __future__ import annotations

import io
import os
import pickle

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from support.photo_zoo import jpeg, photo

from loaders import ArrowDataset, CenterCrop, DataLoader, numpy_collate, read_image

datasets = pytest.importorskip("datasets", reason="an extra of the tests")
ROWS = 30


def rows(first=0, count=ROWS):
    numbers = range(first, first + count)
    return {
        "x": [[number + 0.5, -number] for number in numbers],
        "label": [number % 3 for number in numbers],
        "ids": [list(range(number % 4)) for number in numbers],
        "matrix": [[[number, 1], [2, 3]] for number in numbers],
        "name": [f"row {number}" for number in numbers],
        "box": [{"at": [1.0, number], "size": number} for number in numbers],
    }


def features():
    value = datasets.Value
    return datasets.Features(
        {
            "x": datasets.Sequence(value("float32"), length=2),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "ids": datasets.Sequence(value("int64")),
            "matrix": datasets.Array2D((2, 2), "int32"),
            "name": value("string"),
            "box": {"at": datasets.Sequence(value("float64")), "size": value("int16")},
        }
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dataset on disk, in several batches; mapped when it is loaded."""
    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_dict(rows(), features(), info=None)
    whole.save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


VIEWS = {
    "as it is": lambda dataset: dataset,
    "shuffled": lambda dataset: dataset.shuffle(seed=1, keep_in_memory=True),
    "filtered": lambda dataset: dataset.filter(lambda row: row["label"] != 1, keep_in_memory=True),
    "selected": lambda dataset: dataset.select([4, 4, 29, 0]),
    "a range": lambda dataset: dataset.select(range(3, 17)),
    "one shard": lambda dataset: dataset.shard(4, 1),
    "joined": lambda dataset: datasets.concatenate_datasets([dataset.select([3, 1, 2]), dataset]),
    "renamed": lambda dataset: dataset.rename_column("x", "vector").remove_columns("name"),
    "in memory": lambda dataset: datasets.Dataset.from_dict(dataset[5:11], features()),
    "formatted": lambda dataset: dataset.with_format("numpy", columns=["x", "label"]),
    "transformed": lambda dataset: dataset.with_transform(lambda rows: {"nothing": rows["label"]}),
}


def plain(value):
    """A value as Python's own numbers, lists and dicts."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.mark.parametrize("view", VIEWS)
def test_values_equal_those_of_indexing(saved, view):
    source = VIEWS[view](saved)
    dataset = ArrowDataset(source)
    reference = source.with_format(None)
    if view == "formatted":
        reference = reference.select_columns(["x", "label"])
    assert len(dataset) == len(source)
    for row in range(len(dataset)):
        assert plain(dataset[row]) == reference[row]
    copy = pickle.loads(pickle.dumps(dataset))
    assert plain(copy[1]) == reference[1]


def test_what_is_mapped_is_pickled_by_its_path(tmp_path):
    datasets.Dataset.from_dict({"x": np.zeros((5000, 8), np.float32)}).save_to_disk(tmp_path / "saved")
    dataset = ArrowDataset(datasets.load_from_disk(tmp_path / "saved").shuffle(seed=0, keep_in_memory=True))
    assert len(pickle.dumps(ArrowDataset(datasets.load_from_disk(tmp_path / "saved")))) < 5000
    assert len(pickle.dumps(dataset)) < 5000 * 8 + 10_000  # the order alone


@pytest.mark.parametrize("view", ["as it is", "shuffled", "joined"])
@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_are_written_together_in_the_order_of_the_view(saved, view, workers):
    source = VIEWS[view](saved)
    loader = DataLoader(ArrowDataset(source, ["x", "label"]), 7, num_workers=workers)
    reference = source.with_format("numpy")[:]
    np.testing.assert_array_equal(torch.cat([batch["x"] for batch in loader]), reference["x"])
    np.testing.assert_array_equal(torch.cat([batch["label"] for batch in loader]), reference["label"])


@pytest.mark.parametrize("form", [None, "numpy", "torch", "transform"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_works_unchanged(saved, form, workers):
    def doubled(rows):
        return {"x": [2 * np.float32(x) for x in rows["x"]], "label": rows["label"]}

    columns = saved.select_columns(["x", "label"])
    source = columns.with_transform(doubled) if form == "transform" else columns.with_format(form)
    assert hasattr(source, "__getitems__")
    options = {"batch_size": 8, "shuffle": True}
    ours = DataLoader(source, **options, num_workers=workers, generator=torch.Generator().manual_seed(1))
    theirs = torch.utils.data.DataLoader(source, **options, generator=torch.Generator().manual_seed(1))
    for batch, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["saved", "parquet", "paths"])
def test_images_are_found_by_their_feature_and_decoded_with_a_crop(tmp_path, kind):
    encoded = [jpeg(photo(60 + 2 * row, 50)) for row in range(5)]
    if kind == "paths":
        given = [str(tmp_path / f"{row}.jpg") for row in range(5)]
        for path, data in zip(given, encoded, strict=True):
            with open(path, "wb") as file:
                file.write(data)
    else:
        given = [{"bytes": data, "path": None} for data in encoded]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    source = datasets.Dataset.from_dict({"image": given, "label": list(range(5))}, kinds)
    if kind == "parquet":
        source.to_parquet(tmp_path / "a.parquet")
    files = tmp_path / "a.parquet" if kind == "parquet" else source.select([3, 0, 4])
    order = range(5) if kind == "parquet" else [3, 0, 4]
    dataset = ArrowDataset(files, crop=CenterCrop(24, resize=32))
    whole = ArrowDataset(files)
    for row, original in enumerate(order):
        np.testing.assert_array_equal(whole[row]["image"], read_image(encoded[original]))
        np.testing.assert_array_equal(dataset[row]["image"], CenterCrop(24, resize=32).read(encoded[original]))
        # Pillow and OpenCV contain different builds of libjpeg-turbo.
        theirs = np.asarray(Picture.open(io.BytesIO(encoded[original])).convert("RGB"), np.int16)
        assert abs(theirs - whole[row]["image"]).max() <= 4
    [batch] = DataLoader(dataset, 5, num_workers=2, collate_fn=numpy_collate)
    assert batch["image"].shape == (len(dataset), 24, 24, 3)
    assert batch["label"].tolist() == list(order)
