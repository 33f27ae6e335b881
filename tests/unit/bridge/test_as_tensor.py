import gc
import warnings

import numpy as np
import pytest
import torch

from loaders.bridge import as_tensor, shares_memory
from loaders.errors import ArrayKindError, ConversionError, DtypeError, ShareError


def structured_field():
    return np.zeros(3, "u1, f8")["f1"]


def unaligned():
    return np.arange(33, dtype=np.uint8)[1:].view(np.float64)


def read_only():
    array = np.arange(3.0)
    array.flags.writeable = False
    return array


OBSTACLES = {
    "negative strides": lambda: np.arange(6.0).reshape(2, 3)[:, ::-1],
    "no multiple of its 8 bytes": structured_field,
    "unaligned": unaligned,
    "read-only": read_only,
    "is broadcast": lambda: np.broadcast_to(np.float64(7), (2, 3)),
    "foreign byte order": lambda: np.arange(3, dtype=np.dtype("i4").newbyteorder()),
}


@pytest.mark.parametrize(("said", "make"), OBSTACLES.items())
def test_what_torch_cannot_share_raises_says_why_and_what_to_do(said, make):
    with pytest.raises(ShareError, match=rf"array of shape \(.*{said}.*\n  Pass copy=True, or \w+"):
        as_tensor(make(), copy=False)


@pytest.mark.parametrize("make", OBSTACLES.values(), ids=OBSTACLES)
@pytest.mark.parametrize("copy", [None, True])
def test_what_torch_cannot_share_is_copied_with_equal_values(make, copy):
    array = make()
    tensor = as_tensor(array, copy=copy)
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert not shares_memory(tensor, array)
    tensor.fill_(1)  # a copy can be written, whatever its source


def test_share_errors_are_value_errors_and_kind_errors_type_errors():
    assert issubclass(ShareError, ValueError)
    assert issubclass(DtypeError, TypeError)
    assert issubclass(ArrayKindError, TypeError)


@pytest.mark.parametrize("falsy", [False, 0, np.False_])
def test_any_falsy_copy_but_none_refuses_to_copy(falsy):
    with pytest.raises(ShareError):
        as_tensor(read_only(), copy=falsy)


def test_both_sides_see_what_the_other_writes():
    array = np.zeros((2, 3), np.uint16)
    tensor = as_tensor(array, copy=False)
    tensor[1, 2] = 7
    array[0, 0] = 9
    assert array[1, 2] == 7
    assert tensor[0, 0].item() == 9


def test_copies_are_contiguous_whatever_the_layout_of_their_source():
    array = np.zeros((2, 3, 4)).transpose(2, 0, 1)
    assert as_tensor(array, copy=True).is_contiguous()
    array.flags.writeable = False
    assert as_tensor(array).is_contiguous()


def test_copy_true_shares_nothing_though_it_could():
    array = np.zeros(3)
    assert not shares_memory(as_tensor(array, copy=True), array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0)[:1][::-1],  # np.ascontiguousarray leaves this stride negative
        np.arange(6.0).reshape(1, 2, 3)[::-1, :, 1:2][:, :, ::-1],
        np.zeros(1, "f8, u4")["f0"],
    ],
    ids=["negative", "negative in two axes", "no multiple of the item size"],
)
def test_strides_of_axes_of_length_one_are_never_in_the_way(array):
    tensor = as_tensor(array, copy=False)
    assert tensor.shape == array.shape
    assert shares_memory(tensor, array)
    tensor.fill_(5)
    assert (array == 5).all()


def test_memory_repaired_by_new_strides_lives_as_long_as_the_tensor():
    owner = np.full(1, 3.0)
    address = owner.ctypes.data
    tensor = as_tensor(owner[::-1], copy=False)
    del owner
    gc.collect()
    others = [np.full(1, 9.0) for _ in range(100)]  # would take the place if it were free
    assert tensor.data_ptr() == address
    assert tensor.item() == 3.0
    assert len(others) == 100


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_empty_arrays_convert_whatever_their_strides_and_flags(shape):
    array = np.zeros(shape)[..., ::-1]
    array.flags.writeable = False
    assert as_tensor(array, copy=False).shape == shape
    assert as_tensor(np.zeros(shape, np.int16)).dtype == torch.int16


def test_zero_dimensional_arrays_share():
    array = np.array(1.5)
    tensor = as_tensor(array, copy=False)
    tensor.fill_(2.5)
    assert tensor.shape == ()
    assert array == 2.5


def test_numpy_scalars_are_read_only_values():
    assert as_tensor(np.float32(1.5)).item() == 1.5
    assert as_tensor(np.float32(1.5)).dtype == torch.float32
    with pytest.raises(ShareError, match="read-only"):
        as_tensor(np.float32(1.5), copy=False)


