"""Tables in files: which files, units of reading, what is kept, damage."""

from __future__ import annotations

import gc
import os
import pickle
import signal

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from support.interrupts import Interrupted, interruptible

from loaders import ArrowDataset, DataLoader, DatasetError, SampleError

ROWS = 60


def table(rows=ROWS, first=0):
    numbers = np.arange(first, first + rows)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(numbers, 4).astype(np.float32)), 4)
    columns = {
        "n": numbers,
        "vector": vectors,
        "text": [f"row {n}" * 3 for n in numbers],
        "list": [[n] * 3 for n in numbers],
    }
    return pa.table(columns)


def write(path, what, kind, group=10):
    if kind == "parquet":
        pq.write_table(what, path, row_group_size=group, write_page_checksum=True)
    elif kind == "stream":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, what.schema) as writer:
            writer.write_table(what, max_chunksize=group)
    else:
        feather.write_feather(what, path, compression=kind, chunksize=group)
    return path


KINDS = ("parquet", "lz4", "zstd", "uncompressed", "stream")
ONE_BY_ONE = ("uncompressed", "stream")


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_reading_are_row_groups_or_compressed_batches(tmp_path, kind):
    dataset = ArrowDataset(write(tmp_path / "file", table(25), kind))
    assert dataset.group_sizes.tolist() == ([25] if kind in ONE_BY_ONE else [10, 10, 5])
    assert dataset.group_sizes.dtype == np.int64
    assert dataset.describe(21) == f"{tmp_path / 'file'}, row 21"


@pytest.mark.parametrize("kind", KINDS)
def test_several_files_are_one_after_the_other(tmp_path, kind):
    for number in (2, 10, 1):
        write(tmp_path / f"{number:02}.part", table(10 + number, 100 * number), kind)
    dataset = ArrowDataset(tmp_path / "*.part")
    expected = [100 * number + row for number in (1, 2, 10) for row in range(10 + number)]
    assert [sample["n"] for sample in dataset] == expected
    assert dataset.describe(12) == f"{tmp_path / '02.part'}, row 1"
    assert [each["text"] for each in dataset] == [f"row {n}" * 3 for n in expected]
    listed = ArrowDataset([str(tmp_path / "10.part"), tmp_path / "01.part"], ["n"])
    assert (listed[0], len(listed)) == ({"n": 1000}, 31)


@pytest.mark.parametrize("kind", ["parquet", "lz4", "compressed stream"])
def test_files_of_one_unit_that_are_not_mapped_are_a_group_each(tmp_path, kind):
    for number in range(2):
        if kind != "compressed stream":
            write(tmp_path / f"{number}", table(10, 10 * number), kind)
            continue
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(tmp_path / f"{number}", table().schema, options=options) as writer:
            writer.write_table(table(10, 10 * number))
    dataset = ArrowDataset(tmp_path / "*")
    assert dataset.group_sizes.tolist() == [10, 10]
    assert [sample["n"] for sample in dataset] == list(range(20))


def test_a_compressed_file_is_known_as_such_if_its_first_batch_is_empty(tmp_path):
    what = table(30).select(["n"])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / "file", what.schema, options=options) as writer:
        writer.write_batch(what.to_batches()[0].slice(0, 0))
        writer.write_table(what, max_chunksize=10)
    dataset = ArrowDataset(tmp_path / "file")
    assert dataset.group_sizes.tolist() == [0, 10, 10, 10]
    assert [sample["n"] for sample in dataset] == list(range(30))


def test_different_kinds_of_files_go_together(tmp_path):
    paths = [write(tmp_path / kind, table(12, 12 * number), kind) for number, kind in enumerate(KINDS)]
    dataset = ArrowDataset(paths)
    assert [sample["n"] for sample in dataset] == list(range(60))
    assert dataset.group_sizes.sum() == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_cannot_change_what_was_read(tmp_path, kind):
    dataset = ArrowDataset(write(tmp_path / "file", table(), kind))
    for name in ("list", "vector"):
        with pytest.raises(ValueError, match="read-only"):
            dataset[7][name][0] = 1


