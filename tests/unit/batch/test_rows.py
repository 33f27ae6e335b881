import ctypes
from collections import namedtuple

import numpy as np
import pytest
import torch

from loaders import Field
from loaders.batch.rows import Overflow, RowWriter
from loaders.batch.spec import BatchSpec

ROWS = 4


class Slot:
    """Memory for ROWS samples like the given one, and its writer."""

    def __init__(self, sample, declared=None):
        self.spec = BatchSpec.from_sample(sample, declared)
        self.offsets = []
        end = 0
        for size in self.spec.sizes(ROWS):
            self.offsets.append(end)
            end += -(-size // 64) * 64
        self.memory = bytearray(b"\xdb" * max(end, 1))
        self.writer = RowWriter(self.spec, self.memory, self.offsets, ROWS)
        self.overflow = Overflow()

    def write(self, row, sample):
        self.writer.write(row, sample, self.overflow)

    def values(self, number=0):
        return self.spec.fields[number].values(self.memory, self.offsets[number], ROWS)

    def extents(self, number=0):
        return self.spec.fields[number].extents(self.memory, self.offsets[number], ROWS)


GRID = np.arange(24, dtype=np.int16).reshape(4, 6)
LAYOUTS = {
    "contiguous": GRID.copy(),
    "fortran": np.asfortranarray(GRID),
    "transposed": np.ascontiguousarray(GRID.T).T,
    "sliced": np.repeat(GRID, 2, axis=1)[:, ::2],
    "reversed": GRID[::-1, ::-1],
    "broadcast": np.broadcast_to(GRID[0], (4, 6)),
    "read-only": np.frombuffer(GRID.tobytes(), np.int16).reshape(4, 6),
    "unaligned": np.frombuffer(b"." + GRID.tobytes(), np.int16, offset=1).reshape(4, 6),
}


@pytest.mark.parametrize("array", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("declared", [{}, {"": Field(pad=0)}, {"": Field(ragged=True)}], ids=["stack", "pad", "ragged"])
def test_arrays_of_every_layout_are_written_as_they_are(array, declared):
    slot = Slot(array, declared)
    slot.write(2, array)
    written = slot.values()[2]
    if declared:
        assert slot.extents()[2].tolist() == [4, 6]
        written = written[:24].reshape(4, 6) if declared[""].ragged else written[:4]
    assert np.array_equal(written, array)
    assert not slot.overflow


@pytest.mark.parametrize(
    "tensor", [torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2).t(), torch.ones(1).expand(2, 3)]
)
def test_tensors_of_every_layout_are_written_as_they_are(tensor):
    slot = Slot(tensor)
    slot.write(1, tensor)
    assert np.array_equal(slot.values()[1], tensor.numpy())


def test_a_bfloat16_tensor_is_written_bit_by_bit():
    tensor = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    slot = Slot(tensor)
    slot.write(3, tensor)
    assert torch.equal(torch.from_numpy(slot.values()[3].copy()).view(torch.bfloat16), tensor)


STACKED = np.zeros((2, 3), np.float32)
NEVER_CAST = {
    "a wider float": (STACKED, np.zeros((2, 3), np.float64)),
    "a narrower float": (STACKED, np.zeros((2, 3), np.float16)),
    "ints for floats": (STACKED, np.zeros((2, 3), np.int32)),
    "another sign": (np.zeros(2, np.int8), np.zeros(2, np.uint8)),
    "bools for bytes": (np.zeros(2, np.uint8), np.zeros(2, np.bool_)),
    "another byte order": (STACKED, STACKED.astype(STACKED.dtype.newbyteorder())),
    "another shape": (STACKED, np.zeros((3, 2), np.float32)),
    "a shape that would broadcast": (STACKED, np.zeros((1, 3), np.float32)),
    "fewer dimensions": (STACKED, np.zeros(3, np.float32)),
    "a scalar for an array": (np.zeros((), np.float32), np.float32(1)),
    "an array for a scalar": (np.float32(1), np.zeros((), np.float32)),
    "a tensor for an array": (STACKED, torch.zeros(2, 3)),
    "an array for a tensor": (torch.zeros(2, 3), STACKED),
    "another tensor": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    "bits for a bfloat16": (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int16)),
    "a tensor that requires grad": (torch.zeros(2), torch.zeros(2, requires_grad=True)),
    "a masked array": (STACKED, np.ma.masked_array(STACKED, True)),
    "a list": (STACKED, STACKED.tolist()),
    "None": (STACKED, None),
    "a float for an int": (1, 1.0),
    "a bool for an int": (1, True),
    "an int for a bool": (True, 1),
    "a NumPy int for an int": (1, np.int64(1)),
    "an int for a NumPy int": (np.int64(1), 1),
    "an int beyond int64": (1, 2**63),
    "a text": ("a", "b"),
}


@pytest.mark.parametrize(("first", "then"), NEVER_CAST.values(), ids=NEVER_CAST)
def test_nothing_is_cast(first, then):
    slot = Slot([first])
    before = bytes(slot.memory)
    slot.write(1, [then])
    assert bytes(slot.memory) == before
    [(row, value)] = slot.overflow.fields[0]
    assert row == 1
    assert value is then


