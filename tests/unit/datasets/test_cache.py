"""What a DecodedCache promises in one process; files and processes are in test_cache_files.py and tests/faults."""

import copy
import gc
import os
import pickle
import threading
from collections import deque

import albumentations as A
import cv2
import numpy as np
import pytest
from support.numpy_datasets import Counted
from support.samples import SAMPLES, Listed
from torch.utils.data import Subset

from loaders import ArrayDataset, DataLoader, DatasetError, DecodedCache, DecodeError, ImageFiles, ImageFolder
from loaders.datasets.cache import records
from loaders.datasets.cache.file import TAIL_AT
from loaders.images.crops import RandomResizedCrop, Resize

ROOM = 1 << 22


def epoch(dataset):
    return [dataset[index] for index in range(len(dataset))]


def test_every_sample_is_read_once_and_comes_back_as_it_was():
    dataset = Counted()
    cache = DecodedCache(dataset, ROOM)
    for _ in range(3):
        for index, sample in enumerate(epoch(cache)):
            assert sample["label"] == index
            assert sample["image"].dtype == np.uint8
            assert (sample["image"] == index).all()
            assert sample["image"].shape == (10, 12, 3)
    assert dataset.reads == list(range(8))
    assert (cache.cached_count, round(cache.hit_rate, 3)) == (8, 0.667)


@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if "tensor" not in kind and kind != "Parameter"])
def test_samples_of_every_kind_come_back_the_same(kind):
    samples = [SAMPLES[kind](index) for index in range(5)]
    cache = DecodedCache(Listed(samples), ROOM)
    epoch(cache)
    assert cache.cached_count == 5
    for sample, again in zip(samples, epoch(cache), strict=True):
        assert type(again) is type(sample)
        np.testing.assert_equal(plain(again), plain(sample))


def plain(sample):
    """What NumPy can compare."""
    return list(sample) if isinstance(sample, deque) else vars(sample) if hasattr(sample, "_items") else sample


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, :, ::-1],
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3).transpose(2, 0, 1),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.broadcast_to(np.float32(3), (2, 3)),
        np.zeros((0, 4), np.float32),
        np.array("2026-01-01", "M8[s]"),
        np.array([None, "text"], object),
        np.zeros(3, "i4,>f8"),
    ],
    ids=["reversed", "channels first", "Fortran", "broadcast", "empty", "0-d date", "object", "structured"],
)
def test_arrays_keep_values_and_dtype_and_are_always_writable(array):
    cache = DecodedCache([array], ROOM)
    for _ in range(2):
        again = cache[0]
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)
        assert again.flags.writeable


def test_writing_into_a_sample_changes_nobody_elses():
    held = {"image": np.zeros((4, 4), np.uint8)}
    held["image"].flags.writeable = False
    cache = DecodedCache([held], ROOM)
    for _ in range(3):
        sample = cache[0]
        assert not sample["image"].any()
        sample["image"][:] = 255


def test_one_field_of_a_sample_does_not_keep_the_others():
    cache = DecodedCache([{"image": np.zeros(1 << 20, np.uint8), "boxes": np.zeros((2, 4))}], ROOM)
    cache[0]
    boxes = cache[0]["boxes"]
    while isinstance(boxes.base, np.ndarray):
        boxes = boxes.base
    assert boxes.nbytes == 64


def test_a_sample_of_thousands_of_arrays_is_kept():
    sample = [np.full(3, index) for index in range(2500)]
    cache = DecodedCache([sample], ROOM)
    cache[0]
    assert cache.cached_count == 1
    np.testing.assert_array_equal(cache[0], sample)


# -- room


def test_when_full_the_rest_is_read_from_the_dataset_each_time():
    dataset = Counted(20, (100, 1000))
    cache = DecodedCache(dataset, 1 << 20)
    for _ in range(3):
        assert [int(sample["image"][9, 9]) for sample in epoch(cache)] == list(range(20))
    kept = cache.cached_count
    assert 9 <= kept <= 10
    assert len(dataset.reads) == kept + 3 * (20 - kept)
    assert cache.cached_nbytes <= 1 << 20
    assert "full" in repr(cache)
    assert round(cache.hit_rate, 5) == round(2 * kept / 60, 5)


def test_one_sample_that_is_too_large_leaves_the_room_to_others():
    cache = DecodedCache([np.zeros(2 << 20, np.uint8), np.zeros(10, np.uint8)], 1 << 20)
    assert cache[0].nbytes == 2 << 20
    cache[1]
    assert cache.cached_count == 1


