import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from loaders import Field, Padded, Ragged, numpy_collate, to_numpy
from loaders.batch.assemble import assemble, collate_privately, samples_of
from loaders.batch.rows import Overflow, RowWriter
from loaders.batch.spec import BatchSpec
from loaders.errors import FieldDtypeError, FieldNameError, FieldShapeError
from loaders.nested import leaves, map_tree

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass
class Photo:
    image: object
    label: int


class Filled:
    """Samples written into memory of their own, a block per field."""

    def __init__(self, samples, declared=None, first=None):
        self.rows = len(samples)
        self.spec = BatchSpec.from_sample(samples[0] if first is None else first, declared)
        sizes = self.spec.sizes(self.rows)
        self.memory = bytearray(sum(sizes) + 64 * len(sizes))
        offsets = np.cumsum([0] + [-(-size // 64) * 64 for size in sizes])[:-1].tolist()
        self.blocks = [
            memoryview(self.memory)[at : at + size] if size else None for at, size in zip(offsets, sizes, strict=True)
        ]
        self.overflow = Overflow()
        writer = RowWriter(self.spec, self.memory, offsets, self.rows)
        for row, sample in enumerate(samples):
            writer.write(row, sample, self.overflow)

    def batch(self, collate=default_collate):
        return assemble(self.spec, self.blocks, self.rows, self.overflow, named, collate)

    def holds(self, tensor):
        start = np.frombuffer(self.memory, np.uint8).ctypes.data
        return start <= tensor.data_ptr() <= start + len(self.memory) - tensor.nbytes


def named(row):
    return 100 + row, f"photo/{100 + row}"


def equal(one, other):
    assert type(one) is type(other)
    paths = [path for path, _ in leaves(one)]
    assert paths == [path for path, _ in leaves(other)]
    for (_, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


SAMPLES = {
    "array": lambda i: np.full((2, 3), i, np.uint8),
    "bfloat16": lambda i: torch.full((2,), i + 0.5, dtype=torch.bfloat16),
    "number": lambda i: i,
    "text": lambda i: f"text {i}",
    "dict": lambda i: {"x": np.full(2, i), "y": 0.5 * i, "z": i > 1},
    "ordered": lambda i: OrderedDict(b=i, a=np.float32(i)),
    "tuple": lambda i: (np.full(2, i), i),
    "list": lambda i: [i, [i, (i,)]],
    "namedtuple": lambda i: Pair(np.full(2, i), i),
    "nested": lambda i: {"a": (i, {"b": Pair(np.full((1, 2), i), "t")}), "c": [torch.full((), i)]},
    "scalars": lambda i: {"f": np.float16(i), "u": np.uint8(i), "b": np.bool_(i % 2)},
    "no bytes": lambda i: {"x": np.zeros((0, 4), np.float32), "n": i},
}


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_batch_is_that_of_default_collate(make, rows):
    samples = [make(i) for i in range(rows)]
    equal(Filled(samples).batch(), default_collate(samples))


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_so_is_a_batch_that_lies_in_no_slot(make):
    samples = [make(i) for i in range(3)]
    spec = BatchSpec.from_sample(samples[0])
    equal(collate_privately(spec, samples, named), default_collate(samples))
    equal(collate_privately(None, samples, named), default_collate(samples))


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_the_samples_can_be_had_again(make):
    samples = [make(i) for i in range(3)]
    filled = Filled(samples)
    again = samples_of(filled.spec, filled.blocks, filled.rows, filled.overflow)
    equal(default_collate(again), default_collate(samples))
    assert [type(each) for each in again] == [type(each) for each in samples]


def test_a_dataclass_of_arrays_comes_out_as_a_dataclass_of_tensors():
    batch = Filled([Photo(np.full(2, i), i) for i in range(3)]).batch()
    assert type(batch) is Photo
    assert batch.image.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch.label.tolist() == [0, 1, 2]


def test_every_tensor_lies_in_the_memory_that_was_written():
    filled = Filled(
        [{"x": np.full((2, 3), i, np.float32), "n": i, "h": torch.ones(2, dtype=torch.bfloat16)} for i in range(3)]
    )
    assert all(filled.holds(tensor) for tensor in filled.batch().values())


# -- padded


BOXES = [np.full((count, 4), count, np.float32) for count in (2, 0, 5)]


def test_padded_samples_are_filled_up_to_the_longest_of_the_batch():
    filled = Filled([{"boxes": boxes} for boxes in BOXES], {"boxes": Field(pad=-1)})
    boxes = filled.batch()["boxes"]
    assert type(boxes) is Padded
    assert boxes.values.shape == (3, 5, 4)
    assert boxes.counts.tolist() == [2, 0, 5]
    for row, sample in enumerate(BOXES):
        assert np.array_equal(boxes.values[row, : len(sample)], sample)
        assert (boxes.values[row, len(sample) :] == -1).all()
    assert boxes.mask.dtype == torch.bool
    assert boxes.mask.tolist() == [[row < count for row in range(5)] for count in (2, 0, 5)]
    assert filled.holds(boxes.values[:, 0])
    assert filled.holds(boxes.counts[:1])


def test_a_batch_of_empty_samples_is_padded_to_nothing():
    boxes = Filled([BOXES[1]] * 3, {"": Field(pad=0)}).batch()
    assert boxes.values.shape == (3, 0, 4)
    assert boxes.counts.tolist() == [0, 0, 0]
    assert boxes.mask.shape == (3, 0)


def test_padding_of_a_bfloat16_is_its_value_not_its_bits():
    samples = [torch.full((count,), 2.0, dtype=torch.bfloat16) for count in (1, 3)]
    for field in (
        Filled(samples, {"": Field(pad=-1.5)}),
        Filled([*samples, torch.ones(99).bfloat16()], {"": Field(pad=-1.5)}),
    ):
        assert field.batch().values[0, :3].tolist() == [2.0, -1.5, -1.5]


# -- ragged


IMAGES = [np.full(shape, number, np.uint8) for number, shape in enumerate([(4, 5, 3), (2, 2, 1), (0, 9, 3), (5, 4, 3)])]


def test_ragged_samples_are_views_of_their_rows():
    filled = Filled(IMAGES, {"": Field(ragged=True)})
    images = filled.batch()
    assert type(images) is Ragged
    for image, tensor in zip(IMAGES, images, strict=True):
        assert np.array_equal(tensor, image)
        assert tensor.shape == image.shape
        assert tensor.is_contiguous()
        assert filled.holds(tensor) or not tensor.numel()  # torch gives empty tensors no address


def test_the_flat_form_is_a_copy_with_offsets():
    points = [np.arange(2 * count, dtype=np.int16).reshape(count, 2) for count in (3, 0, 1)]
    ragged = Filled(points, {"": Field(ragged=True)}).batch()
    values, offsets = ragged.flat()
    assert (values.dtype, values.shape) == (torch.int16, (4, 2))
    assert (offsets.dtype, offsets.tolist()) == (torch.int64, [0, 3, 3, 4])
    for number, sample in enumerate(points):
        assert np.array_equal(values[offsets[number] : offsets[number + 1]], sample)
    values.zero_()
    assert ragged[0].any()


def test_ragged_tensors_keep_their_dtype():
    samples = [torch.full((count,), 1.5, dtype=torch.bfloat16) for count in (2, 4)]
    ragged = Filled(samples, {"": Field(ragged=True)}).batch()
    assert [(each.dtype, each.tolist()) for each in ragged] == [(torch.bfloat16, each.tolist()) for each in samples]


# -- overflow


@pytest.mark.parametrize("field", [Field(pad=-1), Field(ragged=True)], ids=["pad", "ragged"])
def test_a_sample_larger_than_its_row_changes_nothing_but_the_memory(field):
    samples = [np.full((count, 2), count, np.int16) for count in (2, 500, 0)]
    filled = Filled(samples, {"": field})
    assert len(filled.overflow.fields[0]) == 1
    roomy = Filled(samples, {"": field}, first=samples[1])
    assert not roomy.overflow
    equal(filled.batch(), roomy.batch())


def test_the_other_fields_stay_in_the_slot_when_one_overflows():
    samples = [{"a": np.full(2, i, np.float32), "b": np.full(2, i)} for i in range(3)]
    samples[1]["b"] = np.zeros(2, np.float64)
    filled = Filled(samples)
    batch = filled.batch()
    assert filled.holds(batch["a"])
    assert not filled.holds(batch["b"])
    equal(batch, default_collate(samples))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_mixtures_that_torch_promotes_come_out_as_torch_makes_them(position):
    for usual, odd in ((1, 2.5), (1, True), (np.float32(1), np.float64(2)), (True, 3), (0.5, 1)):
        samples = [{"n": usual, "x": np.full(2, i)} for i in range(3)]
        samples[position]["n"] = odd
        equal(Filled(samples, first={"n": usual, "x": np.zeros(2, int)}).batch(), default_collate(samples))


def test_containers_that_torch_accepts_as_a_mixture_come_out_as_torch_makes_them():
    samples = [{"a": 1, "b": 2}, {"b": 4, "a": 3}, {"a": 5, "b": 6, "extra": 7}]
    equal(Filled(samples).batch(), default_collate(samples))
    samples = [(1, 2), [3, 4]]
    equal(Filled(samples).batch(), default_collate(samples))


def test_a_batch_never_shares_the_memory_of_the_dataset():
    whole = np.zeros((500, 2), np.int16)
    whole.flags.writeable = False
    for field in (Field(pad=0), Field(ragged=True)):
        filled = Filled([whole[:2], whole, whole[::2]], {"": field})
        assert len(filled.overflow.fields[0]) == 2
        for _, tensor in leaves(filled.batch()):
            assert not np.shares_memory(tensor.numpy(), whole)


# -- errors


@pytest.mark.parametrize(
    ("usual", "odd", "error", "says"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3)), FieldShapeError, r"shape \(3, 3\), expected \(2, 3\)"),
        (np.zeros(2), "text", FieldDtypeError, "str 'text' does not match float64 array"),
        (3, "text", FieldDtypeError, "str 'text' does not match int 3"),
        (np.zeros(2), None, FieldDtypeError, "NoneType None does not match float64 array"),
        (np.array(["a"]), np.array(["b"]), FieldDtypeError, "cannot be collated"),
    ],
)
def test_samples_that_do_not_go_together_are_named(usual, odd, error, says):
    samples = [{"meta": {"x": value}, "n": 1} for value in (usual, usual, odd)]
    with pytest.raises(error, match=says) as caught:
        Filled(samples).batch()
    assert caught.value.field == "meta.x"
    if says != "cannot be collated":
        assert (caught.value.index, caught.value.source) == (102, "photo/102")
        assert 'sample 102 ("photo/102"), field "meta.x"' in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("odd", "field", "says"),
    [
        ({"a": 1}, None, r"has dict\(a\), expected dict\(a, b\)"),
        (3, None, r"has int, expected dict\(a, b\)"),
        ({"a": 1, "b": {"d": 2}}, "b", r"has dict\(d\), expected dict\(c\)"),
    ],
)
def test_a_sample_with_other_fields_is_named(odd, field, says):
    usual = {"a": 1, "b": {"c": 2}}
    with pytest.raises(FieldNameError, match=says) as caught:
        Filled([usual, odd, usual]).batch()
    assert caught.value.index == 101
    assert (caught.value.field or None) == field


