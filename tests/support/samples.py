"""Samples of every kind that a dataset may return, and those that torch refuses to collate."""

from __future__ import annotations

import collections
import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]

Point = namedtuple("Point", ["x", "y"])


class Typed(NamedTuple):
    image: Any
    label: Any


class Frozen(Mapping[str, Any]):
    """An immutable mapping, built from a dict."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Row(Sequence[Any]):
    """An immutable sequence, built from a list."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = list(items)

    def __getitem__(self, position: Any) -> Any:
        return self._items[position]

    def __len__(self) -> int:
        return len(self._items)


class NoConstructor(Row):
    """A sequence that cannot be built from a list."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])


class Signed(int):
    """A subclass of int."""


class KeyedDict(dict[str, Any]):
    """A dict that carries more than its items."""

    note = ""


@dataclasses.dataclass
class Record:
    image: Any
    label: Any


class Listed:
    """A dataset of ready samples."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def image(i: int) -> np.ndarray:
    return np.arange(24, dtype=np.uint8).reshape(2, 4, 3) + i


def _default_dict(i: int) -> Any:
    sample = defaultdict(list, image=image(i), label=i)
    return sample


def _keyed_dict(i: int) -> Any:
    sample = KeyedDict(image=image(i), label=i)
    sample.note = "kept"
    return sample


def _grad(i: int) -> torch.Tensor:
    return torch.full((3,), float(i), requires_grad=True)


