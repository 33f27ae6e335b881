import dataclasses
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch

from loaders import DataLoader, Field
from loaders.batch.packing import dumps, pack, unpack
from loaders.batch.spec import tensor_as_array
from loaders.nested import leaves
from loaders.workers import processes, task_memory
from loaders.workers.messages import Failure, Parcel, Result

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Photo:
    image: object
    note: str


def through(value):
    """What arrives, and the copies of the buffers that it lies in."""
    pickled, buffers = pack(value)
    arrived = [bytearray(buffer.raw()) for buffer in buffers]
    return unpack(pickled, arrived), arrived


def lies_in(array, buffers):
    starts = [(np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer)) for buffer in buffers if buffer]
    return any(
        start <= array.ctypes.data and array.ctypes.data + array.nbytes <= start + size for start, size in starts
    )


GRID = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {
    "contiguous": GRID,
    "fortran": np.asfortranarray(GRID),
    "axes in another order": GRID.transpose(1, 0, 2),
    "channels last": np.zeros((2, 5, 4, 3), np.uint8).transpose(0, 3, 1, 2),
    "sliced": GRID[:, ::2, 1:],
    "reversed": GRID[::-1, :, ::-1],
    "broadcast": np.broadcast_to(GRID[0], (2, 3, 4)),
    "0-d": np.array(5, np.int16),
    "empty": np.zeros((0, 4), np.int16),
    "empty and sliced": np.zeros((4, 6))[::2, 6:],
    "length-1 axes": np.zeros((4, 1, 3))[::2, :, :],
    "read-only": np.frombuffer(b"12345678", np.int32),
    "big-endian": GRID.astype(">f4"),
    "structured": np.zeros(3, [("a", "i4"), ("b", "f8")]),
    "structured and sliced": np.zeros(6, [("a", "i4"), ("b", "f8")])[::2],
    "dates": np.array(["2020-01-01", "2021-01-01"], "M8[D]"),
    "texts": np.array(["a", "größe"]),
    "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_an_array_arrives_with_its_dtype_shape_and_values(array):
    arrived, _ = through(array)
    assert (type(arrived), arrived.dtype, arrived.shape) == (type(array), array.dtype, array.shape)
    assert arrived.tolist() == array.tolist()


def test_arrays_of_objects_arrive_whatever_their_layout():
    array = np.array([[None, "a"], [3, GRID]], dtype=object)
    for each in (array, array.T, array[:, ::-1]):
        arrived, _ = through(each)
        assert arrived.shape == each.shape
        assert [type(item) for item in arrived.flat] == [type(item) for item in each.flat]


@pytest.mark.parametrize(
    "name", [name for name, array in ARRAYS.items() if name not in ("masked", "dates") and array.size]
)
def test_the_bytes_of_an_array_travel_apart_and_are_shared_where_they_arrive(name):
    arrived, buffers = through(ARRAYS[name])
    assert lies_in(arrived, buffers)
    assert arrived.flags.writeable == (name != "read-only")


@pytest.mark.parametrize("name", ["contiguous", "fortran", "axes in another order", "channels last"])
def test_dense_arrays_and_tensors_leave_without_a_copy_and_keep_their_strides(name):
    array = ARRAYS[name]
    for value in (array, torch.from_numpy(array)):
        pickled, [buffer] = pack(value)
        assert np.frombuffer(buffer.raw(), np.uint8).ctypes.data == array.ctypes.data
        arrived = unpack(pickled, [bytearray(buffer.raw())])
        assert np.asarray(arrived).strides == array.strides


def test_arrays_with_gaps_leave_without_the_gaps():
    for array in (np.zeros((1000, 1000))[:2, :3], np.broadcast_to(np.zeros(3), (2, 3))):
        _, [buffer] = pack(array)
        assert buffer.raw().nbytes == 6 * 8


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype) and "q" not in str(d)}, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_arrives_bit_by_bit(dtype):
    bits = (torch.arange(8 * dtype.itemsize) % 2).byte()
    tensor = bits.view(dtype).view(2, 4)
    for each in (tensor, tensor.t(), tensor[:, ::2], tensor[0, 0], tensor[:0]):
        arrived, buffers = through(each)
        assert (type(arrived), arrived.dtype, arrived.shape) == (torch.Tensor, dtype, each.shape)
        raw, arrived_raw = (tensor_as_array(one)[0] for one in (each, arrived))
        assert np.array_equal(raw, arrived_raw)
        assert lies_in(arrived_raw, buffers) == (each.numel() > 0)


