"""Between a sample's ndarray and the batch's tensor there is one write, and it is into the slot."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from support import inside
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, default_convert

from loaders import DataLoader, Field, Padded, Ragged, numpy_collate
from loaders.nested import leaves

Pair = namedtuple("Pair", "image label")

ENGINES = {
    "inline": {"num_workers": 0},
    "threads": {"num_workers": 2, "worker_method": "thread"},
    "processes": {"num_workers": 2},
}
every_engine = pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)


def lies_in_a_slot(loader, tensor):
    arena = inside.pool_of(loader).arena
    start = np.frombuffer(arena.buffer, np.uint8).ctypes.data
    return start <= tensor.data_ptr() <= start + arena.capacity - tensor.nbytes


class Photos(Dataset):
    def __init__(self, length=24):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {
            "image": np.full((4, 5, 3), index, np.uint8),
            "pair": Pair(np.float32(index), torch.full((2,), index, dtype=torch.bfloat16)),
            "label": index,
            "weight": index / 2,
            "even": index % 2 == 0,
            "boxes": np.full((index % 4, 4), index, np.float32),
            "crops": np.full((1 + index % 3, 2, 3), index, np.uint8),
        }


FIELDS = {"boxes": Field(pad=-1), "crops": Field(ragged=True)}


@every_engine
@pytest.mark.parametrize("collate", [None, numpy_collate])
def test_every_tensor_of_a_batch_lies_in_its_slot(how, collate):
    loader = DataLoader(Photos(), 6, fields=FIELDS, collate_fn=collate, **how)
    for number, batch in enumerate(loader):
        tensors = [tensor for _, tensor in leaves(batch)]
        assert len(tensors) == 6 + 2 + 6
        for tensor in tensors:
            assert lies_in_a_slot(loader, tensor) or not tensor.numel()
        assert batch["label"].tolist() == list(range(6 * number, 6 * number + 6))
        assert (batch["image"][:, 3, 4, 2] == batch["label"]).all()
    assert loader.overflow_count == 0


@every_engine
def test_so_does_every_tensor_of_a_stream_and_of_a_dataset_that_reads_batches(how):
    class Stream(IterableDataset):
        def __iter__(self):
            return (np.full(3, number, np.float32) for number in range(20))

    class Reads(Photos):
        def __getitems__(self, keys):
            return [np.full(3, key, np.float32) for key in keys]

    for dataset in (Stream(), Reads(20)):
        loader = DataLoader(dataset, 5, **how)
        assert all(lies_in_a_slot(loader, batch) for batch in loader)
        assert loader.overflow_count == 0


class Counted(np.ndarray):
    """Counts what is made of it: a copy, a view, a cast."""

    made = 0

    def __array_finalize__(self, parent):
        Counted.made += 1


@pytest.mark.parametrize("how", [ENGINES["inline"], ENGINES["threads"]], ids=["inline", "threads"])
def test_nothing_is_made_of_an_array_on_its_way_into_the_slot(how):
    arrays = [np.full((4, 5), number, np.float32).view(Counted) for number in range(16)]

    class Ready:
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return {"image": arrays[index], "boxes": arrays[index], "crop": arrays[index]}

    loader = DataLoader(Ready(), 4, fields={"boxes": Field(pad=0), "crop": Field(ragged=True)}, **how)
    before = Counted.made
    assert len(list(loader)) == 4
    assert Counted.made == before


# -- read_into


class Reader:
    """Writes its fields into the rows itself; `asked` counts how often a sample was wanted instead."""

    def __init__(self, length=24, fail=(), extra=None):
        self.length = length
        self.fail = fail
        self.extra = extra or {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"x": np.full((2, 3), index, np.int16), "at": 0, "how": 0, **self.extra}

    def read_into(self, index, out):
        if index in self.fail:
            raise LookupError(f"no sample {index}")
        assert index in range(self.length)
        out["x"][:] = index
        out["at"][...] = out["x"].ctypes.data
        out["how"][...] = 1

    def describe(self, index):
        return f"reader/{index}"


@every_engine
def test_read_into_writes_straight_into_the_rows(how):
    loader = DataLoader(Reader(), 6, persistent_workers=how["num_workers"] > 0, **how)
    list(loader)  # the first sample of all is asked for: it tells the shapes
    for number, batch in enumerate(loader):
        assert batch["x"][:, 1, 2].tolist() == list(range(6 * number, 6 * number + 6))
        assert batch["how"].tolist() == [1] * 6
        # A forked worker has the arena where the consumer has it.
        assert batch["at"].tolist() == [batch["x"][row].data_ptr() for row in range(6)]


@every_engine
def test_read_into_is_found_behind_subsets_and_concatenations(how):
    wanted = [3, 1, 30, 25, 0, 47, 24, 23]
    dataset = Subset(ConcatDataset([Reader(24), Subset(Reader(24), range(24))]), wanted)
    batches = list(DataLoader(dataset, 4, **how))
    assert torch.cat([batch["x"][:, 0, 0] for batch in batches]).tolist() == [index % 24 for index in wanted]
    # The first sample of each worker tells the shapes.
    first = max(1, how["num_workers"])
    assert torch.cat([batch["how"] for batch in batches]).tolist() == [0] * first + [1] * (8 - first)


def test_only_some_of_the_concatenated_datasets_may_have_it():
    class Plain(Reader):
        read_into = None

    class Without:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Reader()[index]

    [batch] = DataLoader(ConcatDataset([Reader(4), Without()]), 8)
    assert batch["how"].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert batch["x"][:, 0, 0].tolist() == [0, 1, 2, 3] * 2


@every_engine
def test_an_error_in_read_into_names_the_sample_and_leaves_the_loader_usable(how):
    dataset = Reader(8, fail={5})
    loader = DataLoader(dataset, 4, **how)
    batches = iter(loader)
    next(batches)
    with pytest.raises(LookupError, match=r'no sample 5\n.*sample 5 \("reader/5"\)'):
        next(batches)
    dataset.fail = ()
    assert len(list(loader)) == 2


def test_skipped_samples_of_read_into_leave_no_trace():
    loader = DataLoader(Reader(10, fail={2, 7}), 4, on_error="skip")
    assert torch.cat([batch["x"][:, 0, 0] for batch in loader]).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert [error.index for error in loader.errors] == [2, 7]


@pytest.mark.parametrize(
    ("extra", "fields"),
    [
        ({"name": "text"}, {}),
        ({"boxes": np.zeros((2, 4))}, {"boxes": Field(pad=0)}),
        ({"boxes": np.zeros(2)}, {"boxes": Field(ragged=True)}),
    ],
    ids=["text", "pad", "ragged"],
)
def test_read_into_is_not_used_where_a_row_is_not_the_whole_sample(extra, fields):
    for batch in DataLoader(Reader(8, extra=extra), 4, fields=fields):
        assert batch["how"].tolist() == [0] * 4


# -- a collate_fn of the user's


class Numbers(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return np.full((4, 5, 3), index, np.uint8)


def by_position(positions):
    """Batches of the given results, one each."""
    return {"batch_sampler": [[position] for position in positions]}


def to_tensors(samples):
    images = torch.from_numpy(np.stack(samples))
    return {
        "images": images.permute(0, 3, 1, 2),
        "labels": [images[:, 0, 0, 0].long()],
        "none": torch.zeros(0, 3),
        "n": len(samples),
    }


def test_the_arrays_of_a_collate_fn_land_in_the_slot():
    loader = DataLoader(Numbers(), 4, num_workers=2, collate_fn=to_tensors)
    in_slots = []
    for number, batch in enumerate(loader):
        expected = to_tensors([Numbers()[index] for index in range(4 * number, 4 * number + 4)])
        assert torch.equal(batch["images"], expected["images"])
        assert batch["images"].stride() == expected["images"].stride()  # channels last stays channels last
        assert torch.equal(batch["labels"][0], expected["labels"][0])
        assert (batch["none"].shape, batch["n"]) == ((0, 3), 4)
        in_slots.append((lies_in_a_slot(loader, batch["images"]), lies_in_a_slot(loader, batch["labels"][0])))
    # The batches that were begun before the first one was seen cannot have known its size.
    ahead = inside.plan_of(loader).depth(2)
    assert in_slots[ahead:] == [(True, True)] * (16 - ahead)
    assert loader.overflow_count == 2 * in_slots.count((False, False))
    assert all(lies_in_a_slot(loader, batch["images"]) for batch in loader)


def sized(samples):
    [sample] = samples
    return np.full(1000 * int(sample.flat[0]), 7, np.int32)


@pytest.mark.parametrize(
    "sizes",
    [[1, 1, 2, 2, 5, 5, 9, 9], [9, 5, 2, 1, 1, 0, 1], [1, 9] * 6, [0, 0, 3, 0, 3]],
    ids=["growing", "shrinking", "alternating", "empty"],
)
def test_results_of_any_size_arrive(sizes):
    loader = DataLoader(Numbers(), num_workers=1, collate_fn=sized, prefetch_factor=1, **by_position(sizes))
    for _ in range(2):
        results = list(loader)
        assert [len(result) for result in results] == [1000 * size for size in sizes]
        assert all((result == 7).all() for result in results)
    before = loader.overflow_count
    assert len(list(loader)) == len(sizes)
    assert loader.overflow_count == before  # by now every size has been seen


def varied(samples):
    pieces = [np.full(3, n) for n in range(int(samples[0].flat[0]))]
    return {"pieces": pieces, "text": "t" * len(pieces), "object": np.array([None, "a"], dtype=object)}


def test_results_may_have_another_structure_each_time():
    counts = [3, 0, 1, 7, 2, 7, 0]
    loader = DataLoader(Numbers(), num_workers=2, collate_fn=varied, **by_position(counts))
    for _ in range(2):
        for count, result in zip(counts, loader, strict=True):
            assert [piece.tolist() for piece in result["pieces"]] == [[n] * 3 for n in range(count)]
            assert result["text"] == "t" * count
            assert result["object"].tolist() == [None, "a"]


def unpicklable(samples):
    return lambda: samples


def test_a_result_that_cannot_be_sent_says_so_and_leaves_the_loader_usable():
    loader = DataLoader(Numbers(), 32, num_workers=1, collate_fn=unpicklable)
    batches = iter(loader)
    for _ in range(2):
        with pytest.raises(Exception, match=r"pickle|local object"):
            next(batches)
    assert list(batches) == []


def test_kept_results_of_a_collate_fn_are_never_written_over():
    loader = DataLoader(Numbers(), 4, num_workers=2, collate_fn=to_tensors)
    kept = [batch["images"] for _ in range(3) for batch in loader]
    assert [int(images[0, 0, 0, 0]) for images in kept] == list(range(0, 64, 4)) * 3


@every_engine
def test_without_batches_each_sample_arrives_as_it_is(how):
    loader = DataLoader(Photos(8), batch_size=None, **how)
    for index, sample in enumerate(loader):
        expected = default_convert(Photos()[index])
        assert [path for path, _ in leaves(sample)] == [path for path, _ in leaves(expected)]
        for (_, a), (_, b) in zip(leaves(sample), leaves(expected), strict=True):
            assert type(a) is type(b)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# -- padded and ragged fields


@every_engine
def test_padded_fields_have_values_counts_and_a_mask(how):
    for batch in DataLoader(Photos(), 6, fields=FIELDS, **how):
        boxes = batch["boxes"]
        assert type(boxes) is Padded
        counts = [index % 4 for index in batch["label"].tolist()]
        assert boxes.counts.tolist() == counts
        assert boxes.values.shape == (6, 3, 4)
        for row, index in enumerate(batch["label"].tolist()):
            assert (boxes.values[row, : counts[row]] == index).all()
            assert (boxes.values[row, counts[row] :] == -1).all()
            assert boxes.mask[row].tolist() == [place < counts[row] for place in range(3)]


@every_engine
def test_ragged_fields_are_views_and_have_a_flat_form(how):
    loader = DataLoader(Photos(), 6, fields=FIELDS, **how)
    for batch in loader:
        crops = batch["crops"]
        assert type(crops) is Ragged
        assert [tuple(crop.shape) for crop in crops] == [(1 + index % 3, 2, 3) for index in batch["label"].tolist()]
        assert all((crop == index).all() for crop, index in zip(crops, batch["label"], strict=True))
        assert all(lies_in_a_slot(loader, crop) for crop in crops)
        values, offsets = crops.flat()
        assert offsets.tolist() == [0, *np.cumsum([len(crop) for crop in crops])]
        assert torch.equal(values[offsets[2] : offsets[3]], crops[2])


class Growing(Dataset):
    """Sample i has i points; every 16th is much larger."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"meta": {"points": np.full((2000 if index % 16 == 9 else index % 8, 2), index, np.int16)}, "n": index}


