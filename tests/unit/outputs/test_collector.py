"""Rows come back whole and in dataset order: what is collected, kept, refused and gathered."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from loaders import ArrayDataset, DataLoader, DevicePrefetcher, OutputCollector
from loaders.errors import ArrayKindError, CollectError, DtypeError
from loaders.outputs import stores

RANKS = Path(__file__).parents[2] / "support" / "collecting_ranks.py"
X = torch.arange(30.0).reshape(10, 3)


def batches(order, size=4):
    return [order[start : start + size] for start in range(0, len(order), size)]


SHUFFLED = [7, 1, 9, 3, 0, 2, 8, 5, 4, 6]


# -- what comes back


@pytest.mark.parametrize("length", [None, 10])
@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, np.uint16, lambda rows: torch.tensor(rows).int()]
)
def test_rows_come_in_dataset_order_whatever_the_order_of_adding(length, kind):
    collector = OutputCollector(length)
    for rows in batches(SHUFFLED):
        collector.add(X[rows], kind(rows))
    result = collector.result()
    assert result.dtype == np.float32
    assert np.array_equal(result, X)
    assert result.flags.owndata
    assert result.flags.writeable
    assert collector.result() is result


def test_without_an_index_rows_keep_the_order_of_adding():
    collector = OutputCollector(length=10)
    for rows in batches(SHUFFLED, 3):
        collector.add(X[rows])
    assert np.array_equal(collector.result(), X[SHUFFLED])


class Pair(NamedTuple):
    mean: torch.Tensor
    scale: torch.Tensor


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    pair: Pair


def test_the_result_has_the_structure_of_the_outputs():
    collector = OutputCollector()
    for rows in batches(SHUFFLED):
        x = X[rows]
        collector.add({"found": Found(x.double(), Pair(x > 9, x.long())), "list": [x.T.contiguous().T, x[:, :0]]}, rows)
    result = collector.result()
    assert isinstance(result["found"], Found)
    assert isinstance(result["found"].pair, Pair)
    assert np.array_equal(result["found"].boxes, X.double())
    assert np.array_equal(result["found"].pair.mean, X > 9)
    assert result["found"].pair.scale.dtype == np.int64
    assert np.array_equal(result["list"][0], X)
    assert result["list"][1].shape == (10, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_dtypes_that_numpy_lacks_come_as_float32(dtype):
    collector = OutputCollector()
    collector.add(X[:4].to(dtype))
    result = collector.result()
    assert result.dtype == np.float32
    assert np.array_equal(result, X[:4].to(dtype).float())


def test_outputs_are_detached_and_may_be_changed_as_soon_as_they_were_added():
    collector = OutputCollector()
    weight = torch.ones(3, requires_grad=True)
    index = torch.tensor([1, 0])
    for _ in range(2):
        output = X[:2] * weight
        collector.add(output, index)
        with torch.no_grad():
            output.fill_(-1)
        index += 2
    assert np.array_equal(collector.result(), X[[1, 0, 1, 0]])


class Staging:
    """A readback whose copies are torch's own and done at once."""

    def empty(self, shape, dtype):
        return torch.empty(tuple(shape), dtype=dtype)

    def wait_for_compute(self):
        pass

    def copy(self, source, target):
        assert source.is_contiguous()
        assert not source.is_conj()
        assert source.dtype == target.dtype
        target.copy_(source)

    def record_event(self):
        return self

    def query(self):
        return True

    def synchronize(self):
        pass


@pytest.mark.parametrize("readback", [Staging(), None], ids=["staged", "plain"])
def test_batches_may_differ_in_all_that_makes_no_difference(readback):
    collector = OutputCollector()
    collector._readback_of = lambda tensor: readback
    whole = torch.complex(X, X)
    with torch.inference_mode():
        collector.add(whole[:4] + 0, torch.arange(4, dtype=torch.int16))
    collector.add(whole[4:6].clone().requires_grad_(), torch.tensor([4, 5]))
    collector.add(whole[6:8].T.contiguous().T, np.array([6, 7], np.int8))
    collector.add(whole.conj().resolve_conj().conj()[8:], range(8, 10))
    collector.add(whole[:0], [])
    assert np.array_equal(collector.result(), whole)