def test_files_of_other_columns_are_named(tmp_path):
    write(tmp_path / "a", table(), "parquet")
    write(tmp_path / "b", table().drop_columns("n"), "lz4")
    with pytest.raises(DatasetError, match=r'b" and ".*a" have different columns: n: missing and int64'):
        ArrowDataset([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize(
    ("source", "told"), [("*.none", "No file matches"), ([], "There are no files"), ("s3://a/b", "is a URL")]
)
def test_without_files_there_is_an_error(source, told):
    with pytest.raises(DatasetError, match=told):
        ArrowDataset(source)


def test_only_the_columns_of_the_fields_are_decoded(tmp_path, monkeypatch):
    asked = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **o: asked.append(o["columns"]) or read(*a, **o))
    dataset = ArrowDataset(write(tmp_path / "file", table(), "parquet"), {"x": ["n"], "t": "text"})
    assert dataset[11]["t"] == "row 11row 11row 11"
    assert asked == [["n", "text"]]


@pytest.mark.parametrize("kind", ["parquet", "lz4"])
def test_decoded_groups_are_kept_up_to_the_bound(tmp_path, kind):
    path = write(tmp_path / "file", table(), kind)
    trial = ArrowDataset(path)
    assert trial[0]["n"] == 0
    nbytes = trial._source._reader().nbytes
    assert nbytes >= table(10).nbytes
    dataset = ArrowDataset(path, cache_nbytes=int(3.5 * nbytes))
    reader = dataset._source._reader()
    for index in (0, 15, 25, 5, 35):
        assert dataset[index]["n"] == index
        assert reader.nbytes <= 3.5 * nbytes
    assert list(reader._kept) == [2, 0, 3]  # the group that was used least recently is gone
    small = ArrowDataset(path, cache_nbytes=1)
    for index in (0, 1, 15):
        assert small[index]["n"] == index
    assert list(small._source._reader()._kept) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_open_per_worker_and_none_once_it_is_gone(tmp_path, kind):
    def opened():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.islink(link))

    paths = [write(tmp_path / f"{number}", table(), kind) for number in range(5)]
    dataset = ArrowDataset(paths)
    assert opened() == 0
    for index in range(0, len(dataset), 7):
        dataset[index]
    assert opened() <= 1
    copy = pickle.dumps(dataset)
    assert len(copy) < 10_000
    del dataset
    gc.collect()
    assert opened() == 0
    assert pickle.loads(copy)[61]["n"] == 1


@pytest.mark.parametrize("method", ["fork", "thread"])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_read_what_the_parent_reads(tmp_path, kind, method):
    dataset = ArrowDataset([write(tmp_path / f"{n}", table(ROWS, n * ROWS), kind) for n in range(2)])
    assert dataset[70]["n"] == 70  # the file is open here
    options = {"worker_method": "thread"} if method == "thread" else {"multiprocessing_context": "fork"}
    loader = DataLoader(dataset, 8, shuffle=True, num_workers=2, seed=0, **options)
    seen = [
        (int(n), text, v.tolist()) for b in loader for n, text, v in zip(b["n"], b["text"], b["vector"], strict=True)
    ]
    assert sorted(seen) == [(n, f"row {n}" * 3, [n] * 4) for n in range(2 * ROWS)]


# -- damage


def opened(path):
    try:
        return ArrowDataset(path), None
    except DatasetError as error:
        return None, error


