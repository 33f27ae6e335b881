"""What each type of a column is in a sample."""

from __future__ import annotations

import datetime
import decimal
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from loaders import ArrowDataset, DataLoader, DatasetError, Field, SampleError
from loaders.errors import MissingExtraError

ROWS = 6
DAY = datetime.date(2020, 2, 29)
TIME = datetime.datetime(2020, 2, 29, 1, 2, 3)
TENSORS = np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 2, 3)

VALUES = {
    "int8": (pa.array(range(ROWS), pa.int8()), np.int8(4)),
    "uint64": (pa.array([2**63 + row for row in range(ROWS)], pa.uint64()), np.uint64(2**63 + 4)),
    "float16": (pa.array(np.arange(ROWS).astype(np.float16)), np.float16(4)),
    "float64": (pa.array([row / 3 for row in range(ROWS)]), np.float64(4 / 3)),
    "bool": (pa.array([row % 3 == 1 for row in range(ROWS)]), np.True_),
    "date32": (pa.array([DAY] * ROWS, pa.date32()), np.datetime64("2020-02-29")),
    "date64": (pa.array([DAY] * ROWS, pa.date64()), np.datetime64("2020-02-29", "ms")),
    "timestamp": (pa.array([TIME] * ROWS, pa.timestamp("ms")), np.datetime64("2020-02-29T01:02:03", "ms")),
    "timestamp with a zone": (
        pa.array([TIME] * ROWS, pa.timestamp("s", "Europe/Paris")),
        np.datetime64("2020-02-29T01:02:03", "s"),
    ),
    "time32": (pa.array([61] * ROWS, pa.int32()).cast(pa.time32("s")), np.timedelta64(61, "s")),
    "time64": (pa.array([61] * ROWS, pa.int64()).cast(pa.time64("us")), np.timedelta64(61, "us")),
    "duration": (pa.array([61] * ROWS, pa.duration("ns")), np.timedelta64(61, "ns")),
    "decimal": (pa.array([decimal.Decimal("1.5")] * ROWS), 1.5),
    "string": (pa.array(list("abcdéf")), "é"),
    "large string": (pa.array(list("abcdéf"), pa.large_string()), "é"),
    "string view": (pa.array(list("abcdéf"), pa.string_view()), "é"),
    "binary": (pa.array([bytes([row]) * row for row in range(ROWS)]), b"\4\4\4\4"),
    "fixed-size binary": (pa.array([bytes([row]) * 2 for row in range(ROWS)], pa.binary(2)), b"\4\4"),
    "dictionary": (pa.array(["x", "y"] * 3).dictionary_encode(), "x"),
    "dictionary of numbers": (pa.array([7, 8] * 3).dictionary_encode(), np.int64(7)),
    "fixed-size list": (pa.array([[row, -row] for row in range(ROWS)], pa.list_(pa.int16(), 2)), np.int16([4, -4])),
    "fixed-size list of booleans": (
        pa.array([[row == 4, False, True] for row in range(ROWS)], pa.list_(pa.bool_(), 3)),
        np.array([True, False, True]),
    ),
    "matrix": (pa.array(TENSORS.tolist(), pa.list_(pa.list_(pa.float32(), 3), 2)), TENSORS[4]),
    "tensor": (pa.FixedShapeTensorArray.from_numpy_ndarray(TENSORS), TENSORS[4]),
    "list": (pa.array([list(range(row)) for row in range(ROWS)], pa.list_(pa.int32())), np.int32([0, 1, 2, 3])),
    "large list": (pa.array([[0.5] * row for row in range(ROWS)], pa.large_list(pa.float32())), np.float32([0.5] * 4)),
    "list of booleans": (pa.array([[True] * row for row in range(ROWS)]), np.array([True] * 4)),
    "list of boxes": (
        pa.array([[[row, 1, 2, 3]] * row for row in range(ROWS)], pa.list_(pa.list_(pa.float32(), 4))),
        np.float32([[4, 1, 2, 3]] * 4),
    ),
    "list of lists": (pa.array([[[row, 1], [2, 3]] for row in range(ROWS)]), np.int64([[4, 1], [2, 3]])),
    "list of strings": (pa.array([["a"] * row for row in range(ROWS)]), ["a"] * 4),
    "list of structs": (pa.array([[{"a": row}] for row in range(ROWS)]), [{"a": 4}]),
    "struct": (pa.array([{"a": row, "b": [0.5, row]} for row in range(ROWS)]), {"a": np.int64(4), "b": [0.5, 4.0]}),
}


def same(value, expected):
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(np.array_equal(value[name], expected[name]) for name in expected)
    if isinstance(expected, (np.ndarray, np.generic)):
        return type(value) is type(expected) and value.dtype == expected.dtype and np.array_equal(value, expected)
    return type(value) is type(expected) and value == expected


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_is_what_the_table_of_types_says(kind):
    array, expected = VALUES[kind]
    dataset = ArrowDataset(pa.table({"x": array}))
    assert same(dataset[4]["x"], expected), dataset[4]["x"]