def test_tensors_that_are_more_than_memory_arrive_as_torch_pickles_them():
    parameter = torch.nn.Parameter(torch.ones(2))
    conj = torch.tensor([1 + 2j]).conj()
    for tensor in (parameter, torch.ones(2, requires_grad=True), conj, torch.eye(2).to_sparse()):
        arrived, _ = through(tensor)
        assert type(arrived) is type(tensor)
        assert arrived.requires_grad == tensor.requires_grad
        assert torch.equal(arrived.to_dense(), tensor.to_dense())


def test_nested_trees_keep_their_containers():
    tree = {
        "pair": Pair(GRID, [torch.ones(2), "text"]),
        "photo": Photo(GRID.T, "a"),
        3: (None, 2.5, b"bytes", {"deep": GRID}),
    }
    arrived, buffers = through(tree)
    assert [path for path, _ in leaves(arrived)] == [path for path, _ in leaves(tree)]
    assert (type(arrived["pair"]), type(arrived["photo"])) == (Pair, Photo)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(arrived), leaves(tree), strict=True))
    assert len(buffers) == 3  # GRID twice is one array


def test_a_tensor_and_its_rows_arrive_each_with_its_own_values():
    tensor = torch.arange(6).view(2, 3)
    whole, row = through([tensor, tensor[1]])[0]
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert row.tolist() == [3, 4, 5]


def test_of_very_many_arrays_the_small_ones_need_no_room_of_their_own():
    values = [np.full(3, number) for number in range(1000)] + [np.zeros(1000), torch.full((4,), 7)]
    pickled, buffers = pack(values)
    assert len(buffers) == 65
    arrived = unpack(pickled, [bytearray(buffer.raw()) for buffer in buffers])
    for value, again in zip(values, arrived, strict=True):
        assert again.tolist() == value.tolist()
        again[0] = 1


def test_what_cannot_be_pickled_says_so():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(lambda: 0)


def test_a_parcel_takes_each_piece_from_its_block_or_from_what_it_brings():
    tree = [GRID, np.zeros((0, 3)), torch.arange(5), np.ones(2)]
    pickled, buffers = pack(tree)
    raws = [bytes(buffer.raw()) for buffer in buffers]
    blocks = [bytearray(raws[0] + b"room to spare"), None, bytearray(raws[2]), None]
    parcel = Parcel(pickled, [len(raws[0]), 0, len(raws[2]), bytearray(raws[3])])
    opened = pickle.loads(pickle.dumps(parcel)).open(blocks)
    assert all(np.array_equal(a, b) for a, b in zip(opened, tree, strict=True))
    assert lies_in(opened[0], [blocks[0]])
    assert lies_in(opened[2].numpy(), [blocks[2]])


# -- views of more than they show


class Tagged(torch.Tensor):
    pass


def big_array():
    return np.arange(100_000, dtype=np.float32)


def big():
    return torch.from_numpy(big_array())


def noted(tensor):
    tensor.note = "kept"
    return tensor


