"""`read_rows_into`: many rows of numbers are written by one call, with the values of indexing."""

from __future__ import annotations

import os
import pickle
import signal
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from loaders import ArrayDataset, ArrowDataset, DataLoader, SampleError, WorkerLostError

ROWS = 40


def numbers(rows=ROWS):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.random((rows, 3)).astype(np.float32),
        "label": rng.integers(0, 9, rows),
        "image": rng.integers(0, 256, (rows, 40, 50, 3), np.uint8),
        "fortran": np.asfortranarray(rng.random((rows, 5))),
        "bit": rng.random(rows) > 0.5,
    }
    return arrays


def table(rows=ROWS):
    arrays = numbers(rows)
    del arrays["fortran"]
    columns = {
        name: pa.FixedShapeTensorArray.from_numpy_ndarray(array) if array.ndim > 1 else pa.array(array)
        for name, array in arrays.items()
    }
    return pa.table(columns)


def sources(tmp_path):
    whole = table()
    pq.write_table(whole, tmp_path / "a.parquet", row_group_size=7)
    yield ArrayDataset(numbers())
    yield ArrowDataset(whole)
    yield ArrowDataset(pa.concat_tables([whole.slice(0, 13), whole.slice(13, 1), whole.slice(14)]))
    yield ArrowDataset(tmp_path / "a.parquet")
    yield ArrowDataset(whole, {"z": ["label", "bit"], "x": "x"}, dtypes={"z": "float32", "x": "float64"})


def together(dataset, indices):
    first = dataset[0]
    out = {n: np.zeros((len(indices), *np.shape(v)), np.asarray(v).dtype) for n, v in first.items()}
    dataset.read_rows_into(indices, out)
    return out


def test_the_rows_are_those_of_indexing(tmp_path):
    indices = [5, 39, 5, 0, -1, 13, 12, 14, 7, 6]
    for dataset in sources(tmp_path):
        out = together(dataset, indices)
        for name, rows in out.items():
            np.testing.assert_array_equal(rows, [dataset[index][name] for index in indices])


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, ROWS), max_size=6),
    indices=st.lists(st.integers(-ROWS, ROWS - 1), min_size=1, max_size=30),
    skip=st.integers(0, 9),
)
def test_any_division_into_chunks_gives_the_same_rows(cuts, indices, skip):
    whole = table(ROWS + skip).slice(skip)
    cuts = [0, *sorted(cuts), ROWS]
    parts = [whole.slice(start, stop - start) for start, stop in pairwise(cuts)]
    dataset = ArrowDataset(pa.concat_tables(parts))
    expected = {name: array[skip:] for name, array in numbers(ROWS + skip).items() if name != "fortran"}
    for name, rows in together(dataset, indices).items():
        np.testing.assert_array_equal(rows, expected[name][indices])


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_write_whole_spans(tmp_path, workers):
    for dataset in sources(tmp_path):
        loader = DataLoader(dataset, 8, shuffle=True, num_workers=workers, return_index=True, seed=1)
        for batch, indices in loader:
            for name, rows in batch.items():
                expected = np.stack([dataset[int(index)][name] for index in indices])
                np.testing.assert_array_equal(rows.numpy(), expected)


def test_it_is_called_for_a_subset_but_not_where_it_would_miss_something(monkeypatch):
    asked = []
    read = ArrayDataset._read_rows_into
    monkeypatch.setattr(
        ArrayDataset, "_read_rows_into", lambda self, i, out: asked.append(len(i)) or read(self, i, out)
    )
    arrays = {"x": np.arange(12.0)}

    class Doubled(ArrayDataset):
        def __getitem__(self, index):
            return {"x": super().__getitem__(index)["x"] * 2}

    for dataset, expected in [
        (ArrayDataset(arrays), arrays["x"]),
        (Subset(ArrayDataset(arrays), range(11, -1, -1)), arrays["x"][::-1]),
        (Doubled(arrays), 2 * arrays["x"]),
        (ArrayDataset(arrays, transform=lambda sample: {"x": sample["x"] + 1}), arrays["x"] + 1),
        (ConcatDataset([ArrayDataset({"x": arrays["x"][:5]}), ArrayDataset({"x": arrays["x"][5:]})]), arrays["x"]),
    ]:
        asked.clear()
        batches = list(DataLoader(dataset, 4))
        np.testing.assert_array_equal(torch.cat([batch["x"] for batch in batches]), expected)
        assert bool(asked) is (type(dataset) in (Subset, ArrayDataset) and getattr(dataset, "transform", None) is None)


def test_an_error_in_a_span_names_its_own_sample():
    rows = pa.table({"x": pa.array([None if row == 21 else float(row) for row in range(ROWS)])})
    with pytest.raises(SampleError, match='sample 21, field "x": column "x" is null'):
        list(DataLoader(ArrowDataset(rows), 16))
    loader = DataLoader(ArrowDataset(rows), 16, on_error="skip")
    assert torch.cat([batch["x"] for batch in loader]).tolist() == [row for row in range(ROWS) if row != 21]
    assert [each.index for each in loader.errors] == [21]