@pytest.mark.parametrize(
    ("declared", "odd", "error", "says"),
    [
        (Field(pad=0), np.zeros((2, 5), np.float32), FieldShapeError, r"shape \(2, 5\), expected \(…, 4\)"),
        (Field(pad=0), np.zeros(2, np.float32), FieldShapeError, r"shape \(2,\), expected \(…, 4\)"),
        (Field(pad=0), np.zeros((2, 4)), FieldDtypeError, "float64 array of shape .*, expected float32"),
        (
            Field(ragged=True),
            np.zeros((2, 4, 1), np.float32),
            FieldShapeError,
            r"shape \(2, 4, 1\), expected 2 dimensions",
        ),
        (Field(ragged=True), np.zeros((2, 4), np.int32), FieldDtypeError, "int32 array of shape .*, expected float32"),
        (Field(ragged=True), torch.zeros(2, 4), FieldDtypeError, "float32 tensor .*, expected float32 ndarray"),
        (Field(ragged=True), None, FieldDtypeError, "None.*, expected float32 ndarray"),
    ],
)
def test_what_cannot_be_padded_or_ragged_with_the_others_is_named(declared, odd, error, says):
    samples = [{"boxes": boxes} for boxes in (*BOXES, odd)]
    with pytest.raises(error, match=says) as caught:
        Filled(samples, {"boxes": declared}).batch()
    assert (caught.value.index, caught.value.field) == (103, "boxes")