# name → the sample at i. Five samples make two full batches and a short one.
SAMPLES: dict[str, Callable[[int], Any]] = {
    # containers
    "array": image,
    "tuple": lambda i: (image(i), i),
    "list": lambda i: [image(i), i],
    "dict": lambda i: {"image": image(i), "label": i},
    "dict with int and tuple keys": lambda i: {0: i, (1, "a"): image(i)},
    "empty tuple": lambda i: (),
    "empty dict": lambda i: {},
    "tuple with an empty list": lambda i: (image(i), []),
    "nested": lambda i: {"a": (image(i), {"b": [i, float(i)]}), "c": Point(i, {"d": image(i)})},
    "tuple of one": lambda i: (i,),
    "OrderedDict": lambda i: OrderedDict(label=i, image=image(i)),
    "defaultdict": _default_dict,
    "dict subclass with attributes": _keyed_dict,
    "Counter": lambda i: collections.Counter(a=i, b=2),
    "Mapping": lambda i: Frozen({"image": image(i), "name": str(i)}),
    "Sequence": lambda i: Row([image(i), str(i)]),
    "Sequence without constructor": lambda i: NoConstructor(image(i), i),
    "range": lambda i: range(i, i + 3),
    "deque": lambda i: collections.deque([i, image(i)]),
    "bytearray": lambda i: bytearray([i, 2]),
    "namedtuple": lambda i: Point(image(i), i),
    "NamedTuple in a tuple": lambda i: (Typed(image(i), i), str(i)),
    "namedtuple of strings": lambda i: Point(str(i), b"x"),
    "mapping in a tuple": lambda i: (Frozen({"name": str(i)}), i),
    # scalars and text
    "int": lambda i: i,
    "negative int": lambda i: -(2**63) + i,
    "float": lambda i: i / 3,
    "nan": lambda i: float("nan") if i % 2 else float("-inf"),
    "bool": lambda i: i % 2 == 0,
    "int subclass": lambda i: Signed(i),
    "str": str,
    "str in tuple": lambda i: (str(i), "ü" * i),
    "str in list": lambda i: [str(i), b"a"],
    "str in dict": lambda i: {"name": str(i), "deep": (str(i), {"name": str(i)})},
    "bytes": lambda i: bytes([i]) * i,
    **{f"numpy scalar {name}": lambda i, name=name: np.dtype(name).type(i % 2) for name in DTYPES if name != "uint64"},
    "numpy str": lambda i: np.str_(i),
    "numpy bytes": lambda i: np.bytes_(b"a" * i),
    # arrays
    **{f"array of {name}": lambda i, name=name: (np.arange(6).reshape(2, 3) + i).astype(name) for name in DTYPES},
    "0-d array": lambda i: np.array(i / 2),
    "empty array": lambda i: np.zeros((0, 3), np.float32),
    "array with a zero in the middle": lambda i: np.zeros((2, 0, 3), np.int16),
    "Fortran order": lambda i: np.asfortranarray(image(i)),
    "transposed": lambda i: image(i).transpose(2, 0, 1),
    "strided": lambda i: np.arange(12)[::3] + i,
    "broadcast": lambda i: np.broadcast_to(np.float32(i), (2, 3)),
    "read-only": lambda i: np.frombuffer(bytes([i, 1, 2]), np.uint8),
    "matrix": lambda i: np.arange(4, dtype=np.int32).reshape(2, 2).view(np.matrix),
    "masked array": lambda i: np.ma.array([i, 2, 3], mask=[0, 1, 0]),
    "six dimensions": lambda i: np.full((1, 2, 1, 2, 1, 2), i),
    # tensors
    "tensor": lambda i: torch.full((2, 3), i),
    "0-d tensor": lambda i: torch.tensor(i / 2),
    "empty tensor": lambda i: torch.zeros(0, 3),
    "bfloat16 tensor": lambda i: torch.full((3,), i / 7, dtype=torch.bfloat16),
    "float8 tensor": lambda i: torch.full((3,), i / 7).to(torch.float8_e4m3fn).float(),
    "complex32-free complex tensor": lambda i: torch.full((2,), complex(i, 1)),
    "non-contiguous tensor": lambda i: torch.arange(6).reshape(2, 3).t() + i,
    "expanded tensor": lambda i: torch.tensor([float(i)]).expand(4),
    "conjugated tensor": lambda i: torch.full((2,), complex(i, 1)).conj(),
    "tensor and array": lambda i: {"a": torch.full((2,), i), "b": np.full(2, i)},
    "tensor that requires grad": _grad,
    "Parameter": lambda i: torch.nn.Parameter(torch.full((2,), float(i))),
    # mixtures in a batch
    "int then float": lambda i: float(i) if i % 2 else i,
    "float then int": lambda i: i if i % 2 else float(i),
    "bool then int": lambda i: i if i % 2 else True,
    "int then bool": lambda i: True if i % 2 else i,
    "int then numpy scalar": lambda i: np.int64(i) if i % 2 else i,
    "numpy scalar then int": lambda i: i if i % 2 else np.int8(i),
    "array then tensor": lambda i: torch.zeros(2, dtype=torch.float64) if i % 2 else np.ones(2),
    "array then list": lambda i: [1.0, 2.0] if i % 2 else np.ones(2),
    "array then number": lambda i: 1.5 if i % 2 else np.array(2.5),
    "dtypes promote": lambda i: np.full(2, i, (np.uint8, np.float32, np.int64)[i % 3]),
    "half then float tensors": lambda i: torch.full((2,), i / 3, dtype=torch.float32 if i % 2 else torch.bfloat16),
    "str then int": lambda i: i if i % 2 else str(i),
    "str then None": lambda i: None if i % 2 else str(i),
    "tuple then list": lambda i: [i, 1] if i % 2 else (i, 1),
    "list then tuple": lambda i: (i, 1) if i % 2 else [i, 1],
    "dict then Mapping": lambda i: Frozen({"a": i}) if i % 2 else {"a": i},
    "keys in another order": lambda i: {"b": i, "a": image(i)} if i % 2 else {"a": image(i), "b": i},
    "extra key": lambda i: {"a": i, "b": image(i)} if i % 2 else {"a": i},
    "shape by batch": lambda i: np.full((1 + i // 2,), i),
    "dtype by batch": lambda i: np.full(2, i, (np.uint8, np.float32, np.int64)[i // 2]),
    "structure by batch": lambda i: ((i, 2), {"a": image(i)}, [str(i)])[i // 2],
    "key order by batch": lambda i: {"b": i, "a": str(i)} if i // 2 == 1 else {"a": str(i), "b": i},
    "text by batch": lambda i: str(i) if i // 2 == 1 else i,
}


# name → the samples of a batch that torch refuses
REFUSED: dict[str, Callable[[int], Any]] = {
    "None": lambda i: None,
    "object": lambda i: object(),
    "complex": lambda i: complex(i),
    "set": lambda i: {i},
    "None in a tuple": lambda i: (i, None),
    "object in a nested dict": lambda i: {"a": {"b": object()}},
    "int beyond int64": lambda i: 2**63 + i,
    "int beyond int64 later": lambda i: 2**70 if i == 3 else i,
    "big-endian array": lambda i: np.full(2, i, ">f4"),
    "big-endian array later": lambda i: np.full(2, i, ">f4" if i == 3 else "<f4"),
    "datetime array": lambda i: np.full(2, i, "M8[s]"),
    "timedelta scalar": lambda i: np.timedelta64(i),
    "datetime scalar": lambda i: np.datetime64(i, "s"),
    "str array": lambda i: np.array([str(i)]),
    "bytes array": lambda i: np.array([b"a"]),
    "object array": lambda i: np.array([None, i]),
    "structured array": lambda i: np.zeros(2, "i4,f4"),
    "longdouble array": lambda i: np.full(2, i, np.longdouble) if np.longdouble(0).itemsize > 8 else None,
    "longdouble scalar": lambda i: np.longdouble(i) if np.longdouble(0).itemsize > 8 else None,
    "sparse tensor": lambda i: torch.eye(2).to_sparse(),
    "shapes differ": lambda i: np.zeros(2 + (i == 3)),
    "numbers of dimensions differ": lambda i: np.zeros((2, 1) if i == 3 else 2),
    "tensor shapes differ": lambda i: torch.zeros(2 + (i == 3)),
    "shapes differ in a field": lambda i: {"a": {"b": np.zeros(2 + (i == 3))}, "c": i},
    "lengths differ": lambda i: (1, 2, 3) if i == 3 else (1, 2),
    "list lengths differ": lambda i: [1, 2, 3] if i == 3 else [1, 2],
    "key missing": lambda i: {"a": 1} if i == 3 else {"a": 1, "b": 2},
    "key missing below": lambda i: {"m": {"b": 1}} if i == 3 else {"m": {"a": 1}},
    "key renamed": lambda i: {"c": 1} if i == 3 else {"a": 1},
    "tuple then dict": lambda i: {"a": 1} if i == 3 else (1,),
    "dict then tuple": lambda i: (1,) if i == 3 else {"a": 1},
    "tuple then int": lambda i: 1 if i == 3 else (1,),
    "dict then int": lambda i: 1 if i == 3 else {"a": 1},
    "int then str": lambda i: "a" if i == 3 else i,
    "int then None": lambda i: None if i == 3 else i,
    "float then None": lambda i: None if i == 3 else float(i),
    "int then array": lambda i: np.zeros(2) if i == 3 else i,
    "array then int": lambda i: 1 if i == 3 else np.zeros(2),
    "tensor then array": lambda i: np.zeros(2) if i == 3 else torch.zeros(2),
    "extra key and a shape": lambda i: {"a": np.zeros(3), "b": 1} if i == 3 else {"a": np.zeros(2)},
}