def _no_memory(monkeypatch):
    monkeypatch.setattr(records, "available_nbytes", lambda: 60 << 20)


def _disk_full(monkeypatch):
    def pwritev(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", pwritev)


def _disk_full_halfway(monkeypatch):
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwritev(fd, parts[:-2], offset))


@pytest.mark.parametrize("happens", [_no_memory, _disk_full, _disk_full_halfway])
def test_a_machine_that_is_full_fails_no_read(monkeypatch, happens):
    dataset = Counted()
    cache = DecodedCache(dataset, ROOM)
    with monkeypatch.context() as patch:
        happens(patch)
        for _ in range(2):
            assert [sample["label"] for sample in epoch(cache)] == list(range(8))
    assert len(dataset.reads) == 16
    assert cache.cached_count == 0
    assert ("out of space" in repr(cache)) == (happens is not _disk_full_halfway)


def test_memory_is_taken_as_it_fills_and_never_more_than_nbytes():
    cache = DecodedCache(Counted(40, (1 << 16,)), 1 << 21)
    taken = os.fstat(cache._records._fd).st_blocks * 512
    # The table is there from the start: a word that could not be stored would be a bus error.
    assert cache._records._first <= taken <= 1 << 16
    epoch(cache)
    assert taken < os.fstat(cache._records._fd).st_blocks * 512 <= 1 << 21


def test_memory_has_no_name_and_its_two_descriptors_are_gone_with_it():
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    cache = DecodedCache(Counted(), ROOM)
    sample = epoch(cache)[3]
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    with open("/proc/self/maps") as maps:
        assert not any("/dev/shm/" in line and "loaders" in line for line in maps)
    del cache
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert (sample["image"] == 3).all()


def test_too_little_room_for_the_table_is_refused():
    with pytest.raises(DatasetError, match=r"nbytes=100,000 is too small: the table of 1,000,000 samples takes 8,0"):
        DecodedCache(range(1_000_000), 100_000)


def test_an_empty_dataset_has_an_empty_cache():
    cache = DecodedCache([], ROOM)
    assert len(cache) == 0
    assert list(cache) == []
    assert np.isnan(cache.hit_rate)


def test_room_that_another_process_took_first_is_not_taken_twice(monkeypatch):
    cache = DecodedCache(Counted(), ROOM)
    lock = cache._records._lock

    def late(fd):
        cache._records._storage.store(TAIL_AT, ROOM - 64)
        return lock(fd)

    monkeypatch.setattr(cache._records, "_lock", late)
    cache[0]
    assert (cache.cached_count, cache.cached_nbytes) == (0, ROOM - 64)


# -- what it wraps


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), np.full((6, 8, 3), number, np.uint8))
    return tmp_path


