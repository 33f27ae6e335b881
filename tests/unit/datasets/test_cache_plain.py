"""What a DecodedCache keeps in a file: plain data, as it was, and nothing else."""

import dataclasses
import os
import subprocess
import sys
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from support.samples import SAMPLES, Listed

from loaders import DatasetError, DecodedCache
from loaders.nested import leaves

ROOM = 1 << 20


@dataclasses.dataclass
class Odd:
    number: int

    def __post_init__(self):
        self.secret = "lost if only fields were kept"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


NOT_PLAIN = {
    "defaultdict": "defaultdict",
    "dict subclass with attributes": "KeyedDict",
    "Counter": "Counter",
    "Mapping": "Frozen",
    "Sequence": "Row",
    "Sequence without constructor": "NoConstructor",
    "range": "range",
    "deque": "deque",
    "mapping in a tuple": "Frozen",
    "int subclass": "Signed",
    "matrix": "matrix",
    "masked array": "MaskedArray",
    "conjugated tensor": "Tensor",
    "tensor that requires grad": "Tensor",
    "Parameter": "Parameter",
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_samples_of_other_kinds_are_refused_by_their_type(path, kind):
    with pytest.raises(DatasetError, match=f"sample 0 cannot be cached: .* is a {NOT_PLAIN[kind]}"):
        DecodedCache(Listed([SAMPLES[kind](0)]), ROOM, path=path)[0]


@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind not in (*NOT_PLAIN, "dict then Mapping")])
def test_plain_samples_of_every_kind_come_back_the_same(path, kind):
    samples = [SAMPLES[kind](index) for index in range(5)]
    cache = DecodedCache(Listed(samples), ROOM, path=path)
    epoch(cache)
    assert cache.cached_count == 5
    for sample, again in zip(samples, epoch(cache), strict=True):
        assert_same(again, sample)


def epoch(dataset):
    return [dataset[index] for index in range(len(dataset))]


def assert_same(one, other):
    assert type(one) is type(other)
    assert [name for name, _ in leaves(one)] == [name for name, _ in leaves(other)]
    for (_, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else np.testing.assert_array_equal(a, b) is None


@pytest.mark.parametrize(
    "value",
    [
        *(10**4000, -(2**64), 1e-320, -0.0, float("inf"), 3 - 4j, "\ud800", b"\0", bytearray(b"ab"), None),
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(9)[::-2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.broadcast_to(np.float32(3), (2, 3)),
        np.zeros((0, 4), np.float32),
        np.array("2026-01-01", "M8[s]"),
        np.timedelta64(3, "h"),
        np.array(["größe", ""]),
        np.zeros(3, [("a", "i4"), ("b", ">f8", (2,)), ("c", [("d", "S3")])]),
        np.zeros(2, np.dtype({"names": ["a"], "formats": ["u1"], "offsets": [3], "itemsize": 8})),
        np.arange(3, dtype=">i2"),
        np.longdouble(1) / 3,
        {"a": {(1, "b"): [np.int8(1)], None: (), 2.5: {}}},
        OrderedDict(b=1, a=[]),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_values_come_back_bit_by_bit_from_a_file(path, value):
    cache = DecodedCache([{"x": value}], ROOM, path=path)
    for _ in range(2):
        assert_same(cache[0]["x"], value)
        assert repr(cache[0]["x"]) == repr(value)
    for leaf in (leaf for _, leaf in leaves(cache[0]) if isinstance(leaf, np.ndarray)):
        assert leaf.flags.writeable
        assert leaf.base is None or leaf.base.base is None or leaf.base.base.nbytes <= leaf.nbytes
    assert cache.hit_rate == 0.8 if isinstance(value, np.ndarray) else cache.cached_count == 1


def test_memory_mapped_arrays_come_back_as_arrays(path, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6))
    cache = DecodedCache(Listed(np.load(tmp_path / "x.npy", mmap_mode="r").reshape(2, 3)), ROOM, path=path)
    for _ in range(2):
        assert cache[1].tolist() == [3, 4, 5]
    assert type(cache[1]) is np.ndarray


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (deque([1]), 'field "a.1.b" is a deque'),
        (np.array([None], object), 'field "a.1.b" is an array of dtype object'),
        (np.zeros(2, [("x", object)]), r'field "a.1.b" is an array of dtype \[\('),
        (Odd(1), r'field "a.1.b" is a Odd with attributes besides its fields, \[.secret.\]'),
        (slice(1), 'field "a.1.b" is a slice'),
    ],
)
def test_what_is_not_plain_is_refused_by_the_name_of_its_field(path, value, named):
    cache = DecodedCache([0, {"a": (1, {"b": value})}], ROOM, path=path)
    with pytest.raises(DatasetError, match=f"^sample 1 cannot be cached: {named}.*\n.*stores plain data in its file"):
        cache[1]
    assert cache.cached_count == 0


def test_a_sample_that_holds_itself_is_refused(path):
    class Circle(Listed):
        def __getitem__(self, index):
            sample = [1]
            sample.append(sample)
            return sample

    with pytest.raises(DatasetError, match="sample 0 cannot be cached: its containers are nested too deep"):
        DecodedCache(Circle([0]), ROOM, path=path)[0]


READ_TWICE = """
import sys
from support.samples import Listed, Point, Record
from loaders import DecodedCache

class Counted(Listed):
    reads = 0
    def __getitem__(self, index):
        Counted.reads += 1
        return super().__getitem__(index)

samples = [kind(index, [1]) for kind in (Point, Record) for index in range(4)]
cache = DecodedCache(Counted(samples), 1 << 20, path=sys.argv[1])
for _ in range(2):
    assert [type(cache[index]) for index in range(8)] == [Point] * 4 + [Record] * 4
    assert [cache[index][0] for index in range(4)] == [cache[index].image for index in range(4, 8)] == [0, 1, 2, 3]
print(Counted.reads, cache.cached_count, cache.cached_nbytes)
"""


def test_of_samples_with_classes_each_process_reads_one_from_the_dataset(path):
    tests = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    program = [sys.executable, "-c", READ_TWICE, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    told = [subprocess.run(program, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    (reads, count, nbytes), again = (each.stdout.split() for each in told)
    assert (reads, count) == ("8", "8")
    assert again == ["2", "8", nbytes]


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_of_a_view_only_what_it_shows_is_kept(path, kind, in_file):
    large = np.arange(1 << 20, dtype=np.float32)
    values = large if kind == "array" else torch.from_numpy(large)
    cache = DecodedCache(
        Listed([{"x": values[index : index + 3]} for index in range(8)]), ROOM, path=path if in_file else None
    )
    assert [sample["x"].tolist() for sample in [*epoch(cache), *epoch(cache)]] == [
        [i, i + 1, i + 2] for i in range(8)
    ] * 2
    assert cache.cached_count == 8
    assert cache.cached_nbytes < 20_000