def read(dataset, index):
    try:
        return dataset[index], None
    except SampleError as error:
        return None, error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, kind, share):
    path = write(tmp_path / "file", table(), kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    dataset, error = opened(path)
    if dataset is None:
        assert str(path) in str(error)
        return
    # A stream has no end that must be there: what comes before the cut is whole.
    assert kind == "stream"
    assert [sample["n"] for sample in dataset] == list(range(len(dataset)))


@pytest.mark.parametrize("kind", ["parquet", "lz4", "uncompressed"])
def test_damaged_bytes_give_an_error_that_names_the_file_and_the_sample_or_the_right_sample(tmp_path, kind):
    path = write(tmp_path / "file", table(), kind)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"opening": 0, "reading": 0, "right": 0, "other": 0}
    for _ in range(60):
        damaged = bytearray(data)
        at = int(rng.integers(8, len(data)))
        length = int(rng.choice([1, 8, 64]))
        damaged[at : at + length] = rng.bytes(min(length, len(data) - at))
        path.write_bytes(damaged)
        dataset, error = opened(path)
        if dataset is None:
            assert str(path) in str(error) or "column" in str(error)
            outcomes["opening"] += 1
            continue
        for index in range(0, len(dataset), 3):
            sample, error = read(dataset, index)
            if error is not None:
                assert (str(path) in str(error), error.index) == (True, index)
                outcomes["reading"] += 1
                continue
            wanted = {"n": index, "vector": [index] * 4, "text": f"row {index}" * 3, "list": [index] * 3}
            right = sample.keys() == wanted.keys() and all(np.array_equal(sample[n], wanted[n]) for n in wanted)
            outcomes["right" if right else "other"] += 1
    assert outcomes["right"] > 100
    if kind == "parquet":  # which has checksums; Arrow's own format has none
        assert outcomes["other"] == 0
        assert outcomes["reading"]


def test_a_damaged_row_group_is_named_and_others_can_be_read(tmp_path):
    path = write(tmp_path / "file", table(), "parquet")
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start + 40] ^= 255
    path.write_bytes(data)
    dataset = ArrowDataset(path)
    with pytest.raises(
        SampleError, match=r'sample 25 \(".*file, row 25"\): row group 2 of ".*file" cannot be read'
    ) as caught:
        dataset[25]
    assert caught.value.index == 25
    assert dataset[35]["n"] == 35
    loader = DataLoader(dataset, 10, num_workers=2, on_error="skip")
    assert sorted(int(n) for batch in loader for n in batch["n"]) == [*range(20), *range(30, 60)]
    assert sorted(each.index for each in loader.errors) == list(range(20, 30))


def test_a_file_that_was_replaced_is_an_error(tmp_path):
    path = write(tmp_path / "file", table(), "parquet")
    dataset = ArrowDataset(path)
    write(path, table(40), "parquet", 7)
    with pytest.raises(SampleError, match="has 7 rows, and had 10: the file changed"):
        dataset[0]


@pytest.mark.parametrize("kind", ["parquet", "lz4"])
def test_the_exception_of_a_signal_handler_is_not_taken_for_damage(tmp_path, monkeypatch, kind):
    dataset = ArrowDataset(write(tmp_path / "file", table(), kind))
    reader = type(dataset._source._reader()._opened(str(tmp_path / "file"), "parquet" if kind == "parquet" else "ipc"))
    read = reader.read

    def interrupted(self, unit):
        monkeypatch.setattr(reader, "read", read)
        signal.raise_signal(signal.SIGALRM)
        return read(self, unit)

    class Late(Interrupted, TimeoutError):
        """An OSError, as damaged files raise."""

    def late(number, frame):
        raise Late

    for workers in (None, 0):
        monkeypatch.setattr(reader, "read", interrupted)
        dataset = ArrowDataset(tmp_path / "file")
        with interruptible():
            signal.signal(signal.SIGALRM, late)
            batches = iter(DataLoader(dataset, 20, on_error="skip")) if workers == 0 else None
            with pytest.raises(Late):
                _ = next(batches) if batches is not None else dataset[25]
        assert dataset[25]["n"] == 25
        if batches is not None:
            assert [int(n) for batch in batches for n in batch["n"]] == list(range(ROWS))