class Deadly(ArrayDataset):
    """Reading row 13 ends the process."""

    def __getitem__(self, index):
        if index == 13:
            os._exit(1)
        return super().__getitem__(index)

    def read_rows_into(self, indices, out):
        if 13 in indices:
            os._exit(1)
        self._read_rows_into(indices, out)


def test_a_row_that_ends_the_worker_is_found_among_those_written_together():
    dataset = Deadly({"x": np.arange(ROWS)})
    with pytest.raises(WorkerLostError, match="sample 13") as caught:
        list(DataLoader(dataset, 32, num_workers=1, multiprocessing_context="fork"))
    assert caught.value.index == 13
    loader = DataLoader(dataset, 32, num_workers=1, multiprocessing_context="fork", on_error="skip")
    assert torch.cat([batch["x"] for batch in loader]).tolist() == [row for row in range(ROWS) if row != 13]


class KilledOnce(ArrowDataset):
    """The worker that first writes several rows together is killed behind it."""

    def __init__(self, source, flag):
        super().__init__(source)
        self.flag = flag

    def read_rows_into(self, indices, out):
        self._read_rows_into(indices, out)
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["table", "parquet"])
def test_a_worker_killed_while_it_writes_rows_together_changes_no_batch(tmp_path, kind):
    source = table()
    if kind == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(table(), source, row_group_size=7)
    options = {"batch_size": 16, "shuffle": True, "seed": 5}
    expected = list(DataLoader(ArrowDataset(source), **options))
    killed = KilledOnce(source, tmp_path / "flag")
    found = list(DataLoader(killed, **options, num_workers=2, multiprocessing_context="fork"))
    assert killed.flag.exists()
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


class Refusing(ArrayDataset):
    """`read_rows_into` always fails; the samples can be read."""

    def read_rows_into(self, indices, out):
        raise RuntimeError("no memory for that")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_no_sample_has_is_told_once(workers):
    loader = DataLoader(Refusing({"x": np.arange(ROWS)}), 8, num_workers=workers)
    with pytest.warns(UserWarning, match="no memory") as caught:
        found = torch.cat([batch["x"] for _ in range(2) for batch in loader])
    assert found.tolist() == 2 * list(range(ROWS))
    told = [str(each.message) for each in caught]
    assert len(told) == 1
    assert "Refusing.read_rows_into raised RuntimeError('no memory for that'); samples are read one by one." in told[0]


def test_a_source_that_has_become_shorter_is_an_error_and_no_repeated_row(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(20))
    pickled = pickle.dumps(ArrayDataset({"x": path}))
    np.save(path, np.arange(10))
    with pytest.raises(IndexError, match="there is no row 15: the array has 10"):
        pickle.loads(pickled).read_rows_into([3, 15], {"x": np.zeros(2, np.int64)})


def test_rows_behind_the_end_of_a_column_are_an_error():
    dataset = ArrowDataset(pa.table({"x": np.arange(20)}))
    dataset._source._source = pa.table({"x": np.arange(20)}).slice(0, 10)  # as one that is opened again by its path
    with pytest.raises(IndexError, match="there is no row 15: the table has 10"):
        dataset.read_rows_into([3, 15], {"x": np.zeros(2, np.int64)})
    with pytest.raises(IndexError, match="there is no row 15: the table has 10"):
        dataset[15]


def test_indices_are_checked():
    dataset = ArrayDataset({"x": np.arange(3)})
    for indices, error in (([3], IndexError), ([-4], IndexError), ([0.5], TypeError), (["a"], TypeError)):
        with pytest.raises(error):
            dataset.read_rows_into(indices, {"x": np.zeros(1, np.int64)})
    for out in (np.zeros(1, np.int32), np.zeros((1, 2), np.int64)):
        with pytest.raises((TypeError, ValueError)):
            dataset.read_rows_into([0], {"x": out})


class Noise:
    """Samples that are random, although `read_rows_into` has no one sample to key them by."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"x": np.random.random(2) + index}

    def read_rows_into(self, indices, out):
        out["x"][...] = np.random.random((len(indices), 2)) + np.asarray(indices)[:, None]


def test_samples_that_draw_are_read_one_by_one_each_with_its_key():
    plain = [{"x": batch["x"].clone()} for batch in DataLoader(Noise(), batch_size=8, seed=3)]
    for workers in (1, 2):
        found = list(DataLoader(Noise(), batch_size=8, seed=3, num_workers=workers))
        assert all(torch.equal(mine["x"], other["x"]) for mine, other in zip(found, plain, strict=True))
