"""What workers send back arrives as it was: tensors of every dtype, namedtuples with a `__new__` of their own."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.parity import ENGINES

from loaders import DataLoader, Field
from loaders.batch.packing import pack, unpack
from loaders.errors import FieldDtypeError
from loaders.workers.messages import Result

# What torch says of its newer kinds.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

DTYPES = [
    name
    for name in (
        *("uint16", "uint32", "uint64", "complex32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
        *(
            "float8_e4m3fnuz",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
            "float4_e2m1fn_x2",
            "bits8",
            "bits16",
            "uint4",
            "int4",
        ),
    )
    if hasattr(torch, name)
]


class Tensors:
    """Sample i is a tensor of `dtype` whose bytes are all i, of `shape(i)`, beside a number."""

    def __init__(self, dtype: str, shape: Any = lambda index: (3,)) -> None:
        self.dtype = dtype
        self.shape = shape

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        dtype = getattr(torch, self.dtype)
        width = torch.empty(0, dtype=dtype).element_size()
        *first, last = self.shape(index)
        return {"x": torch.full((*first, last * width), index, dtype=torch.uint8).view(dtype), "label": index}


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_come_from_workers(dtype: str, engine: str) -> None:
    for number, batch in enumerate(DataLoader(Tensors(dtype), 4, **ENGINES[engine])):
        assert batch["x"].dtype is getattr(torch, dtype)
        for row, x in enumerate(batch["x"]):
            assert set(as_bytes(x)) == {4 * number + row}
            assert x.shape == (3,)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_do_those_that_no_row_has_room_for(dtype: str, engine: str) -> None:
    dataset = Tensors(dtype, lambda index: (1 + 40 * (index % 3),))
    for number, batch in enumerate(DataLoader(dataset, 4, fields={"x": Field(ragged=True)}, **ENGINES[engine])):
        for row, x in enumerate(batch["x"]):
            assert set(as_bytes(x)) == {4 * number + row}
            assert x.dtype is getattr(torch, dtype)


def test_a_tensor_that_overflowed_its_slot_can_be_written_to() -> None:
    result = Result(0, 0, 0, 1)
    result.overflow.samples.append((0, torch.full((2, 3), 3.0)))
    [(_, arrived)] = pickle.loads(pickle.dumps(result, protocol=5)).overflow.samples
    arrived[:] = 1
    assert arrived.sum() == 6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_field", [False, True], ids=["the sample", "a field"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors_are_refused_with_the_words_of_torch(layout: Any, in_field: bool, engine: str) -> None:
    class Nested:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
            return {"n": nested, "label": index} if in_field else nested

    with pytest.raises(FieldDtypeError, match="Batches of nested tensors are not currently supported by the default"):
        list(DataLoader(Nested(), 2, **ENGINES[engine]))


class Doubled(NamedTuple("Doubled", [("image", Any), ("label", Any), ("twice", Any)])):
    """A namedtuple whose `__new__` wants something else than its fields."""

    def __new__(cls, image: Any, *, label: int) -> Doubled:
        return super().__new__(cls, image, label, 2 * label)


class Noted(Doubled):
    """One that has attributes besides."""

    def __new__(cls, image: Any, *, label: int) -> Noted:
        self = super().__new__(cls, image, label=label)
        self.note = f"note {label}"
        return self  # type: ignore[return-value]


class Tuples:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return Doubled(np.full(3, index), label=index)


@pytest.mark.parametrize("collate_fn", [None, list], ids=["rows", "a collate_fn"])
@pytest.mark.parametrize("engine", ENGINES)
def test_namedtuples_with_their_own_new_come_from_workers(engine: str, collate_fn: Any) -> None:
    seen = []
    for batch in DataLoader(Tuples(), 4, collate_fn=collate_fn, **ENGINES[engine]):
        for each in batch if collate_fn else [batch]:
            assert type(each) is Doubled
            assert np.asarray(each.twice).tolist() == (2 * np.asarray(each.label)).tolist()
            seen += np.atleast_1d(each.label).tolist()
    assert seen == list(range(8))


def test_a_namedtuple_keeps_its_attributes_and_its_own_way_of_being_pickled() -> None:
    noted = unpack(*pack(Noted(1, label=2)))
    assert (type(noted), noted, noted.note) == (Noted, (1, 2, 4), "note 2")
    chosen = unpack(*pack(Chosen(5, 6)))
    assert chosen == (50, 6)


class Chosen(NamedTuple):
    a: int
    b: int

    def __reduce__(self) -> Any:
        return Chosen, (self.a * 10, self.b)
