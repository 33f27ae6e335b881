"""Samples without rows in a padded or ragged field: `boxes=[]` beside neighbours of five columns."""

import numpy as np
import pytest
import torch

from loaders import DataLoader, Field

NOTHING = {
    "list": list,
    "tuple": tuple,
    "array": lambda: np.array([]),
    "array of another dtype": lambda: np.array([], np.int8),
    "tensor": lambda: torch.tensor([]),
}
ENGINES = [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}]


class Boxes:
    """Sample i has boxes of five columns, i and i + 1, or none where `i` is in `without`."""

    def __init__(self, nothing, without, as_tensor=False):
        self.nothing = nothing
        self.without = without
        self.make = torch.from_numpy if as_tensor else np.asarray

    def __len__(self):
        return 12

    def __getitem__(self, index):
        boxes = self.nothing() if index in self.without else self.make(box_rows(index))
        return {"image": np.full(3, index), "target": {"boxes": boxes}}


def box_rows(index):
    return np.full((index % 3 + 1, 5), index, np.float32) + np.arange(5, dtype=np.float32)


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["arrays", "tensors"])
@pytest.mark.parametrize("without", [(0,), (1, 2), (0, 1, 2, 3, 6), (11,)], ids=str)
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_a_padded_sample_without_rows_has_none(nothing, without, as_tensor, how):
    dataset = Boxes(nothing, without, as_tensor)
    for number, batch in enumerate(DataLoader(dataset, 4, fields={"target.boxes": Field(pad=-1)}, **how)):
        rows = range(4 * number, 4 * number + 4)
        boxes = batch["target"]["boxes"]
        assert batch["image"][:, 0].tolist() == list(rows)
        assert boxes.counts.tolist() == [0 if row in without else len(box_rows(row)) for row in rows]
        if set(rows) <= set(without):  # of the first batch nothing else is known
            assert boxes.values.shape == (4, 0)
            continue
        assert boxes.values.shape == (4, int(boxes.counts.max()), 5)
        assert boxes.values.dtype == torch.float32
        for row, values, count in zip(rows, boxes.values, boxes.counts.tolist(), strict=True):
            assert values[:count].tolist() == box_rows(row)[:count].tolist()
            assert (values[count:] == -1).all()


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("without", [(0,), (1, 2), (0, 1, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_a_ragged_sample_without_rows_has_the_columns_of_its_neighbours(nothing, without, how):
    for number, batch in enumerate(
        DataLoader(Boxes(nothing, without), 4, fields={"target.boxes": Field(ragged=True)}, **how)
    ):
        boxes = batch["target"]["boxes"]
        for row, values in zip(range(4 * number, 4 * number + 4), boxes, strict=True):
            assert values.tolist() == ([] if row in without else box_rows(row).tolist())
        if not set(range(4 * number, 4 * number + 4)) <= set(without):
            assert {values.shape[1:] for values in boxes} == {(5,)}
            assert boxes.flat()[0].shape[1:] == (5,)


@pytest.mark.parametrize("kind", [{"pad": 0}, {"ragged": True}], ids=str)
def test_batches_after_the_first_lie_in_the_slots_again(kind):
    loader = DataLoader(Boxes(lambda: np.array([], np.float32), (0,)), 4, fields={"target.boxes": Field(**kind)})
    list(loader)
    before = loader.overflow_count
    assert before > 0
    batches = list(loader)
    assert loader.overflow_count == before + (kind == {"ragged": True})
    assert len(batches) == 3


@pytest.mark.parametrize("without", [(), (0,), (0, 1)], ids=str)
def test_numbers_of_one_dimension_keep_their_dtype(without):
    class Tokens(Boxes):
        def __getitem__(self, index):
            return np.array([]) if index in self.without else np.arange(index % 4 + 1)

    for batch in DataLoader(Tokens(None, without), 4, fields={"": Field(pad=0)}):
        assert batch.values.dtype == torch.int64
        assert batch.values.ndim == 2


def test_samples_that_are_skipped_leave_those_without_rows():
    class Failing(Boxes):
        def __getitem__(self, index):
            if index == 2:
                raise LookupError(index)
            return super().__getitem__(index)

    loader = DataLoader(Failing(list, (0, 3)), 4, fields={"target.boxes": Field(pad=0)}, on_error="skip")
    assert next(iter(loader))["target"]["boxes"].counts.tolist()[:3] == [0, 2, 0]