@every_engine
@pytest.mark.parametrize("field", [Field(pad=-5), Field(ragged=True)], ids=["pad", "ragged"])
def test_a_sample_larger_than_its_row_overflows_once_and_the_rows_grow(how, field):
    loader = DataLoader(Growing(), 4, fields={"meta.points": field}, **how)
    overflows = []
    for _ in range(2):
        for batch in loader:
            points = batch["meta"]["points"]
            for row, index in enumerate(batch["n"].tolist()):
                count = 2000 if index % 16 == 9 else index % 8
                own = points[row] if field.ragged else points.values[row, : points.counts[row]]
                assert own.shape == (count, 2)
                assert (own == index).all()
        overflows.append(loader.overflow_count)
    # The first one, and perhaps those in batches that were open already; then never again.
    assert 1 <= overflows[0] <= 2
    assert overflows[1] == overflows[0]


@every_engine
def test_whole_images_of_different_sizes_come_as_a_list(how):
    class Images:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return np.full((10 + 7 * index % 30, 20 + index, 3), index, np.uint8), index

    for images, labels in DataLoader(Images(), 5, fields={"0": Field(ragged=True)}, **how):
        for image, index in zip(images, labels.tolist(), strict=True):
            assert tuple(image.shape) == (10 + 7 * index % 30, 20 + index, 3)
            assert (image == index).all()


@every_engine
def test_a_declared_field_that_is_not_there_is_an_error_that_says_what_is(how):
    loader = DataLoader(Photos(), 4, fields={"box": Field(pad=0)}, **how)
    with pytest.raises(ValueError, match=r"declares 'box'; the first sample has 'image', 'pair\.image'.*'boxes'"):
        next(iter(loader))


@every_engine
def test_a_declared_field_that_is_no_array_is_an_error(how):
    loader = DataLoader(Photos(), 4, fields={"label": Field(ragged=True)}, **how)
    with pytest.raises(ValueError, match="field 'label' is declared ragged but the first sample holds int"):
        next(iter(loader))


@every_engine
def test_strings_and_objects_overflow_and_are_counted(how):
    class Named(Photos):
        def __getitem__(self, index):
            return {"x": np.full(3, index), "name": f"photo {index}", "tags": {"a", "b"} if index < 0 else "t"}

    loader = DataLoader(Named(12), 4, **how)
    assert [batch["name"] for batch in loader] == [[f"photo {i}" for i in range(at, at + 4)] for at in (0, 4, 8)]
    assert loader.overflow_count == 24