@pytest.mark.parametrize("value", [1, 1.5, True, [1, 2], (1, 2), "x", None, b"x"])
def test_python_values_are_refused_with_the_remedy(value):
    with pytest.raises(ArrayKindError, match=r"not \w+\.\n  Pass np\.asarray"):
        as_tensor(value)


def test_tensors_are_refused():
    with pytest.raises(ArrayKindError, match="tensor already"):
        as_tensor(torch.zeros(3))


@pytest.mark.parametrize("mask", [np.ma.nomask, [False, True]])
@pytest.mark.parametrize("copy", [False, None, True])
def test_masked_arrays_are_refused_masked_or_not(mask, copy):
    with pytest.raises(ArrayKindError, match=r"filled\(value\)"):
        as_tensor(np.ma.MaskedArray([1.0, 2.0], mask), copy=copy)


class Hostile(np.ndarray):
    """A subclass whose own methods must not be called."""

    def view(self, *args, **kwargs):
        raise AssertionError

    def copy(self, *args, **kwargs):
        raise AssertionError

    def __getitem__(self, key):
        raise AssertionError


def test_subclasses_are_taken_as_the_plain_array_they_extend():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of np.matrix itself
        matrix = np.matrix([[1.0, 2.0]])
    for array in (matrix, np.zeros(3).view(Hostile)):
        assert shares_memory(as_tensor(array, copy=False), np.asarray(array))
        assert not shares_memory(as_tensor(array, copy=True), np.asarray(array))


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(1000, dtype=np.int32))
    return path


def test_writeable_memmap_is_shared_and_outlives_the_memmap_object(npy):
    mapped = np.load(npy, mmap_mode="r+")
    tensor = as_tensor(mapped, copy=False)
    tensor[3] = -1
    mapped.flush()
    del mapped
    gc.collect()
    assert tensor.tolist()[2:5] == [2, -1, 4]
    assert np.load(npy)[3] == -1


def test_read_only_memmap_is_copied_or_refused_with_the_mode_that_helps(npy):
    mapped = np.load(npy, mmap_mode="r")
    with pytest.raises(ShareError, match="mode='r\\+' or 'c'"):
        as_tensor(mapped, copy=False)
    tensor = as_tensor(mapped)
    tensor.fill_(0)
    assert mapped[3] == 3


def test_copy_on_write_memmap_is_shared_and_leaves_the_file_alone(npy):
    tensor = as_tensor(np.load(npy, mmap_mode="c"), copy=False)
    tensor.fill_(0)
    assert np.load(npy)[3] == 3


def test_no_warning_escapes_for_read_only_arrays():
    # torch warns once per process; `set_warn_always` makes that every time. Warnings are errors in this suite.
    torch.set_warn_always(True)
    try:
        as_tensor(read_only())
        as_tensor(np.broadcast_to(np.zeros(1), 3))
        as_tensor(np.float64(1))
        as_tensor(np.frombuffer(b"", np.uint8))
    finally:
        torch.set_warn_always(False)


def test_results_of_broadcast_arrays_are_copied_without_the_warning_numpy_has_for_them():
    stretched, _ = np.broadcast_arrays(np.zeros(1), np.zeros(3))
    reshaped, _ = np.broadcast_arrays(np.zeros(3), np.zeros((1, 3)))
    for array, reason in ((stretched, "is broadcast"), (reshaped, "is read-only")):
        assert not shares_memory(as_tensor(array), array)
        with pytest.raises(ShareError, match=reason):
            as_tensor(array, copy=False)


def test_overlapping_windows_that_were_made_writeable_are_shared():
    base = np.zeros(4)
    tensor = as_tensor(np.lib.stride_tricks.as_strided(base, (3, 2), (8, 8)), copy=False)
    tensor[0, 1] = 5
    assert tensor[1, 0].item() == 5
    assert base[1] == 5


def test_fields_and_dtypes_that_need_another_dtype_name_the_remedy():
    with pytest.raises(DtypeError, match=r'array\["name"\]'):
        as_tensor(np.zeros(2, "i4, f4"))
    with pytest.raises(DtypeError, match=r"view\(np\.int64\)"):
        as_tensor(np.zeros(2, "M8[D]"))


def test_a_foreign_byte_order_keeps_values_not_bytes():
    swapped = np.array([1, 256, -2], np.dtype(np.int16).newbyteorder())
    assert as_tensor(swapped).tolist() == [1, 256, -2]
    complex_swapped = np.array([1 + 2j], np.dtype(np.complex64).newbyteorder())
    assert as_tensor(complex_swapped).tolist() == [1 + 2j]


def test_a_default_device_does_not_move_the_tensor():
    with torch.device("meta"):
        assert as_tensor(np.zeros(3)).device.type == "cpu"
        assert as_tensor(np.zeros(3), copy=True).device.type == "cpu"


def test_every_conversion_error_has_the_common_base():
    for wrong in ([1], np.zeros(1, object), np.ma.zeros(3)):
        with pytest.raises(ConversionError):
            as_tensor(wrong)
