import time
import warnings

import numpy as np
import pytest
import torch

from loaders.bridge import shares_memory, sharing
from loaders.errors import ArrayKindError


def test_arrays_and_tensors_in_any_mixture():
    array = np.zeros(4)
    tensor = torch.from_numpy(array)
    for a in (array, tensor, array[1:], tensor[1:], array[::-1]):
        for b in (array, tensor, tensor.view(torch.int64), tensor.detach()):
            assert shares_memory(a, b)
            assert not shares_memory(a, torch.zeros(4))
            assert not shares_memory(np.zeros(4), b)


def test_interleaved_views_share_nothing_though_their_bounds_overlap():
    array = np.zeros(10)
    tensor = torch.from_numpy(array)
    assert np.may_share_memory(array[::2], array[1::2])
    assert not shares_memory(tensor[::2], array[1::2])
    assert not shares_memory(tensor[::2], tensor[1::2])
    assert shares_memory(tensor[::2], tensor[::3])
    columns = torch.zeros(4, 4)
    assert not shares_memory(columns[:, 0], columns[:, 1])
    assert shares_memory(columns[:, 0], columns[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex128])
def test_dtypes_that_numpy_lacks_are_compared_too(dtype):
    tensor = torch.zeros(4, dtype=torch.complex128).view(torch.uint8).view(dtype)
    assert shares_memory(tensor[::2], tensor[2:])
    assert not shares_memory(tensor[::2], tensor[1::2])


def test_conj_neg_grad_and_expanded_views_share_with_their_base():
    base = torch.zeros(3, dtype=torch.complex64)
    assert shares_memory(base, base.conj())
    assert shares_memory(base, base.conj().imag)
    assert not shares_memory(base.real, base.imag)
    leaf = torch.zeros(3, requires_grad=True)
    assert shares_memory(leaf, leaf.detach().expand(5, 3))


def test_memory_without_elements_or_on_no_device_is_not_shared():
    array = np.zeros(4)
    tensor = torch.from_numpy(array)
    assert not shares_memory(array[:0], array)
    assert not shares_memory(tensor[:0], tensor[:0])
    meta = torch.zeros(3, device="meta")
    assert not shares_memory(meta, meta)
    assert not shares_memory(meta, tensor)
    assert not shares_memory(torch._efficientzerotensor((2,)), torch._efficientzerotensor((2,)))


def test_equal_addresses_on_different_devices_are_different_memory(monkeypatch):
    one = np.zeros(3)
    devices = {"a": torch.device("cuda", 0), "b": torch.device("cuda", 1)}
    monkeypatch.setattr(sharing, "_locate", lambda name: (devices[name], one))
    assert shares_memory("a", "a")
    assert not shares_memory("a", "b")


def test_tensors_that_hide_their_memory_are_refused_not_denied():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(ArrayKindError):
        shares_memory(sparse, sparse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ArrayKindError):
        shares_memory(nested, torch.zeros(3))


@pytest.mark.parametrize("value", [1, [1.0], None, b"x", np.float32(1)])
def test_other_values_are_refused(value):
    with pytest.raises(ArrayKindError, match="compares arrays and tensors"):
        shares_memory(value, np.zeros(3))


def test_structured_and_masked_arrays_are_compared_by_their_bytes():
    table = np.zeros(4, "i4, f4")
    assert shares_memory(table["f0"], table)
    assert not shares_memory(table["f0"], table["f1"])
    masked = np.ma.MaskedArray(np.zeros(3), [1, 0, 0])
    assert shares_memory(masked, masked.data)


def test_a_question_too_hard_to_decide_is_answered_by_bounds_in_bounded_time():
    axes = 20
    strides = [int(n) for n in np.random.default_rng(axes).integers(10**5, 10**6, size=axes)]
    memory = np.zeros(sum(strides) + 100, np.int8)
    a = np.lib.stride_tricks.as_strided(memory, (2,) * axes, strides)
    b = np.lib.stride_tricks.as_strided(memory[7:], (2,) * axes, [n - 3 for n in reversed(strides)])
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(a, b, max_work=10**7)
    start = time.perf_counter()
    assert shares_memory(a, b)
    assert time.perf_counter() - start < 20
