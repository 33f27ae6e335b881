import gc
import re
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loaders.bridge import as_array, shares_memory
from loaders.errors import ArrayKindError, DtypeError, ShareError


def freed():
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk_view():
    tensor = torch.zeros(8)
    view = tensor[4:]
    tensor.untyped_storage().resize_(20)
    return view


def csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR beta
        return torch.eye(3).to_sparse_csr()


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)


def fake():
    with FakeTensorMode():
        return torch.zeros(3)


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense()"),
    "csr": (csr, "to_dense()"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta device"),
    "nested strided": (lambda: nested(torch.strided), "unbind()"),
    "nested jagged": (lambda: nested(torch.jagged), "unbind()"),
    "fake": (fake, "fake tensor has no values"),
    "wrapper subclass": (lambda: Wrapper(torch.zeros(3)), "wraps other tensors"),
    "lazy parameter": (lambda: torch.nn.LazyLinear(3).weight, "Run the module once"),
    "freed storage": (freed, "needs 12 bytes and its storage has 0"),
    "shrunk storage": (shrunk_view, "needs 32 bytes and its storage has 20"),
    "ndarray": (lambda: np.zeros(3), "Expected a torch.Tensor, not ndarray"),
    "list": (lambda: [1.0], "not list"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("copy", [False, None, True])
def test_tensors_without_plain_memory_are_refused_with_the_remedy(make, said, copy):
    with pytest.raises(ArrayKindError, match=re.escape(said)):
        as_array(make(), copy=copy)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_tensors_inside_a_transform_are_refused(transform):
    def inside(x):
        with pytest.raises(ArrayKindError, match="outside of it"):
            as_array(x)
        return x.sum()

    transform(inside)(torch.zeros(3))


def conj():
    return torch.tensor([1 + 2j, 3 - 4j]).conj()


UNSHAREABLE = {
    "conj bit": (conj, [1 - 2j, 3 + 4j]),
    "neg bit": (lambda: conj().imag, [-2.0, 4.0]),
    "unaligned": (
        lambda: torch.frombuffer(bytearray(b"x" + np.arange(2.0).tobytes()), dtype=torch.float64, offset=1),
        [0.0, 1.0],
    ),
    "zero tensors": (lambda: torch._efficientzerotensor((2,)), [0.0, 0.0]),
}


@pytest.mark.parametrize(("said", "make", "values"), [(said, *rest) for said, rest in UNSHAREABLE.items()])
def test_what_numpy_cannot_share_is_refused_or_copied_with_the_values_of_the_tensor(said, make, values):
    with pytest.raises(ShareError, match=rf"{said}.*\n  Pass copy=None to get an?"):
        as_array(make(), copy=False)
    for copy in (None, True):
        array = as_array(make(), copy=copy)
        assert array.tolist() == values
        assert array.flags.owndata
        assert array.flags.aligned


def test_bfloat16_shared_is_a_dtype_error_and_else_float32():
    tensor = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="copy=None to get a float32 copy"):
        as_array(tensor, copy=False)
    assert as_array(tensor).dtype == np.float32
    assert as_array(tensor).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(3),
        torch.zeros((1,) * 33)[..., 0] if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else torch.zeros((1,) * 30),
    ],
    ids=["contiguous", "strided", "channels_last", "0-d", "many axes"],
)
def test_both_sides_see_what_the_other_writes(tensor):
    array = as_array(tensor, copy=False)
    assert array.shape == tensor.shape
    array[...] = 7
    assert (tensor == 7).all()
    tensor.fill_(9)
    assert (array == 9).all()
    assert not shares_memory(as_array(tensor, copy=True), tensor)


def test_copies_are_c_contiguous_writeable_and_own_their_memory():
    tensor = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    array = as_array(tensor, copy=True)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.flags.owndata


def test_tensors_that_require_grad_are_shared_read_only_so_that_no_write_escapes_autograd():
    leaf = torch.ones(3, requires_grad=True)
    for tensor in (leaf, leaf * 2, torch.nn.Parameter(torch.ones(3))):
        array = as_array(tensor, copy=False)
        assert shares_memory(array, tensor)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    assert as_array(leaf.detach(), copy=False).flags.writeable


def test_expanded_tensors_are_shared_read_only_like_broadcast_arrays():
    tensor = torch.zeros(1).expand(2, 3)
    array = as_array(tensor, copy=False)
    assert array.strides == (0, 0)
    assert not array.flags.writeable
    assert as_array(tensor, copy=True).flags.writeable
    assert as_array(torch.zeros(3).expand(1, 3), copy=False).flags.writeable  # an axis of length 1 aliases nothing


def test_inference_tensors_are_shared():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert shares_memory(as_array(tensor, copy=False), tensor)
    with torch.inference_mode():
        assert as_array(torch.ones(3).bfloat16()).tolist() == [1, 1, 1]


def test_array_keeps_its_memory_when_the_tensor_is_given_other_memory():
    # What `module.half()` does to parameters. An array that hung on the tensor itself would now read freed memory.
    module = torch.nn.Linear(3, 3)
    array = as_array(module.weight)
    before = array.copy()
    module.half()
    gc.collect()
    assert array.base.data_ptr() == array.ctypes.data
    np.testing.assert_array_equal(array, before)


def test_array_outlives_the_tensor():
    tensor = torch.arange(5)
    array = as_array(tensor, copy=False)
    del tensor
    gc.collect()
    assert array.tolist() == [0, 1, 2, 3, 4]
    assert array.base.data_ptr() == array.ctypes.data


class Overridden(torch.Tensor):
    """A subclass whose functions must not be called."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_subclasses_that_override_functions_are_taken_as_the_tensor_they_extend():
    plain = torch.arange(3.0)
    tensor = plain.as_subclass(Overridden)
    assert shares_memory(as_array(tensor, copy=False), tensor)
    assert shares_memory(as_array(tensor, copy=False), plain)
    assert as_array(tensor, copy=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("copy", [False, None, True])
def test_empty_tensors_convert(shape, copy):
    assert as_array(torch.zeros(shape), copy=copy).shape == shape


def test_a_default_device_does_not_matter():
    tensor = torch.ones(2).bfloat16()
    with torch.device("meta"):
        assert as_array(tensor).tolist() == [1, 1]


@pytest.mark.parametrize("falsy", [False, 0, np.False_])
def test_any_falsy_copy_but_none_refuses_to_copy(falsy):
    with pytest.raises(ShareError):
        as_array(conj(), copy=falsy)
