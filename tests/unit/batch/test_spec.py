import dataclasses
import pickle
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from loaders import Field
from loaders.batch.spec import TORCH_DTYPES, BatchSpec, closed, is_plain, tensor_as_array

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass
class Photo:
    image: object
    label: int
    note: str = dataclasses.field(default="", init=False)


IMAGE = np.zeros((4, 5, 3), np.uint8)
SAMPLES = {
    "array": IMAGE,
    "number": 3,
    "dict": {"image": IMAGE, "label": 3},
    "ordered": OrderedDict(label=3, image=IMAGE),
    "tuple": (IMAGE, 3),
    "list": [IMAGE, 3.5],
    "namedtuple": Pair(IMAGE, 3),
    "dataclass": Photo(IMAGE, 3),
    "nested": {"a": [IMAGE, {"b": (1, 2.0, True)}], "c": Pair(np.float32(1), "text")},
    "empty": {},
    "empty below": {"image": IMAGE, "meta": {}, "none": ()},
    "keys that are no strings": {0: IMAGE, ("a", 1): 3},
    "of a sample that is None": None,
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_a_sample_comes_apart_and_together_again(sample):
    spec = BatchSpec.from_sample(sample)
    leaves = spec.flatten(sample)
    assert len(leaves) == len(spec.fields)
    again = spec.unflatten(leaves)
    assert type(again) is type(sample)
    assert spec.flatten(again) == leaves
    assert repr(again) == repr(sample)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_a_spec_survives_its_way_to_a_worker(sample):
    spec = BatchSpec.from_sample(sample)
    spec.flatten(sample)
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec
    assert copy.flatten(sample) == spec.flatten(sample)


@pytest.mark.parametrize("one", SAMPLES, ids=str)
@pytest.mark.parametrize("other", SAMPLES, ids=str)
def test_a_sample_with_another_container_does_not_fit(one, other):
    spec = BatchSpec.from_sample(SAMPLES[one])
    fits = spec.flatten(SAMPLES[other]) is not None
    # A spec of one bare leaf takes anything: what it cannot hold is the field's matter.
    assert fits == (one == other or type(spec.skeleton) is int)


@pytest.mark.parametrize(
    "wrap", [dict, lambda sample: {"below": sample}, OrderedDict], ids=["flat", "nested", "ordered"]
)
def test_dicts_fit_with_the_same_keys_in_the_same_order(wrap):
    spec = BatchSpec.from_sample(wrap({"a": 1, "b": 2}))
    assert spec.flatten(wrap({"a": 10, "b": 20})) == [10, 20]
    for other in ({"b": 20, "a": 10}, {"a": 10, "c": 20}, {"a": 10}, {"a": 10, "b": 20, "c": 30}):
        assert spec.flatten(wrap(other)) is None


def test_a_nested_container_of_another_type_or_length_does_not_fit():
    spec = BatchSpec.from_sample({"a": (1, 2), "b": [3]})
    assert spec.flatten({"a": [1, 2], "b": [3]}) is None
    assert spec.flatten({"a": (1, 2, 3), "b": [3]}) is None
    assert spec.flatten({"a": 1, "b": [3]}) is None


def test_fields_are_named_by_their_path():
    spec = BatchSpec.from_sample({"image": IMAGE, "meta": {"boxes": [1, 2]}, "pair": Pair(0, 1)})
    assert [field.path for field in spec.fields] == [
        "image", "meta.boxes.0", "meta.boxes.1", "pair.image", "pair.label"
    ]  # fmt: skip


def test_containers_of_other_kinds_travel_whole():
    spec = BatchSpec.from_sample({"a": UserDict(x=1), "b": "text", "c": b"bytes", "d": {1, 2}, "e": range(3)})
    assert [field.kind for field in spec.fields] == ["object"] * 5
    assert spec.sizes(8) == [0] * 5


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_rows_have_the_dtype_that_torch_gives_the_batch(name):
    array = np.zeros((2,), name)
    for value in (array, array[0], array[0, ...]):
        [field] = BatchSpec.from_sample(value).fields
        if name == "uint64" and not isinstance(value, np.ndarray):
            continue  # torch makes a batch of uint64 arrays, but none of uint64 scalars
        batch = default_collate([value, value])
        assert (field.kind, field.dtype.name) == ("stack", name)
        assert f"torch.{field.torch_dtype}" == str(batch.dtype)
        assert field.shape == batch.shape[1:]


@pytest.mark.parametrize("value", [True, 3, 2.5, -(2**63)], ids=repr)
def test_python_numbers_have_the_dtype_that_torch_gives_them(value):
    [field] = BatchSpec.from_sample(value).fields
    assert f"torch.{field.torch_dtype}" == str(default_collate([value, value]).dtype)
    assert (field.kind, field.leaf, field.shape) == ("stack", type(value).__name__, ())


STORED = [d for d in vars(torch).values() if isinstance(d, torch.dtype)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", sorted({d for d in STORED if "q" not in str(d)}, key=str), ids=str)
def test_a_plain_tensor_of_every_dtype_has_rows_of_its_size(dtype):
    tensor = torch.empty((2, 3), dtype=dtype)
    [field] = BatchSpec.from_sample(tensor).fields
    assert (field.kind, field.leaf, field.shape) == ("stack", "tensor", (2, 3))
    assert f"torch.{field.torch_dtype}" == str(dtype)
    assert field.dtype.itemsize == dtype.itemsize
    array, name = tensor_as_array(tensor)
    assert (array.ctypes.data, name) == (tensor.data_ptr(), field.torch_dtype)


def test_dtypes_and_tensors_that_rows_cannot_hold_overflow():
    values = [
        np.zeros(3, np.dtype("f4").newbyteorder("S")),
        np.zeros(3, np.longdouble),
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, [("a", "i4")]),
        np.zeros(2, "M8[s]"),
        np.str_("a"),
        np.bytes_(b"a"),
        np.ma.masked_array([1.0, 2.0], [False, True]),
        1 + 2j,
        None,
        torch.zeros(3, requires_grad=True),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ]
    for value in values:
        [field] = BatchSpec.from_sample([value]).fields
        assert field.kind == "object", value


def test_only_tensors_that_are_nothing_but_memory_are_plain():
    complex_zeros = torch.zeros(2, dtype=torch.complex64)
    assert is_plain(torch.zeros(2, 3).t())
    assert not is_plain(complex_zeros.conj())
    assert not is_plain(complex_zeros.conj().imag)  # carries the neg bit
    assert not is_plain(torch.zeros(2, requires_grad=True))


# -- declared fields


def test_declared_fields_have_room_to_grow_and_keep_their_dimensions():
    sample = {"boxes": np.zeros((20, 4), np.float32), "image": IMAGE, "n": 1}
    spec = BatchSpec.from_sample(sample, {"boxes": Field(pad=-1), "image": Field(ragged=True)})
    boxes, image, _ = spec.fields
    assert (boxes.kind, boxes.ndim, boxes.pad) == ("pad", 2, -1)
    assert boxes.shape[0] > 20
    assert boxes.shape[1:] == (4,)
    assert (image.kind, image.ndim) == ("ragged", 3)
    assert image.shape[1] > IMAGE.size


def test_an_empty_first_sample_still_gets_room():
    sample = {"a": np.zeros((0, 4)), "b": np.zeros((0, 4))}
    spec = BatchSpec.from_sample(sample, {"a": Field(pad=0), "b": Field(ragged=True)})
    assert spec.fields[0].shape == (8, 4)
    assert spec.fields[1].shape[1] >= 64


@pytest.mark.parametrize(
    "nothing", [[], (), np.zeros(0, np.int8), torch.zeros(0)], ids=["list", "tuple", "array", "tensor"]
)
def test_of_a_first_sample_without_rows_nothing_is_known_until_one_has_some(nothing):
    spec = BatchSpec.from_sample({"a": nothing, "b": nothing}, {"a": Field(pad=300), "b": Field(ragged=True)})
    assert [(field.kind, field.is_open) for field in spec.fields] == [("pad", True), ("ragged", True)]
    seen = [closed(field, np.zeros((2, 5), np.int16)) for field in spec.fields]
    known = BatchSpec.from_sample(
        {"a": np.zeros((2, 5), np.int16), "b": np.zeros((2, 5), np.int16)},
        {"a": Field(pad=300), "b": Field(ragged=True)},
    )
    grown = spec.grown(dict(enumerate(seen)))
    assert grown.fields == known.fields
    assert grown.grown(dict(enumerate(seen))) is grown
    for nobody in ([], np.zeros(0), 3, np.float32(1), np.zeros(()), [[1, 2]], "text"):
        assert closed(spec.fields[0], nobody) is spec.fields[0]


def test_a_nested_field_is_declared_by_its_path():
    sample = {"meta": {"boxes": np.zeros((2, 4))}, "pair": (1, torch.zeros(3))}
    spec = BatchSpec.from_sample(sample, {"meta.boxes": Field(ragged=True), "pair.1": Field(pad=0)})
    assert [field.kind for field in spec.fields] == ["ragged", "stack", "pad"]


def test_declaring_a_field_that_is_not_there_says_what_is():
    with pytest.raises(ValueError, match=r"declares 'box'.* has 'boxes', 'meta\.n'"):
        BatchSpec.from_sample({"boxes": np.zeros(3), "meta": {"n": 1}}, {"box": Field(pad=0)})


@pytest.mark.parametrize(
    "value", [3, "text", np.float32(1), np.array(1), torch.tensor(1), None, np.array(["a"])], ids=repr
)
def test_declaring_what_has_no_rows_of_its_own_says_so(value):
    with pytest.raises(ValueError, match="field 'x' is declared ragged but the first sample holds"):
        BatchSpec.from_sample({"x": value}, {"x": Field(ragged=True)})


@pytest.mark.parametrize("arguments", [{}, {"pad": 0, "ragged": True}, {"ragged": False}])
def test_a_field_is_either_padded_or_ragged(arguments):
    with pytest.raises(ValueError, match="exactly one"):
        Field(**arguments)


@pytest.mark.parametrize(
    ("dtype", "pad"),
    [("uint8", -1), ("uint8", 256), ("int32", 0.5), ("int64", float("nan")), ("bool", 2), ("int8", float("inf"))],
)
def test_a_pad_value_that_the_dtype_cannot_hold_is_refused(dtype, pad):
    with pytest.raises(ValueError, match=f"'x' holds {dtype}, which cannot hold pad={pad}"):
        BatchSpec.from_sample({"x": np.zeros(3, dtype)}, {"x": Field(pad=pad)})


def test_the_pad_value_of_a_dtype_that_numpy_lacks_is_kept_as_its_bits():
    [field] = BatchSpec.from_sample(torch.zeros(3, dtype=torch.bfloat16), {"": Field(pad=-1.5)}).fields
    assert torch.tensor(field.pad, dtype=torch.int16).view(torch.bfloat16).item() == -1.5


# -- layout and growth


def test_no_two_rows_and_no_extents_share_a_byte():
    for declared in ({}, {"x": Field(pad=0)}, {"x": Field(ragged=True)}):
        [field] = BatchSpec.from_sample({"x": np.zeros((3, 4), np.int16)}, declared).fields
        rows = 5
        buffer = bytearray(field.nbytes(rows))
        field.values(buffer, 0, rows)[:] = -1
        if declared:
            assert field.values_offset(rows) % 64 == 0
            assert not field.extents(buffer, 0, rows).any()
            assert sum(buffer) == 255 * (field.nbytes(rows) - field.values_offset(rows))
        else:
            assert set(buffer) == {255}


def test_growing_gives_half_as_much_again_as_was_needed():
    sample = {"pad": np.zeros((4, 2)), "ragged": np.zeros((2, 2, 2)), "n": 1}
    spec = BatchSpec.from_sample(sample, {"pad": Field(pad=0), "ragged": Field(ragged=True)})
    grown = spec.grown({0: (100, 2), 1: (10, 10, 10)})
    assert grown.fields[0].shape == (151, 2)
    assert grown.fields[1].shape == (3, 1501)
    assert grown.fields[2] == spec.fields[2]
    assert grown.skeleton == spec.skeleton


def test_rows_never_shrink_and_a_spec_that_need_not_grow_is_itself():
    spec = BatchSpec.from_sample({"x": np.zeros((100, 2))}, {"x": Field(pad=0)})
    assert spec.grown({0: (4, 2)}) is spec


def test_a_pickled_spec_carries_its_fields_and_nothing_that_was_computed_from_them():
    spec = BatchSpec.from_sample({"image": np.zeros((2, 3), np.uint8), "label": 1})
    before = pickle.dumps(spec)
    assert spec.flatten({"image": np.ones((2, 3), np.uint8), "label": 2}) is not None  # which computes some
    assert pickle.dumps(spec) == before
    assert pickle.loads(before) == spec
