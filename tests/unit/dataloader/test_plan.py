import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, default_collate, default_convert

from loaders import Field, numpy_collate
from loaders.batch.spec import BatchSpec
from loaders.dataloader.plan import Plan
from loaders.workers.messages import Parcel


class Reads(list):
    def __getitems__(self, keys):
        return [self[key] for key in keys]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def own(samples):
    return samples


@pytest.mark.parametrize(
    ("dataset", "collate", "batched", "fetch", "by_rows", "by_spans", "collates"),
    [
        (range(3), default_collate, True, "each", True, True, False),
        (range(3), numpy_collate, True, "each", True, True, False),
        (range(3), own, True, "each", False, False, True),
        (Reads(), default_collate, True, "all", True, False, False),
        (Reads(), own, True, "all", False, False, True),
        (Stream(), default_collate, True, "stream", True, False, False),
        (Stream(), own, True, "stream", False, False, True),
        (range(3), default_convert, False, "each", False, False, False),
        (range(3), own, False, "each", False, False, True),
        (Reads(), default_convert, False, "each", False, False, False),
        (Stream(), default_convert, False, "stream", False, False, False),
    ],
)
def test_the_shape_of_the_work_follows_from_the_arguments(
    dataset, collate, batched, fetch, by_rows, by_spans, collates
):
    plan = Plan(dataset, collate, 4 if batched else None, batched, None)
    assert (plan.fetch, plan.by_rows, plan.by_spans) == (fetch, by_rows, by_spans)
    assert plan.collate is (collate if collates else None)


def test_a_subset_reads_whole_batches_only_where_its_dataset_does():
    # torch's Subset has a `__getitems__` of its own, whatever it wraps.
    assert Plan(Subset(Reads(range(4)), [0]), default_collate, 2, True, None).fetch == "all"
    assert Plan(Subset(Subset(range(4), [0, 1]), [0]), default_collate, 2, True, None).fetch == "each"


def test_by_default_the_number_of_open_batches_does_not_follow_the_workers():
    [depth] = {Plan(range(3), default_collate, 32, True, None).depth(workers) for workers in (1, 2, 4, 8, 16)}
    assert 2 <= depth <= 4


def test_there_are_open_samples_for_every_worker_however_small_the_batches():
    for room in (1, 2, 3, 5):
        plan = Plan(range(3), default_collate, room, True, None)
        # All but the batch that is being handed out keep every worker busy, and one more sample waits for each.
        assert (plan.depth(8) - 1) * room >= 2 * 8


def test_where_a_batch_is_made_by_one_worker_each_worker_has_one():
    for plan in (Plan(range(3), own, 32, True, None), Plan(Stream(), default_collate, 32, True, None)):
        assert plan.depth(8) > 8


def test_an_explicit_depth_is_honoured():
    assert [Plan(range(3), own, 32, True, depth).depth(4) for depth in (0, 1, 2, 24)] == [1, 1, 2, 24]


def test_slots_are_sized_by_the_spec_and_the_largest_batch():
    plan = Plan(range(3), default_collate, 4, True, None)
    plan.room = 4  # as the sampler's first batch says
    assert plan.sizes() == []
    sample = {"x": np.zeros((2, 3), np.uint8), "y": "text", "z": np.zeros(0), "b": np.zeros((2, 4))}
    plan.spec = BatchSpec.from_sample(sample, {"b": Field(ragged=True)})
    assert plan.sizes()[:3] == [24, 0, 0]
    before = plan.sizes()[3]
    plan.room = 8
    assert plan.sizes()[:3] == [48, 0, 0]
    plan.learn({3: (100, 4)}, None)
    assert plan.sizes()[3] > 2 * before


def sizes_after(*results):
    """The room for the pieces of results of these sizes, each made in a slot that fits the ones before."""
    plan = Plan(range(3), own, 4, True, None)
    for result in results:
        room = [*plan.sizes(), *[0] * len(result)]
        plan.learn({}, Parcel(b"", [size if size <= room[n] else bytearray(size) for n, size in enumerate(result)]))
    return plan.sizes()


def test_room_is_made_for_results_as_large_as_those_that_came():
    assert sizes_after([100, 8]) == [100, 8]
    assert sizes_after([100, 8], [100, 8], [50, 8]) == [100, 8]


def test_results_that_outgrow_their_room_get_a_quarter_more():
    assert sizes_after([100], [200]) == [250]
    assert sizes_after([100], [200], [100], [240]) == [250]


def test_results_may_have_more_or_fewer_pieces_and_empty_ones():
    assert sizes_after([10], [10, 0, 30], [10], []) == [10, 0, 30]


def test_indices_are_a_tensor_where_they_are_ints():
    indices = Plan.as_indices([3, 1, 2])
    assert (indices.dtype, indices.tolist()) == (torch.int64, [3, 1, 2])
    assert Plan.as_indices(["a", "b"]) == ["a", "b"]
    assert Plan.as_indices([True, 2]) == [True, 2]