NOT_FOR_NUMPY_COLLATE = {
    "another dtype": ({"x": np.zeros(2, np.float32)}, {"x": np.zeros(2, np.float64)}, FieldDtypeError, "x"),
    "another field": ({"x": 1}, {"x": 1, "y": 2}, FieldNameError, ""),
    "a mask": ({"x": np.zeros(2)}, {"x": np.ma.masked_array([1.0, 2.0], [True, False])}, FieldDtypeError, "x"),
}


@pytest.mark.parametrize(("usual", "odd", "error", "field"), NOT_FOR_NUMPY_COLLATE.values(), ids=NOT_FOR_NUMPY_COLLATE)
def test_what_numpy_collate_refuses_and_torch_accepts_is_refused_only_where_it_was_asked_for(usual, odd, error, field):
    filled = Filled([usual, odd])
    equal(filled.batch(), default_collate([usual, odd]))
    with pytest.raises(error, match="sample 101") as caught:
        filled.batch(numpy_collate)
    assert caught.value.field == field


def test_what_numpy_collate_accepts_and_torch_refuses_is_made_where_it_was_asked_for():
    samples = [np.full(3, number, ">f4") for number in range(2)]
    equal(Filled(samples).batch(numpy_collate), numpy_collate(samples))
    with pytest.raises(FieldDtypeError, match="byte order"):
        Filled(samples).batch()