def test_one_batch_out_of_order_is_sorted():
    collector = OutputCollector()
    collector.add(X[[2, 0, 1]], [2, 0, 1])
    assert np.array_equal(collector.result(), X[:3])


@pytest.mark.parametrize(("length", "file"), [(None, None), (4, None), (4, "x.npy")])
def test_of_rows_given_twice_the_first_counts(tmp_path, length, file):
    collector = OutputCollector(length, file and tmp_path / file)
    collector.add(X[:3], [2, 0, 2])
    collector.add(X[3:7], [0, 1, 3, 1])
    assert np.array_equal(collector.result(), X[[1, 4, 0, 5]])


def test_batches_may_be_empty():
    collector = OutputCollector(0)
    collector.add({"x": X[:0]}, [])
    assert collector.result()["x"].shape == (0, 3)
    collector = OutputCollector()
    for rows in ([], [1], [], [0]):
        collector.add(X[rows], rows)
    assert np.array_equal(collector.result(), X[:2])


@pytest.mark.parametrize("workers", [0, 1])
def test_it_takes_what_a_loader_and_a_prefetcher_give(workers):
    dataset = ArrayDataset({"x": X.numpy()})
    loader = DataLoader(dataset, 3, shuffle=True, return_index=True, num_workers=workers, seed=0)
    collector = OutputCollector(len(dataset))
    for batch, index in DevicePrefetcher(loader, "cpu"):
        collector.add({"twice": batch["x"] * 2}, index)
    assert np.array_equal(collector.result()["twice"], X * 2)


# -- files


@pytest.mark.parametrize("length", [0, 10])
def test_named_outputs_become_files_of_a_folder_mapped_read_only(tmp_path, length):
    folder = tmp_path / "new" / "features"
    collector = OutputCollector(length, folder)
    for rows in [[], *batches(SHUFFLED[:length])]:
        collector.add({"x": X[rows], "more": {"half": X[rows].bfloat16()}, "none": X[rows][:, :0]}, rows)
    assert not list(folder.glob("*.npy")), "a file has its name only when it is whole"
    result = collector.result()
    assert sorted(file.name for file in folder.iterdir()) == ["more.half.npy", "none.npy", "x.npy"]
    for array, file in ((result["x"], "x.npy"), (result["more"]["half"], "more.half.npy")):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert np.array_equal(np.load(folder / file), X[:length])
        assert np.array_equal(array, X[:length])


def test_a_file_that_is_there_is_replaced_by_a_whole_one_only(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros(3))
    collector = OutputCollector(10, str(file))
    collector.add(X[:8], range(8))
    with pytest.raises(CollectError, match=r"2 of 10 rows are missing: 8, 9\.\n"):
        collector.result()
    assert np.array_equal(np.load(file), np.zeros(3))
    collector.add(X[8:], [8, 9])
    assert np.array_equal(collector.result(), X)
    assert np.array_equal(np.load(file), X)


def test_a_full_disk_is_an_error_before_the_first_row_is_written(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match=r"no room for 248 bytes: No space left.*x\.npy\.part"):
        OutputCollector(10, tmp_path / "x.npy").add(X[:1], [0])
    assert not list(tmp_path.iterdir())


# -- what is refused


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"a": X}, {"b": X}, r'outputs "b", but "a" in the batches before'),
        ({"a": X}, X, r'outputs one tensor, but "a" in the batches before'),
        ({"a": X, "b": X}, {"a": X}, r'outputs "a", but "a", "b" in'),
        (X, X[:, :2], r"the output: float32 rows of shape \(2,\), but float32 of shape \(3,\) in"),
        ({"a": X}, {"a": X.bfloat16()}, r'output "a": bfloat16 rows of shape \(3,\), but float32 of'),
    ],
)
def test_outputs_that_differ_from_those_before_are_named(first, second, says):
    collector = OutputCollector()
    collector.add(first)
    with pytest.raises(CollectError, match=says):
        collector.add(second)