def test_the_transform_is_applied_each_time_to_a_copy():
    def darken(sample):
        sample["image"] //= 2
        return sample

    dataset = Counted()
    cache = DecodedCache(dataset, ROOM, darken)
    for _ in range(3):
        assert [int(sample["image"][0, 0, 0]) for sample in epoch(cache)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(dataset.reads) == 8


def test_a_transform_in_front_of_the_cache_is_refused(folder):
    crop = A.Compose([A.RandomCrop(4, 4)])

    class Own(Counted):
        def __init__(self):
            super().__init__()
            self.augment = [crop]

    plain = ImageFolder(folder)
    for dataset in (
        ImageFolder(folder, len),
        Subset(ImageFolder(folder, len), [1, 2]),
        ImageFolder(folder, crop=RandomResizedCrop(4)),
        Own(),
        DecodedCache(plain, ROOM, len),
    ):
        with pytest.raises(DatasetError, match="Pass it to the cache instead"):
            DecodedCache(dataset, ROOM)
    DecodedCache(DecodedCache(plain, ROOM), ROOM, crop)


def test_what_is_decoded_of_each_photo_can_be_kept_if_nothing_is_drawn(folder):
    dataset = ImageFolder(folder, crop=Resize(4))
    cache = DecodedCache(dataset, ROOM)
    for _ in range(2):
        for sample, want in zip(epoch(cache), epoch(dataset), strict=True):
            np.testing.assert_equal(sample, want)


def test_attributes_and_names_of_the_dataset_are_those_of_the_cache(folder):
    cache = DecodedCache(ImageFolder(folder), ROOM)
    assert cache.classes == ["cat", "dog"]
    assert cache.class_to_idx == {"cat": 0, "dog": 1}
    assert cache.describe(-1) == str(folder / "dog" / "2.png")
    assert not hasattr(cache, "__getitems__")
    with pytest.raises(AttributeError, match="no_such"):
        cache.no_such  # noqa: B018


def test_what_reads_batches_of_the_dataset_is_not_read_past_the_cache():
    class AtOnce(Counted):
        def __getitems__(self, indices):
            raise AssertionError

        def read_into(self, index, out):
            raise AssertionError

    dataset = AtOnce()
    loader = DataLoader(DecodedCache(dataset, ROOM), 4)
    assert [len(batch["label"]) for batch in [*loader, *loader]] == [4] * 4
    assert len(dataset.reads) == 8


def test_an_error_names_the_file_and_is_raised_each_time(folder):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    cache = DecodedCache(ImageFolder(folder), ROOM)
    for _ in range(2):
        with pytest.raises(DecodeError, match=r'sample 1 \(".*cat/1.png"\)'):
            cache[1]
    assert cache.cached_count == 0


def test_a_sample_that_cannot_be_pickled_is_named():
    class Locks(Counted):
        def __getitem__(self, index):
            return {"lock": threading.Lock()}

    with pytest.raises(DatasetError, match=r'sample 2 \("counted/2"\) cannot be cached: .*lock'):
        DecodedCache(Locks(), ROOM)[2]


def test_the_repr_says_what_is_kept_and_what_it_was_worth():
    cache = DecodedCache(Counted(), ROOM)
    cache[0], cache[0]
    assert repr(cache) == "DecodedCache(Counted, 1 of 8 samples in 0.0 of 4.0 MiB, hit rate 50%)"


def test_memory_without_a_path_cannot_be_pickled_and_copies_share_it():
    dataset = Counted()
    cache = DecodedCache(dataset, ROOM)
    with pytest.raises(DatasetError, match="Give it a path="):
        pickle.dumps(cache)
    epoch(cache)
    for twin in (copy.copy(cache), copy.deepcopy(cache)):
        assert twin.dataset[0] is not None
        twin.dataset.reads.clear()
        assert [sample["label"] for sample in epoch(twin)] == list(range(8))
        assert twin.dataset.reads == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without_a_cache(workers, folder):
    plain = ImageFolder(folder)
    cache = DecodedCache(plain, ROOM)
    expected = list(DataLoader(plain, 4))
    for _ in range(2):
        for batch, want in zip(DataLoader(cache, 4, num_workers=workers), expected, strict=True):
            assert batch["label"].tolist() == want["label"].tolist()
            assert batch["image"].equal(want["image"])


# -- threads, descriptors


def test_two_that_read_the_same_sample_at_once_both_get_it():
    together = threading.Barrier(2, timeout=30)

    class Slow(Counted):
        def __getitem__(self, index):
            together.wait()
            return super().__getitem__(index)

    cache = DecodedCache(Slow(), ROOM)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache[5])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sample["label"] for sample in (*found, cache[5])] == [5] * 3
    assert cache.cached_count == 1


def test_a_descriptor_that_was_closed_and_taken_by_another_file_is_not_written_into(tmp_path):
    cache = DecodedCache(Counted(), ROOM)
    cache[0]
    kept = os.dup(cache._records._fd)
    with open(tmp_path / "precious", "w+b") as other:
        other.write(b"0" * 100_000)
        other.flush()
        os.dup2(other.fileno(), cache._records._fd)
        assert [sample["label"] for sample in epoch(cache)] == list(range(8))
        os.dup2(kept, cache._records._fd)
    os.close(kept)
    assert (tmp_path / "precious").read_bytes() == b"0" * 100_000
    assert cache.cached_count == 1


def test_a_lock_that_nobody_will_ever_release_stops_the_filling_and_nothing_else(monkeypatch):
    monkeypatch.setattr(records, "_PATIENCE_S", 0.01)
    cache = DecodedCache(Counted(), ROOM)
    cache[0]
    with cache._records._descriptor() as fd:
        assert cache._records._lock(fd)
        assert [sample["label"] for sample in epoch(cache)] == list(range(8))
    assert cache.cached_count == 1


def test_arrays_and_lists_of_files_can_be_kept_too(folder):
    arrays = ArrayDataset({"x": np.arange(6.0).reshape(3, 2), "name": np.array(["a", "b", "c"])})
    files = ImageFiles(sorted(folder.glob("*/*.png")), np.eye(6))
    for dataset in (arrays, files):
        cache = DecodedCache(dataset, ROOM)
        for _ in range(2):
            for sample, want in zip(epoch(cache), epoch(dataset), strict=True):
                np.testing.assert_equal(sample, want)
