"""Whatever the dtype, shape and strides: values survive, and memory is shared exactly as promised."""

import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from loaders.bridge import as_array, as_tensor, shares_memory
from loaders.bridge.dtypes import SHARED
from loaders.errors import ShareError

DTYPES = st.sampled_from([np.dtype(name).newbyteorder(order) for name in SHARED for order in "=S"])
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw):
    """An array of random dtype, seen through random slices, axis orders, broadcasts, offsets and flags."""
    dtype = draw(DTYPES)
    array = draw(npst.arrays(dtype, draw(SHAPES)))
    if draw(st.booleans()):  # a field of packed records: odd strides, often unaligned
        records = np.zeros(array.shape, [("pad", "u1"), ("value", dtype)])
        records["value"] = array
        array = records["value"]
    if array.ndim:
        array = array[draw(npst.basic_indices(array.shape, allow_newaxis=True, max_dims=5))]
    array = np.asarray(array).transpose(draw(st.permutations(range(np.ndim(array)))))
    if draw(st.integers(0, 5)) == 0:
        array = np.broadcast_to(array, (2, *array.shape))
    if draw(st.integers(0, 5)) == 0:
        array = array.view()
        array.flags.writeable = False
    return array


@st.composite
def tensors(draw):
    """A strided tensor of random dtype, seen through random slices, axis orders and expansions."""
    base = draw(npst.arrays(np.dtype(draw(st.sampled_from(list(SHARED)))), draw(SHAPES)))
    tensor = torch.from_numpy(base.copy())
    for axis in range(tensor.ndim):
        start = draw(st.integers(0, max(tensor.shape[axis] - 1, 0)))
        tensor = tensor.movedim(axis, 0)[start :: draw(st.integers(1, 3))].movedim(0, axis)
    tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if draw(st.booleans()):
        tensor = tensor.expand(2, *tensor.shape)
    if tensor.is_complex() and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


def sharable(array):
    """The promise in other words: it is writable, torch can address it, and no two elements overlap."""
    steps = [step for step, length in zip(array.strides, array.shape, strict=True) if length > 1]
    regular = all(step > 0 and step % array.itemsize == 0 for step in steps) and array.flags.aligned
    return array.dtype.isnative and (array.size == 0 or (array.flags.writeable and regular))


@settings(max_examples=300, deadline=None)
@given(arrays())
def test_as_tensor_keeps_values_and_shares_exactly_where_it_can(array):
    before = array.copy()
    copied = as_tensor(array, copy=True)
    assert not shares_memory(copied, array)
    default = as_tensor(array)
    np.testing.assert_array_equal(copied.numpy(), array)
    np.testing.assert_array_equal(default.numpy(), array)
    assert default.shape == array.shape
    try:
        shared = as_tensor(array, copy=False)
    except ShareError:
        assert not sharable(array)
        assert not shares_memory(default, array)
        default.fill_(1)
    else:
        assert sharable(array)
        assert shares_memory(default, array) == shares_memory(shared, array) == (array.size > 0)
        if array.size:
            shared.fill_(1)
            assert (array == 1).all()
            array[...] = before
            np.testing.assert_array_equal(shared.numpy(), before)
    copied.fill_(0)
    np.testing.assert_array_equal(array, before)


@settings(max_examples=300, deadline=None)
@given(tensors())
def test_as_array_keeps_values_and_shares_exactly_where_it_can(tensor):
    before = tensor.clone()
    copied = as_array(tensor, copy=True)
    assert not shares_memory(copied, tensor)
    default = as_array(tensor)
    for array in (copied, default):
        np.testing.assert_array_equal(array, before.resolve_conj().numpy())
    try:
        shared = as_array(tensor, copy=False)
    except ShareError:
        assert tensor.is_conj()
        default[...] = 1
    else:
        assert shares_memory(default, tensor) == shares_memory(shared, tensor) == (tensor.numel() > 0)
        expanded = any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True))
        assert shared.flags.writeable != expanded
        if not expanded:
            shared[...] = 1
            assert (tensor == 1).all()
            tensor.copy_(before)
    copied[...] = 0
    np.testing.assert_array_equal(as_array(tensor, copy=True), before.resolve_conj().numpy())


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_a_shared_array_goes_back_to_the_same_memory(tensor):
    array = as_array(tensor)
    if not sharable(array):
        return
    again = as_tensor(array, copy=False)
    assert again.data_ptr() == array.ctypes.data or not array.size
    assert shares_memory(again, array) == (array.size > 0)