@pytest.mark.parametrize(
    ("outputs", "error", "says"),
    [
        (torch.tensor(1.0), CollectError, r"the output has no rows.*ScalarLog"),
        ({"a": X, "b": X[:4]}, CollectError, r'output "b" has 4 rows, but output "a" has 10'),
        ({}, CollectError, "without a tensor"),
        ({"a": "text"}, ArrayKindError, r'output "a": Expected a torch.Tensor, not str'),
        ({"a": X.to_sparse()}, ArrayKindError, r'output "a": .*layout'),
        (torch.empty(2, dtype=torch.bits8), DtypeError, "the output: .*NumPy has no such dtype"),
        ({1: X, "1": X}, CollectError, "the same name"),
    ],
)
def test_outputs_that_are_no_rows_are_refused(outputs, error, says):
    with pytest.raises(error, match=says):
        OutputCollector().add(outputs)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([0, 1], r"index of shape \(2,\), but the outputs have 10 rows"),
        (torch.arange(10)[:, None], r"index of shape \(10, 1\), but"),
        (3, r"index of shape \(\), but"),
        (np.linspace(0, 1, 10), "not of integers"),
        (torch.ones(10, dtype=torch.bool), "not of integers"),
        (list("abcdefghij"), "not of integers"),
        (range(-1, 9), r"index -1: expected 0 … 11, for length=12"),
        (torch.arange(3, 13), r"index 12: expected 0 … 11"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, says):
    collector = OutputCollector(12)
    with pytest.raises(CollectError, match=says):
        collector.add(X, index)
    collector.add(X)  # nothing of the batch was kept


def test_an_index_with_some_batches_only_is_refused():
    for first, second in (([0], None), (None, [0])):
        collector = OutputCollector()
        collector.add(X[:1], first)
        with pytest.raises(CollectError, match="some batches came with an index and some without"):
            collector.add(X[:1], second)


def test_missing_rows_are_counted_and_the_first_are_named():
    collector = OutputCollector(3000)
    collector.add(X, range(1, 20, 2))
    with pytest.raises(CollectError, match=r"2,990 of 3,000 rows are missing: 0, 2, 4, 6, 8 …"):
        collector.result()


def test_misuse_is_named(tmp_path):
    with pytest.raises(CollectError, match="path= needs length="):
        OutputCollector(path=tmp_path)
    for length in (-1, 2.0):
        with pytest.raises(CollectError, match="expected how many samples"):
            OutputCollector(length)
    with pytest.raises(CollectError, match="nothing was added"):
        OutputCollector(0).result()
    with pytest.raises(CollectError, match="cannot be that of a file"):
        OutputCollector(10, tmp_path).add({"a/b": X})
    collector = OutputCollector()
    collector.add(X)
    collector.result()
    with pytest.raises(CollectError, match=r"add\(\) after result\(\)"):
        collector.add(X)


# -- several ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_three_ranks_gather_on_the_first_and_fail_together(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", str(RANKS), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    told = [Path(tmp_path, f"rank{rank}.txt").read_text().splitlines() for rank in range(3)]
    assert told[0][:3] == ["memory True", "file True", "scratch files []"]
    assert told[1][:3] == told[2][:3] == ["memory None", "file None", "scratch files []"]
    for rank in range(3):
        missing, names, failure, index, late = told[rank][3:]
        assert "CollectError: " in missing
        assert "1 of 7 rows are missing: 6" in missing
        assert (
            "rank 1 collected other of float32 rows (3,), wide of float32 rows (3,), but rank 0 x of float32" in names
        )
        assert "index 99" in failure
        assert "several ranks need an index" in index
        assert "initialised or ended" in late
    # Who failed has its own error; the others are told whose it is.
    assert ["rank 2 failed" in told[rank][5] for rank in range(3)] == [True, True, False]
