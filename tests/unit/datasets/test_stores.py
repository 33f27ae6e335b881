"""HDF5, LMDB, SQLite and Zarr through `PerWorker`: right values in forked workers after the parent has read."""

from __future__ import annotations

import sqlite3
from functools import partial

import numpy as np
import pytest

from loaders import DataLoader, PerWorker
from loaders.doctor.open_files import check_open_files

ROWS = 48


def row(index):
    return np.arange(index, index + 50, dtype=np.int32)


class Stored:
    """Samples of `read(handle, index)`."""

    def __init__(self, handle, read):
        self.handle, self.read = handle, read

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"x": self.read(self.handle(), index), "index": index}


def hdf5(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset(
            "x", data=np.stack([row(index) for index in range(ROWS)]), chunks=(5, 50), compression="gzip"
        )
    return PerWorker(h5py.File, folder / "rows.h5"), lambda file, index: file["x"][index]


def lmdb(folder):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder / "rows.lmdb"), map_size=1 << 24) as database, database.begin(write=True) as writing:
        for index in range(ROWS):
            writing.put(f"{index}".encode(), row(index).tobytes())

    def read(database, index):
        with database.begin(buffers=True) as reading:
            return np.frombuffer(reading.get(f"{index}".encode()), np.int32).copy()

    opening = partial(lmdb.open, readonly=True, lock=False, readahead=False)
    return PerWorker(opening, str(folder / "rows.lmdb"), once_per_process=True), read


def sqlite(folder):
    with sqlite3.connect(folder / "rows.db") as database:
        database.execute("create table rows (id integer primary key, x blob)")
        database.executemany("insert into rows values (?, ?)", [(i, row(i).tobytes()) for i in range(ROWS)])
    database.close()

    def read(database, index):
        [found] = database.execute("select x from rows where id = ?", (index,)).fetchone()
        return np.frombuffer(found, np.int32)

    return PerWorker(sqlite3.connect, folder / "rows.db"), read


def zarr(folder):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(folder / "rows.zarr", shape=(ROWS, 50), chunks=(5, 50), dtype=np.int32)
    array[:] = np.stack([row(index) for index in range(ROWS)])
    return PerWorker(partial(zarr.open_array, mode="r"), folder / "rows.zarr"), lambda array, index: array[index]


@pytest.mark.parametrize("method", ["fork", "thread"])
@pytest.mark.parametrize("store", [hdf5, lmdb, sqlite, zarr])
def test_two_workers_read_right_values_after_the_parent_has_read(tmp_path, store, method):
    dataset = Stored(*store(tmp_path))
    np.testing.assert_array_equal(dataset[7]["x"], row(7))
    options = {"worker_method": "thread"} if method == "thread" else {"multiprocessing_context": "fork"}
    loader = DataLoader(dataset, 6, shuffle=True, num_workers=2, **options)
    for _ in range(2):
        for batch in loader:
            np.testing.assert_array_equal(batch["x"], [row(index) for index in batch["index"].tolist()])
        np.testing.assert_array_equal(dataset[9]["x"], row(9))
    assert check_open_files(dataset).severity == "fine"


@pytest.mark.parametrize("store", [hdf5, lmdb, sqlite])
def test_the_doctor_finds_the_same_handle_held_openly(tmp_path, store):
    dataset = Stored(*store(tmp_path))
    opened = dataset.handle()
    kind = {hdf5: "h5py.File", lmdb: "Environment", sqlite: "sqlite3.Connection"}[store]
    for held in (opened, [opened], {"train": (1, opened)}, Stored(opened, None)):
        finding = check_open_files(Stored(held, dataset.read))
        assert finding.severity == "problem"
        assert f"is an open {kind}" in finding.what
        assert "loaders.PerWorker(open, path)" in finding.remedy
    opened.close()


@pytest.mark.parametrize("store", [hdf5, lmdb, sqlite])
def test_the_doctor_passes_over_handles_that_are_closed(tmp_path, store):
    dataset = Stored(*store(tmp_path))
    opened = dataset.handle()
    opened.close()
    assert check_open_files(Stored(opened, None)).severity == "fine"


def test_the_doctor_passes_over_closed_archives_and_detached_files(tmp_path):
    (tmp_path / "file").write_text("text")
    file = open(tmp_path / "file")  # noqa: SIM115  what is detached cannot be closed
    with file.detach():
        assert check_open_files(Stored(file, None)).severity == "fine"
    storage = pytest.importorskip("zarr.storage")
    store = storage.ZipStore(tmp_path / "rows.zip", mode="w")
    store._sync_open()
    assert "open zarr.ZipStore" in check_open_files(Stored(store, None)).what
    store.close()
    assert check_open_files(Stored(store, None)).severity == "fine"


def test_the_doctor_names_the_place_of_a_handle_and_passes_over_closed_ones(tmp_path):
    (tmp_path / "file").write_text("text")
    with open(tmp_path / "file") as file:
        finding = check_open_files(Stored({"train": [0, file]}, None))
        assert "attribute \"handle['train'][1]\" is an open TextIOWrapper" in finding.what
    assert check_open_files(Stored(file, None)).severity == "fine"
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened["x"] = np.zeros(3)
        assert "open h5py.Dataset" in check_open_files(Stored(opened["x"], None)).what
    assert check_open_files(Stored(opened, None)).severity == "fine"