VIEWS = {
    "array": lambda: big_array()[7:10],
    "strided array": lambda: big_array()[::30_000],
    "broadcast array": lambda: np.broadcast_to(big_array()[3], (3,)),
    "tensor": lambda: big()[7:10],
    "strided tensor": lambda: big()[::30_000],
    "expanded tensor": lambda: big()[7].expand(3),
    "tensor that requires grad": lambda: big().requires_grad_()[7:10],
    "tensor with an attribute": lambda: noted(big()[7:10]),
    "conjugated tensor": lambda: torch.zeros(100_000, dtype=torch.complex64).conj()[7:10],
    "negated tensor": lambda: torch.zeros(100_000, dtype=torch.complex64).conj().imag[7:10],
    "Parameter": lambda: torch.nn.Parameter(big()[7:10]),
    "subclass of Tensor": lambda: noted(big()[7:10].as_subclass(Tagged)),
    "tensor of a dtype that NumPy lacks": lambda: big().bfloat16()[7:10],
    "tensor of a dtype that torch's pickle lacks": lambda: big().to(torch.uint16)[7:10],
    "values of a sparse tensor": lambda: torch.sparse_coo_tensor(
        torch.arange(3)[None], big()[7:10], (9,), check_invariants=False
    ),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_a_view_travels_without_what_it_is_a_view_of(make):
    view = make()
    for wrap in (lambda value: value, lambda value: {"deep": [(value, 1)]}, lambda value: ValueError("says", value)):
        pickled, buffers = pack(wrap(view))
        assert len(pickled) + sum(buffer.raw().nbytes for buffer in buffers) < 2000
        whole = dumps(wrap(view))
        assert len(whole) < 2000
    for arrived in (unpack(*pack(view)), pickle.loads(dumps(view))):
        assert (type(arrived), arrived.dtype) == (type(view), view.dtype)
        assert getattr(arrived, "requires_grad", None) == getattr(view, "requires_grad", None)
        assert getattr(arrived, "note", None) == getattr(view, "note", None)
        if isinstance(view, torch.Tensor):
            assert torch.equal(arrived.detach().to_dense(), view.detach().to_dense())
        else:
            assert arrived.tolist() == view.tolist()


def test_errors_and_what_no_slot_holds_travel_as_large_as_they_look():
    try:
        raise ValueError("bad", big()[:3])
    except ValueError as error:
        result = Result(0, 0, 0, 1, failures=[Failure.of(error, "reading", 0, big()[0])])
    result.overflow.samples.append((0, {"x": big()[:3], "y": [torch.nn.Parameter(big()[:2])]}))
    result.overflow.fields[0] = [(1, big()[5:9])]
    sent = dumps(result)
    assert len(sent) < 8000
    arrived = pickle.loads(sent)
    assert arrived.failures[0].error.args[1].tolist() == [0, 1, 2]
    assert arrived.overflow.fields[0][0][1].tolist() == [5, 6, 7, 8]


def test_arrays_that_arrive_in_one_piece_can_be_written_into():
    for value in (np.zeros(3), np.zeros((4, 4))[::2, 1:], torch.zeros(3)):
        arrived = pickle.loads(dumps(value))
        arrived[0] = 1
        assert arrived[0].all()


class Views:
    """Sample i is a view of one large tensor; longer ones than the first find no room in their row."""

    def __init__(self):
        self.values = torch.arange(1_000_000.0)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        if index == 31:
            raise LookupError("no view", self.values[:2])
        return {"x": self.values[index : index + 1 + 200 * (int(index) > 0)], "text": ("a", self.values[:2])}


def test_views_travel_between_processes_as_large_as_they_look(monkeypatch):
    sizes = []
    opened = processes.ProcessEngine._opened
    written = task_memory.dumps

    def come(self, header, payload):
        sizes.append(len(payload))
        return opened(self, header, payload)

    def go(value):
        sizes.append(len(written(value)))
        return written(value)

    monkeypatch.setattr(processes.ProcessEngine, "_opened", come)
    monkeypatch.setattr(task_memory, "dumps", go)
    keys = torch.arange(1_000_000)
    fields = {"x": Field(ragged=True), "text.1": Field(ragged=True)}
    loader = DataLoader(
        Views(), batch_sampler=[list(keys[:8]), list(keys[8:16])], num_workers=1, fields=fields, on_error="skip"
    )
    batches = list(loader)
    assert [len(values) for batch in batches for values in batch["x"]] == [1] + [201] * 15
    loader = DataLoader(Views(), sampler=list(keys[30:32]), num_workers=1, fields=fields, on_error="skip")
    assert len(list(loader)) == 1
    assert loader.errors[0].index == 31
    assert len(sizes) > 4
    assert max(sizes) < 20_000