@pytest.mark.parametrize("kind", VALUES)
def test_slices_and_chunks_of_a_table_do_not_matter(kind):
    array, expected = VALUES[kind]
    table = pa.table({"x": array})
    for other in (table.slice(3), pa.concat_tables([table.slice(5), table.slice(2, 3)]), table.slice(1).slice(3)):
        dataset = ArrowDataset(other)
        at = other["x"].to_pylist().index(table["x"].to_pylist()[4])
        assert same(dataset[at]["x"], expected)
    assert same(pickle.loads(pickle.dumps(ArrowDataset(table)))[4]["x"], expected)


def test_a_permuted_tensor_has_its_logical_shape():
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0])
    storage = pa.array(TENSORS.reshape(ROWS, 6).tolist(), pa.list_(pa.float32(), 6))
    dataset = ArrowDataset(pa.table({"x": pa.ExtensionArray.from_storage(kind, storage)}))
    np.testing.assert_array_equal(dataset[4]["x"], TENSORS[4].T)
    np.testing.assert_array_equal(next(iter(DataLoader(dataset, ROWS)))["x"], TENSORS.transpose(0, 2, 1))


def test_numbers_are_read_only_views_of_arrows_memory():
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12.0)), 4), "l": [[1, 2]] * 3})
    sample = ArrowDataset(table)[1]
    assert np.shares_memory(sample["x"], table["x"].chunk(0).flatten().to_numpy())
    assert np.shares_memory(sample["l"], table["l"].chunk(0).values.to_numpy())
    for name in ("x", "l"):
        with pytest.raises(ValueError, match="read-only"):
            sample[name][0] = 1


@pytest.mark.parametrize("chunks", [("prefix", "whole"), ("whole", "prefix")])
def test_chunks_that_begin_at_one_address_are_told_apart(chunks):
    numbers = np.arange(30.0)
    parts = {"prefix": numbers[:10], "whole": numbers}
    dataset = ArrowDataset(pa.concat_tables([pa.table({"x": parts[name]}) for name in chunks]))
    expected = np.concatenate([parts[name] for name in chunks])
    out = {"x": np.empty(len(expected))}
    dataset.read_rows_into(range(len(expected)), out)
    np.testing.assert_array_equal(out["x"], expected)
    assert [sample["x"] for sample in dataset] == expected.tolist()


def test_a_list_of_empty_lists_of_strings_keeps_its_lists():
    dataset = ArrowDataset(pa.table({"x": pa.array([[[], [], []], [["a"], ["b"]]], pa.list_(pa.list_(pa.string())))}))
    assert [sample["x"] for sample in dataset] == [[[], [], []], [["a"], ["b"]]]


def test_a_slice_of_lists_of_tensors_has_its_own_rows():
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(48.0).reshape(12, 2, 2))
    lists = pa.FixedSizeListArray.from_arrays(tensors, 3)
    for array in (lists, lists.slice(2)):
        dataset = ArrowDataset(pa.table({"x": array}))
        np.testing.assert_array_equal(dataset[1]["x"], np.arange(48.0).reshape(4, 3, 2, 2)[len(lists) - len(array) + 1])


def test_columns_are_renamed_cast_and_stacked():
    table = pa.table({"a": pa.array([1, 2], pa.int8()), "b": [0.5, 1.5], "c": [True, False], "y": [7, 8]})
    columns = {"x": ["a", "b", "c"], "label": "y"}
    sample = ArrowDataset(table, columns)[1]
    assert (list(sample), sample["x"].dtype, sample["x"].tolist()) == (["x", "label"], np.float64, [2, 1.5, 0])
    cast = ArrowDataset(table, columns, dtypes={"x": "float32", "label": np.int16})[1]
    assert (cast["x"].dtype, cast["label"].dtype, cast["label"]) == (np.float32, np.int16, 8)
    dates = ArrowDataset(pa.table({"d": VALUES["date32"][0]}), dtypes={"d": "int64"})
    assert dates[0]["d"] == np.datetime64("2020-02-29").astype("int64")
    assert next(iter(DataLoader(dates, 2)))["d"].tolist() == [18321, 18321]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"columns": ["a", "z"]}, 'there is no column "z"; the table has "a", "s", "m"'),
        ({"columns": ["a", "m"]}, 'column "m" is map<.*Leave it out'),
        ({"columns": ["n"]}, 'column "n" is null: every value is null'),
        ({"columns": {"x": ["a", "s"]}}, 'field "x" stacks columns, which must be numbers: a: int64, s: string'),
        ({"columns": ["a"], "dtypes": {"b": "int8"}}, "dtypes= names 'b'; the fields are \"a\""),
        ({"columns": ["s"], "dtypes": {"s": "int8"}}, 'dtypes= names field "s", which is string: it holds no numbers'),
        ({"columns": ["a"], "nulls": {"a": np.nan}}, r"nulls=\{'a': nan\}: it is not a value of int64"),
        ({"columns": ["a"], "image": "s"}, "image='s' is not among the columns"),
        ({"columns": ["a", "s"], "image": "s"}, 'column "s" is string: encoded images are binary'),
        ({"columns": []}, "There are no columns"),
    ],
)
def test_what_cannot_be_a_sample_is_refused_with_the_reason(options, told):
    table = pa.table({"a": [1], "s": ["x"], "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), "n": [None]})
    with pytest.raises(DatasetError, match=told):
        ArrowDataset(table, **options)


NULLS = {
    "number": (pa.array([1, None, 3]), -1),
    "boolean": (pa.array([True, None, False]), False),
    "float": (pa.array([1.0, None, 3.0]), np.nan),
    "list": (pa.array([[1], None, [2, 3]]), np.int64([])),
    "text": (pa.array(["a", None, "b"]), ""),
    "fixed-size list": (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)), 0),
    "matrix": (pa.array([[[1], [2]], None, [[3], [4]]], pa.list_(pa.list_(pa.int32(), 1), 2)), 0),
    "tensor": (
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2, 2]),
            pa.array([[1, 2, 3, 4], None, [5, 6, 7, 8]], pa.list_(pa.float32(), 4)),
        ),
        -1,
    ),
}


