"""Very many small fields: several share a block of a few pages, and none of them a block with a large one."""

import gc

import numpy as np
import pytest
import torch

from loaders import DataLoader, Field
from loaders.batch.spec import BatchSpec, owners

MANY = 3000


class Wide:
    def __init__(self, shape=(64, 64, 3)):
        self.shape = shape

    def __len__(self):
        return 30

    def __getitem__(self, index):
        sample = {f"f{number}": index * number for number in range(MANY)}
        sample["image"] = np.full(self.shape, index, np.uint8)
        return {**sample, "boxes": np.full((index % 3, 4), index), "text": str(index), "last": np.float32(index)}


@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_method": "thread"}])
def test_thousands_of_scalars_arrive_and_take_about_what_they_hold(how):
    loader = DataLoader(Wide(), 8, fields={"boxes": Field(pad=-1)}, **how)
    spec = None
    for _ in range(2):
        held = list(loader)
        for number, batch in enumerate(held):
            rows = list(range(8 * number, min(8 * number + 8, 30)))
            for name in ("f0", "f1", "f7", f"f{MANY - 1}"):
                assert batch[name].tolist() == [row * int(name[1:]) for row in rows]
                assert batch[name].is_contiguous()
            assert batch["image"][:, 0, 0, 0].tolist() == batch["last"].tolist() == rows
            assert batch["text"] == [str(row) for row in rows]
            assert batch["boxes"].counts.tolist() == [row % 3 for row in rows]
        spec = loader._plan.spec
    sizes = spec.sizes(8)
    assert sum(sizes) < 1.2 * (8 * 8 * MANY + 8 * 64 * 64 * 3) + 10_000
    assert sum(size > 0 for size in sizes) < MANY // 100
    assert loader.overflow_count == 30 * 2


def test_what_holds_a_small_field_holds_no_large_one_and_few_others():
    loader = DataLoader(Wide((512, 512, 3)), 8, fields={"boxes": Field(pad=-1)}, num_workers=1)
    kept = [(batch["f5"], batch["last"]) for batch in loader]
    gc.collect()
    held = loader.holders().splitlines()
    assert not [line for line in held if "image" in line]
    assert sum(int(line.split(": ")[1].split(" bytes")[0].replace(",", "")) for line in held) <= 8 * (1 << 15)
    assert torch.cat([each[1] for each in kept]).tolist() == list(range(30))


def test_few_fields_have_a_block_each():
    spec = BatchSpec.from_sample({f"f{number}": number for number in range(20)})
    assert spec.sizes(16) == [128] * 20
    assert spec.shares(16) == [(number, 0) for number in range(20)]


@pytest.mark.parametrize("rows", [1, 7, 64, 500, 5000])
def test_shares_overlap_nowhere_and_stay_in_their_block(rows):
    sample = {
        f"{kind}{number}": value
        for number in range(100)
        for kind, value in {"i": 1, "t": "x", "a": np.zeros((number, 3))}.items()
    }
    spec = BatchSpec.from_sample(sample, {"a3": Field(pad=0), "a4": Field(ragged=True)})
    sizes, at, blocks = spec.sizes(rows), 1 << 20, []
    for size in sizes:
        blocks.append((at, size) if size else (0, 0))
        at += size
    places = spec.spread(blocks, rows)
    ends = 0
    for (offset, nbytes), field in sorted(zip(places, spec.fields, strict=True), key=lambda pair: pair[0]):
        if field.kind != "object" and field.nbytes(rows):
            assert nbytes >= field.nbytes(rows)
            assert offset >= ends
            assert any(start <= offset and offset + field.nbytes(rows) <= start + size for start, size in blocks)
            ends = offset + field.nbytes(rows)


def test_batches_of_growing_size_find_their_fields_again():
    sizes = [1, 3, 8, 2, 16]
    starts = np.cumsum([0, *sizes])
    batches = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    loader = DataLoader(Wide((2, 2, 3)), batch_sampler=batches, fields={"boxes": Field(pad=-1)}, num_workers=1)
    for rows, batch in zip(batches, loader, strict=True):
        for name in ("f1", f"f{MANY // 2}", f"f{MANY - 1}"):
            assert batch[name].tolist() == [row * int(name[1:]) for row in rows]
        assert batch["last"].tolist() == rows


def test_owners_are_those_whose_block_a_field_lies_in():
    places = [(4096, 4096), (0, 0), (4160, 64), (8192, 8192), (0, 4096), (64, 64), (4224, 64), (0, 0)]
    assert owners(places) == [0, 1, 0, 3, 4, 4, 0, 7]