def test_the_other_fields_of_such_a_sample_are_in_their_rows():
    slot = Slot({"a": 1, "b": 2.0})
    slot.write(0, {"a": "odd", "b": 5.0})
    assert slot.values(1)[0] == 5.0
    assert slot.overflow.fields == {0: [(0, "odd")]}


def test_a_sample_with_another_container_is_kept_whole():
    slot = Slot({"a": 1})
    for row, sample in enumerate([{"b": 1}, {"a": 1, "b": 1}, [1], None]):
        slot.write(row, sample)
    assert slot.overflow.samples == [(0, {"b": 1}), (1, {"a": 1, "b": 1}), (2, [1]), (3, None)]


def test_one_write_per_array_and_no_copy():
    class Counted(np.ndarray):
        made = 0

        def __array_finalize__(self, parent):
            Counted.made += 1

    for declared in ({}, {"": Field(pad=0)}, {"": Field(ragged=True)}):
        sample = np.ones((3, 2), np.float32).view(Counted)
        slot = Slot(sample, declared)
        before = Counted.made
        slot.write(0, sample)
        slot.write(1, sample)
        assert Counted.made == before
        assert not slot.overflow


# -- pad and ragged


def test_what_is_beyond_a_padded_sample_is_the_pad_value_also_in_a_reused_row():
    slot = Slot(np.zeros((2, 2), np.int16), {"": Field(pad=-7)})
    room = slot.values().shape[1]
    slot.write(0, np.full((room, 2), 9, np.int16))
    slot.write(0, np.full((3, 2), 5, np.int16))
    assert slot.values()[0].tolist() == [[5, 5]] * 3 + [[-7, -7]] * (room - 3)
    assert slot.extents()[0].tolist() == [3, 2]


@pytest.mark.parametrize("field", [Field(pad=1), Field(ragged=True)], ids=["pad", "ragged"])
def test_samples_of_length_zero_have_a_row(field):
    slot = Slot(np.zeros((2, 4)), {"": field})
    slot.write(1, np.zeros((0, 4)))
    assert slot.extents()[1].tolist() == [0, 4]
    assert not slot.overflow


@pytest.mark.parametrize("field", [Field(pad=0), Field(ragged=True)], ids=["pad", "ragged"])
def test_a_sample_larger_than_its_row_overflows_and_says_what_it_needs(field):
    slot = Slot(np.zeros((2, 4)), {"": field})
    large, larger = np.ones((100, 4)), np.ones((200, 4))
    for row, sample in enumerate([large, larger, large]):
        slot.write(row, sample)
    assert [row for row, _ in slot.overflow.fields[0]] == [0, 1, 2]
    assert slot.overflow.needs == {0: (200, 4)}


def test_a_padded_sample_that_differs_elsewhere_overflows():
    slot = Slot(np.zeros((2, 4)), {"": Field(pad=0)})
    odd = [np.zeros((2, 5)), np.zeros(2), np.zeros((2, 4, 1)), np.zeros((2, 4), np.float32)]
    for row, sample in enumerate(odd):
        slot.write(row, sample)
    assert [value for _, value in slot.overflow.fields[0]] == odd


def test_ragged_samples_may_differ_in_every_dimension_but_not_in_their_number():
    slot = Slot(np.zeros((4, 5, 3), np.uint8), {"": Field(ragged=True)})
    for row, shape in enumerate([(5, 4, 3), (1, 60, 1), (0, 7, 3)]):
        slot.write(row, np.zeros(shape, np.uint8))
        assert slot.extents()[row].tolist() == list(shape)
    assert not slot.overflow
    slot.write(3, np.zeros((4, 5), np.uint8))
    assert slot.overflow


def test_the_overflows_of_the_spans_of_one_batch_are_merged():
    one = Overflow({0: [(1, "a")]}, [(2, "b")], {0: (3,)})
    one.merge(Overflow({0: [(4, "c")], 1: [(5, "d")]}, [(6, "e")], {0: (2,), 1: (7, 7)}))
    assert one.fields == {0: [(1, "a"), (4, "c")], 1: [(5, "d")]}
    assert one.samples == [(2, "b"), (6, "e")]
    assert one.needs == {0: (3,), 1: (7, 7)}


# -- rows to write into


def test_read_into_gets_writable_views_of_the_row_in_the_shape_of_a_sample():
    Point = namedtuple("Point", "image label")
    slot = Slot({"point": Point(np.zeros((2, 3), np.uint8), 4), "weight": 1.0, "flag": True})
    out = slot.writer.row(2)
    assert type(out["point"]) is Point
    out["point"].image[:] = 7
    out["point"].label[...] = 8
    out["weight"][...] = 0.5
    out["flag"][...] = True
    assert [slot.values(number)[2].tolist() for number in range(4)] == [[[7] * 3] * 2, 8, 0.5, True]
    base = ctypes.addressof(ctypes.c_char.from_buffer(slot.memory))
    assert out["point"].image.ctypes.data == base + slot.offsets[0] + 2 * 6


@pytest.mark.parametrize(
    ("sample", "declared"),
    [({"a": "text"}, {}), ({"a": STACKED}, {"a": Field(pad=0)}), ({"a": STACKED}, {"a": Field(ragged=True)})],
)
def test_there_is_no_row_to_write_into_where_not_every_field_is_stacked(sample, declared):
    assert not Slot(sample, declared).writer.takes_rows
    assert Slot({"a": STACKED}).writer.takes_rows