@pytest.mark.parametrize("kind", NULLS)
def test_a_null_is_named_or_replaced_as_asked(kind):
    array, fill = NULLS[kind]
    table = pa.table({"x": pa.concat_arrays([array, array.slice(0, 1)]).slice(0, 4), "i": [0, 1, 2, 3]})
    with pytest.raises(
        SampleError, match=r'sample 1, field "x": column "x" is null.*\n.*nulls=\{"x": value\}'
    ) as caught:
        ArrowDataset(table)[1]
    assert (caught.value.index, caught.value.field) == (1, "x")
    filled = ArrowDataset(table, nulls={"x": fill})
    expected = np.full(np.shape(filled[0]["x"]), fill) if kind not in ("list", "text") else fill
    np.testing.assert_array_equal(filled[1]["x"], expected)
    assert np.shape(filled[1]["x"]) == np.shape(expected)
    assert same(filled[2]["x"], ArrowDataset(table)[2]["x"])


def test_nulls_inside_values_are_nulls():
    table = pa.table({"f": pa.array([[1, None]], pa.list_(pa.int32(), 2)), "l": [[1, None]], "s": [{"a": None}]})
    for name in table.column_names:
        with pytest.raises(SampleError, match=f'column "{name}" is null, or contains a null'):
            ArrowDataset(table, [name])[0]
    assert ArrowDataset(table, ["f"], nulls={"f": 7})[0]["f"].tolist() == [1, 7]
    matrix = pa.table({"m": pa.array([[[1], None]], pa.list_(pa.list_(pa.int32(), 1), 2))})
    for source, name, fill in ((table, "l", np.int64([])), (table, "s", {}), (matrix, "m", 7)):
        with pytest.raises(SampleError, match=f'"{name}": a value inside it is null.*whole values only.\n.*the table'):
            ArrowDataset(source, [name], nulls={name: fill})[0]


def test_the_stacked_column_that_is_null_is_named():
    table = pa.table({"a": [1, 2], "b": [1, None]})
    with pytest.raises(SampleError, match='field "x": column "b" is null'):
        ArrowDataset(table, {"x": ["a", "b"]})[1]
    filled = ArrowDataset(table, {"x": ["a", "b"]}, dtypes={"x": "float32"}, nulls={"x": np.nan})
    np.testing.assert_array_equal(filled[1]["x"], np.float32([2, np.nan]))


def test_lists_of_lists_of_different_lengths_are_refused_by_name():
    with pytest.raises(SampleError, match='column "x" has a list of lists of different lengths'):
        ArrowDataset(pa.table({"x": [[[1], [2, 3]]]}))[0]


def test_lists_go_into_padded_and_ragged_fields():
    table = pa.table({"ids": [[1], [2, 3], []], "boxes": pa.array([[[0.0] * 4] * n for n in (2, 0, 1)])})
    table = table.set_column(1, "boxes", table["boxes"].cast(pa.list_(pa.list_(pa.float32(), 4))))
    fields = {"ids": Field(pad=-1), "boxes": Field(ragged=True)}
    batch = next(iter(DataLoader(ArrowDataset(table), 3, fields=fields)))
    assert batch["ids"].values.tolist() == [[1, -1], [2, 3], [-1, -1]]
    assert [tuple(boxes.shape) for boxes in batch["boxes"]] == [(2, 4), (0, 4), (1, 4)]


def test_the_argument_is_a_table_batches_or_files():
    table = pa.table({"x": [1, 2, 3]})
    assert ArrowDataset(table.to_batches(max_chunksize=2))[2]["x"] == 3
    with pytest.raises(TypeError, match=r"source is a dict: expected paths, a pyarrow\.Table"):
        ArrowDataset({"x": [1]})
    with pytest.raises(TypeError, match="columns is one name, 'x'"):
        ArrowDataset(table, "x")


def test_without_pyarrow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loaders\[arrow\]'"):
        ArrowDataset("people.parquet")


def test_the_name_is_there_without_importing_pyarrow():
    program = "import sys, loaders; loaders.ArrowDataset, loaders.PerWorker; print('pyarrow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "False"
