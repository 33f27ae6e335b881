import collections
import dataclasses
import tracemalloc
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info

from loaders import ArrayDataset, numpy_collate
from loaders.batch import collate as collate_module
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError


class Point(NamedTuple):
    x: Any
    y: Any


class Custom(dict):
    note = "kept"


class CustomList(list):
    pass


@dataclasses.dataclass
class Photo:
    image: np.ndarray
    label: int
    where: str = ""
    classes: ClassVar[int] = 10


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: np.ndarray
    seen: int = dataclasses.field(init=False, default=3)


@pytest.fixture(params=[False, True], ids=["main process", "worker"])
def in_worker(request, monkeypatch):
    """What numpy_collate does in a worker, done here: the same code but for the answer of get_worker_info."""
    if request.param:
        monkeypatch.setattr(collate_module, "get_worker_info", object)
    return request.param


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.is_contiguous()
        assert one.numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, collections.abc.Mapping):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, collections.abc.Sequence) and not isinstance(one, (str, bytes)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64", "complex64", "complex128"]
GRID = {
    **{f"array {dtype}": lambda i, d=dtype: (np.arange(6).reshape(2, 3) * i).astype(d) for dtype in DTYPES},
    **{f"scalar {dtype}": lambda i, d=dtype: np.dtype(d).type(i) for dtype in DTYPES if dtype != "uint64"},
    "0-d array": lambda i: np.array(i, np.int16),
    "empty array": lambda i: np.zeros((0, 3), np.uint8),
    "empty in the middle": lambda i: np.zeros((2, 0, 3), np.float64),
    "not contiguous": lambda i: (ARRAY + i).transpose(2, 0, 1),
    "every second": lambda i: (ARRAY + i)[..., ::2],
    "int": lambda i: i,
    "float": lambda i: i / 3,
    "bool": lambda i: i == 1,
    "str": lambda i: f"sample {i}",
    "bytes": lambda i: b"sample %d" % i,
    "np.str_": lambda i: np.str_(i),
    "tensor": lambda i: torch.arange(3) + i,
    "dict": lambda i: {"image": ARRAY + i, "label": i, "name": str(i)},
    "dict of odd keys": lambda i: {1: ARRAY, ("a", 2): i, None: "x"},
    "empty dict": lambda i: {},
    "tuple": lambda i: (ARRAY + i, i, "name"),
    "list": lambda i: [ARRAY + i, i, "name"],
    "empty tuple": lambda i: (),
    "empty list": lambda i: [],
    "namedtuple": lambda i: Point(ARRAY + i, np.float32(i)),
    "nested": lambda i: {"a": (ARRAY, {"b": [i, Point("x", (i, ARRAY))]}), "c": [[i], [[ARRAY]]]},
    "defaultdict": lambda i: collections.defaultdict(list, image=ARRAY, label=i),
    "OrderedDict": lambda i: collections.OrderedDict(b=ARRAY, a=i),
    "dict subclass": lambda i: Custom(image=ARRAY, label=i),
    "UserDict": lambda i: collections.UserDict(image=ARRAY),
    "list subclass": lambda i: CustomList([ARRAY, i]),
    "deque": lambda i: collections.deque([i, 2 * i]),
    "range": lambda i: range(3),
    "counter": lambda i: collections.Counter(a=i + 1),
}


@pytest.mark.parametrize("make", GRID.values(), ids=GRID.keys())
@pytest.mark.parametrize("count", [1, 3])
def test_batches_are_those_of_default_collate(make, count, in_worker):
    samples = [make(i) for i in range(count)]
    same(numpy_collate(samples), default_collate([make(i) for i in range(count)]))


def test_a_defaultdict_keeps_its_factory():
    batch = numpy_collate([collections.defaultdict(list, image=ARRAY)] * 2)
    assert batch["anything"] == []


def test_samples_are_left_as_they_are():
    sample = {"image": ARRAY, "more": [1, 2]}
    numpy_collate([sample, sample])
    assert sample["image"] is ARRAY
    assert sample["more"] == [1, 2]


def test_dataclasses_come_out_as_dataclasses_of_tensors(in_worker):
    batch = numpy_collate([Photo(ARRAY + i, i, f"{i}.jpg") for i in range(2)])
    assert type(batch) is Photo
    assert batch.image.shape == (2, 2, 3, 4)
    assert batch.label.tolist() == [0, 1]
    assert batch.where == ["0.jpg", "1.jpg"]
    frozen = numpy_collate([Frozen(ARRAY), Frozen(ARRAY)])
    assert (frozen.image.shape, frozen.seen.tolist()) == ((2, 2, 3, 4), [3, 3])


# What default_collate refuses or warns of, and what comes out here.
BEYOND = {
    "negative strides": ARRAY[::-1, :, ::-1],
    "big-endian": ARRAY.astype(">f4"),
    "read-only": np.frombuffer(ARRAY.tobytes(), np.float32).reshape(ARRAY.shape),
    "broadcast": np.broadcast_to(ARRAY[:1], ARRAY.shape),
    "unaligned": np.frombuffer(b"\0" + ARRAY.tobytes(), np.float32, offset=1).reshape(ARRAY.shape),
    "memmap": None,
}


@pytest.mark.parametrize("array", BEYOND.values(), ids=BEYOND.keys())
def test_arrays_that_torch_cannot_share_are_collated_by_value(array, in_worker, tmp_path):
    if array is None:
        np.save(tmp_path / "a.npy", ARRAY)
        array = np.load(tmp_path / "a.npy", mmap_mode="r")
    batch = numpy_collate([array, array])
    assert batch.dtype == torch.float32
    assert np.array_equal(batch[1].numpy(), array)
    batch += 1  # writable, and the batch's own


def test_uint64_scalars_are_collated_where_default_collate_fails(in_worker):
    largest = 2**64 - 1
    assert numpy_collate([np.uint64(largest)] * 2).tolist() == [largest, largest]


REFUSED = {
    "str": np.array(["a"]),
    "bytes": np.array([b"a"]),
    "object": np.array([None]),
    "datetime": np.array(["2020-01-01"], "M8[s]"),
    "timedelta": np.timedelta64(1, "s"),
    "longdouble": np.zeros(2, np.longdouble),
    "structured": np.zeros(2, [("x", "f4")]),
    "masked": np.ma.masked_array([1, 2], [True, False]),
    "None": None,
    "object()": object(),
    "set": {1, 2},
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_become_a_tensor_is_a_type_error_that_names_the_field(value, in_worker):
    with pytest.raises(FieldDtypeError, match=r'field "meta\.x"') as caught:
        numpy_collate([{"meta": {"x": value}}] * 2)
    assert isinstance(caught.value, TypeError)
    assert caught.value.field == "meta.x"


@pytest.mark.parametrize(
    ("samples", "kind", "message"),
    [
        (
            [{"image": np.zeros((2, 3))}, {"image": np.zeros((2, 3))}, {"image": np.zeros((2, 4))}],
            FieldShapeError,
            r'^sample at row 2 of the batch, field "image": shape \(2, 4\), expected \(2, 3\) as .*\n.*resize, crop',
        ),
        ([(np.zeros(1), 0), (np.zeros(()), 0)], FieldShapeError, r'row 1 .*, field "0": shape \(\), expected \(1,\)'),
        ([np.zeros(1), np.zeros(2)], FieldShapeError, r"^sample at row 1 of the batch: shape"),
        (
            [{"x": [np.zeros(2, np.float32)]}, {"x": [np.zeros(2, np.float64)]}],
            FieldDtypeError,
            r'row 1 .*, field "x.0": dtype float64, expected float32 .*\n.*astype\(np.float32\)',
        ),
        ([np.float32(1), np.float64(1)], FieldDtypeError, r"dtype float64, expected float32"),
        ([{"x": np.zeros(1)}, {"x": [0.0]}], FieldDtypeError, r'row 1 .*, field "x": a list, expected a plain ndarray'),
        ([np.zeros(1), None], FieldDtypeError, "row 1 .*: a NoneType"),
        ([np.zeros(1), np.ma.masked_array([1.0], [True])], FieldDtypeError, "row 1 .*: a MaskedArray.*\n.*filled"),
        ([{"x": 1, "y": 2}, {"x": 1}], FieldNameError, r"row 1 .*: fields x, expected fields x, y as"),
        ([{"x": 1}, {"x": 1, "y": 2}], FieldNameError, r"row 1 .*: fields x, y, expected fields x as"),
        ([{"m": {"x": 1}}, {"m": 3}], FieldNameError, r'row 1 .*, field "m": int, expected fields x'),
        ([(1, 2), (1, 2, 3)], FieldNameError, r"row 1 .*: tuple of 3, expected tuple of 2"),
        ([Point(1, 2), (1, 2)], FieldNameError, r"row 1 .*: tuple, expected fields x, y"),
        ([Photo(ARRAY, 1), Frozen(ARRAY)], FieldNameError, r"row 1 .*: Frozen, expected Photo"),
        ([{"x": 1}, {"x": None}], FieldDtypeError, r'^field "x"'),
    ],
)
def test_samples_that_disagree_are_named_with_field_expected_and_found(samples, kind, message, in_worker):
    with pytest.raises(kind, match=message):
        numpy_collate(samples)


def test_mixed_dtypes_are_what_default_collate_would_promote_in_silence():
    mixed = [np.zeros(1, np.uint8), np.zeros(1, np.int64)]
    assert default_collate(mixed).dtype == torch.int64
    with pytest.raises(FieldDtypeError):
        numpy_collate(mixed)


def test_byte_orders_may_differ_within_a_batch():
    assert numpy_collate([ARRAY, ARRAY.astype(">f4")])[1].equal(torch.from_numpy(ARRAY))


def test_each_byte_is_written_once(in_worker):
    rows = [np.full((256, 1024), i, np.uint8) for i in range(8)]
    numpy_collate(rows)
    tracemalloc.start()
    try:
        batch = numpy_collate(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # NumPy reports to tracemalloc. In a worker the rows go straight into shared memory, which it does not see;
    # elsewhere into the one array that the tensor lies over.
    assert peak < (0 if in_worker else batch.nbytes) + rows[0].nbytes // 2
    assert batch.is_shared() == in_worker


def test_a_default_device_changes_nothing(in_worker):
    with torch.device("meta"):
        assert numpy_collate([ARRAY, ARRAY]).device.type == "cpu"


def collate_and_look(samples):
    """In a worker: the batch, and for each tensor whether it is shared before it has left."""
    assert get_worker_info() is not None
    batch = numpy_collate(samples)
    return batch, {name: tensor.is_shared() for name, tensor in batch.items()}


# Python 3.12 and later warn of a fork while threads run, and torch and OpenCV start some.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_batch_of_a_worker_is_in_shared_memory_before_it_leaves(method):
    arrays = {
        "image": np.arange(4 * 300, dtype=np.uint16).reshape(4, 10, 30),
        "label": np.arange(4),
        "none": np.ones((4, 0)),
    }
    loader = DataLoader(
        ArrayDataset(arrays), 2, num_workers=1, multiprocessing_context=method, collate_fn=collate_and_look, timeout=60
    )
    batches = []
    for batch, shared in loader:
        assert shared == {"image": True, "label": True, "none": True}
        batches.append(batch)
    for name, array in arrays.items():
        assert np.array_equal(np.concatenate([batch[name].numpy() for batch in batches]), array)