# -- the rest of the library


def test_padded_and_ragged_keep_their_types_under_map_tree_and_to_numpy():
    batch = {
        "pad": Filled(BOXES, {"": Field(pad=0)}).batch(),
        "ragged": Filled(IMAGES, {"": Field(ragged=True)}).batch(),
    }
    mapped = map_tree(lambda tensor: tensor + 1, batch)
    assert (type(mapped["pad"]), type(mapped["ragged"])) == (Padded, Ragged)
    assert mapped["pad"].counts.tolist() == [3, 1, 6]
    arrays = to_numpy(batch)
    assert (type(arrays["pad"]), type(arrays["ragged"])) == (Padded, Ragged)
    assert isinstance(arrays["pad"].mask, np.ndarray)
    assert arrays["pad"].mask.tolist() == batch["pad"].mask.tolist()
    assert [image.shape for image in arrays["ragged"]] == [image.shape for image in IMAGES]


def test_mask_and_flat_form_are_made_on_the_device_of_the_values():
    device = torch.device("meta")
    pad = map_tree(lambda tensor: tensor.to(device), Filled(BOXES, {"": Field(pad=0)}).batch())
    assert pad.mask.device == device
    ragged = map_tree(lambda tensor: tensor.to(device), Filled(BOXES, {"": Field(ragged=True)}).batch())
    values, offsets = ragged.flat()
    assert (values.device, offsets.device) == (device, device)
