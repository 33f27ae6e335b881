"""Any Python value as a parcel: its arrays' bytes apart from everything else.

The bytes go where the caller has room for them (a slot), the rest is one pickle (protocol 5, PEP 574). The same format
carries the results of a custom `collate_fn`, samples that fit no row, and errors. A view is packed without the rest of
the memory it is a view of. Nothing here imports torch: tensors are recognised where torch is already loaded, and become
tensors again in the consumer.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from loaders.batch.spec import is_plain, tensor_as_array
from loaders.nested import is_namedtuple

_MANY, _SMALL_NBYTES = 64, 4096


def pack(value: Any, *, writable: bool = False) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Split `value` into a pickle and the contiguous buffers of its arrays and CPU tensors, in order.

    After `_MANY` buffers, arrays of less than a page stay in the pickle: a block for each would take a page. With
    `writable`, arrays that are read-only here are copied, so that they arrive writable.
    """
    buffers: list[pickle.PickleBuffer] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        is_small = len(buffers) >= _MANY and buffer.raw().nbytes < _SMALL_NBYTES
        if not is_small:
            buffers.append(buffer)
        return is_small

    stream = io.BytesIO()
    packer = _Packer(stream, protocol=5, buffer_callback=stays)
    packer.writable = writable
    packer.dump(value)
    return stream.getvalue(), buffers


def dumps(value: Any) -> bytes:
    """The parcel in one piece, arrays included: like `pickle.dumps`, but views without the rest of their memory."""
    stream = io.BytesIO()
    _Packer(stream, protocol=5).dump(value)
    return stream.getvalue()


def unpack(pickled: bytes, buffers: Sequence[Any]) -> Any:
    """The value again; its arrays and tensors share the memory of `buffers` where those are writable."""
    return pickle.loads(pickled, buffers=buffers)


class _Packer(pickle.Pickler):
    writable = False

    def reducer_override(self, obj: Any) -> Any:
        torch: Any = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor):
            if type(obj) is torch.Tensor and is_plain(obj) and not vars(obj):
                array, dtype = tensor_as_array(obj)
                return rebuild_tensor, (*as_dense(array), dtype)
            return _without_the_rest(obj)
        if type(obj) is np.ndarray and not obj.dtype.hasobject:
            if self.writable and not obj.flags.writeable:
                obj = obj.copy(order="K")
            elif obj.flags.c_contiguous:
                return NotImplemented
            return rebuild_array, as_dense(obj)
        if is_namedtuple(obj) and _is_pickled_by_its_fields(type(obj)):
            # Not through its `__new__`, which may be the user's own and take other arguments than the fields.
            return rebuild_namedtuple, (type(obj), tuple(obj)), getattr(obj, "__dict__", None) or None
        return NotImplemented


def _without_the_rest(tensor: Any) -> Any:
    """How torch pickles the tensor, or a copy of it if it is a view: torch would pickle the whole storage."""
    if str(tensor.layout) != "torch.strided" or tensor.is_nested:
        return NotImplemented
    if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
        return NotImplemented
    copy = tensor.detach().clone()
    if type(copy) is not type(tensor):  # a Parameter pickles a plain tensor, which is then packed here
        return NotImplemented
    copy.requires_grad_(tensor.requires_grad)
    vars(copy).update(vars(tensor))
    return copy.__reduce_ex__(5)


def _is_pickled_by_its_fields(kind: type[Any]) -> bool:
    own = any(name in vars(each) for each in kind.__mro__[:-1] for name in ("__reduce__", "__reduce_ex__"))
    return not own and getattr(getattr(kind, "__getnewargs__", None), "__module__", None) == "collections"


def as_dense(array: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """The same bytes as a C-contiguous array, and the axes that restore it; a copy only where there are gaps.

    So channels-last images stay channels-last. Some versions of NumPy pickle only C-contiguous arrays without a copy.
    """
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    dense = array.transpose(axes)
    return dense if dense.flags.c_contiguous else dense.copy(), [axes.index(axis) for axis in range(array.ndim)]


def rebuild_array(dense: np.ndarray[Any, Any], axes: list[int]) -> np.ndarray[Any, Any]:
    """The array with its axes in their original order, sharing memory. Runs where the parcel is opened."""
    array: np.ndarray[Any, Any] = dense.transpose(axes)
    return array


def rebuild_namedtuple(kind: type[Any], fields: tuple[Any, ...]) -> Any:
    """The namedtuple again."""
    return tuple.__new__(kind, fields)


def rebuild_tensor(dense: np.ndarray[Any, Any], axes: list[int], dtype: str) -> Any:
    """The tensor over `dense` again, sharing its memory. Runs where the parcel is opened."""
    from loaders.batch.assemble import tensor_over

    return tensor_over(dense.transpose(axes), dtype)
