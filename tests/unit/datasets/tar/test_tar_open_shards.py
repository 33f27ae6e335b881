"""How many shards are open, by whom, and what is noticed when one changes."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support.tars import write_photos, write_tar

import loaders.datasets.tar.shards as shards_module
from loaders import (
    CenterCrop,
    DataLoader,
    DatasetError,
    DecodeError,
    TarFiles,
)
from loaders.datasets.image_files import PackedPaths


@pytest.fixture
def root(tmp_path):
    write_photos(tmp_path)
    return tmp_path


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_a_bounded_number_of_shards_is_open_and_none_after(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_OPEN", 5)
    for shard in range(20):
        write_tar(tmp_path / f"{shard:02}.tar", [("0.cls", str(shard).encode())])
    gc.collect()  # what the tests before left open
    before = descriptors()
    dataset = TarFiles(tmp_path / "*.tar")
    assert descriptors() == before
    assert [sample["label"] for sample in dataset] == list(range(20))
    assert descriptors() == before + 5
    assert [dataset[index]["label"] for index in (19, 0, 18, 1)] == [19, 0, 18, 1]
    assert descriptors() == before + 5
    del dataset
    assert descriptors() == before


def test_when_descriptors_run_out_others_are_closed(root, monkeypatch):
    dataset = TarFiles(root / "*.tar")
    assert dataset[0]["label"] == 0
    opened, is_full = shards_module.open_shard, [True]

    def exhausted(path):
        if is_full.pop():
            raise OSError(24, "Too many open files")
        return opened(path)

    monkeypatch.setattr(shards_module, "open_shard", exhausted)
    is_full[:] = [False, True]
    assert dataset[11]["label"] == 33
    assert len(dataset._open) == 1


def test_threads_share_descriptors_that_are_closed_under_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_OPEN", 2)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", [(f"{n}.cls", str(100 * shard + n).encode()) for n in range(10)])
    dataset, wrong = TarFiles(tmp_path / "*.tar"), []

    def read(seed):
        indices = np.random.default_rng(seed).integers(0, 80, 400).tolist()
        wrong.extend(each for each in indices if dataset[each]["label"] != each // 10 * 100 + each % 10)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(dataset._open) <= 2


def test_a_pickled_copy_takes_no_descriptor_along_and_scans_nothing(root, monkeypatch):
    dataset = TarFiles(root / "*.tar", crop=CenterCrop(24))
    dataset[0]
    assert len(dataset._open) == 1
    monkeypatch.setattr("loaders.datasets.tar.tar_files.scan", None)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy._open) == 0
    np.testing.assert_array_equal(copy[7]["image"], dataset[7]["image"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_opens_its_own(root):
    dataset = TarFiles(root / "*.tar")
    dataset[0]
    dataset[5]
    child = os.fork()
    if child == 0:
        try:
            is_right = dataset[0]["label"] == 0 and dataset[11]["label"] == 33 and len(dataset._open) == 2
            os._exit(0 if is_right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert len(dataset._open) == 2


def test_the_index_holds_no_object_per_sample(tmp_path):
    path = write_tar(tmp_path / "0.tar", [(f"{n:05}.cls", b"1") for n in range(3000)])
    dataset = TarFiles(path)
    assert len(pickle.dumps(dataset)) < 3000 * 60
    arrays = vars(dataset._index).values()
    assert all(isinstance(each, (np.ndarray, PackedPaths)) or len(each) == 1 for each in arrays)


# -- shards that change


def test_a_shard_that_was_changed_is_named_and_not_read(root):
    dataset = TarFiles(root / "*.tar")
    status = os.stat(root / "000.tar")
    os.utime(root / "000.tar", ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(DecodeError, match=r'^sample 0 .*000.tar/00.jpg"\): .*another modification time.\n  Make the'):
        dataset[0]
    with open(root / "001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DecodeError, match=r'^sample 5 .*001.tar/05.jpg"\): its shard has changed .* another size'):
        dataset[5]
    os.unlink(root / "002.tar")
    with pytest.raises(DecodeError, match=r'sample 10 \(".*002.tar/10.jpg"\): No such file'):
        dataset[10]


@pytest.mark.parametrize("field", ["image", "label"])
def test_a_shard_that_is_replaced_while_it_is_open_gives_no_wrong_bytes(root, field):
    dataset = TarFiles(root / "*.tar", {field: {"image": "jpg", "label": "cls"}[field]})
    dataset[0]
    content = (root / "000.tar").read_bytes()
    with open(root / "000.tar", "r+b") as file:  # the same file, so that its descriptor is still right
        file.write(content[1024:])
    for index in range(5):
        with pytest.raises(DecodeError, match=r"its shard has changed since its members were found"):
            dataset[index]
    os.truncate(root / "000.tar", 700)
    with pytest.raises(DecodeError, match=r"its shard has (changed|been cut short)"):
        dataset[4]


# -- elsewhere


def test_shards_behind_a_url_are_read_by_ranges(root):
    for path in sorted(root.glob("*.tar")):
        with fsspec.open(f"memory://bucket/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    local = TarFiles(root / "*.tar", crop=CenterCrop(24))
    for shards in ("memory://bucket/{000..002}.tar", "memory://bucket/*.tar"):
        remote = TarFiles(shards, crop=CenterCrop(24), index="memory://bucket/index")
        assert remote.describe(11).endswith("bucket/002.tar/11")
        for index in (0, 11, 6):
            assert remote[index]["label"] == local[index]["label"]
            np.testing.assert_array_equal(remote[index]["image"], local[index]["image"])
        (batch,) = DataLoader(remote, 12, num_workers=2, worker_method="thread")
        assert batch["label"].tolist() == [3 * number for number in range(12)]
    with pytest.raises(DatasetError, match="no file matches"):
        TarFiles("memory://bucket/none-*.tar")
    with pytest.raises(DatasetError, match=r"none.tar.*cannot be opened"):
        TarFiles("memory://bucket/none.tar")
