import pickle

import cv2
import numpy as np
import pytest
from dataset_contract import DatasetContract

from loaders import ArrayDataset, DatasetError, DecodedCache, ImageFiles, ImageFolder


def write_photos(root, count=4):
    paths = []
    for number in range(count):
        path = root / ("cat" if number < count // 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((6, 8, 3), number, np.uint8))
        paths.append(path)
    return paths


class TestImageFolder(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        write_photos(tmp_path)
        return lambda transform: ImageFolder(tmp_path, transform)


class TestImageFiles(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        paths = write_photos(tmp_path)
        return lambda transform: ImageFiles(paths, [3, 1, 2, 0], transform)


class TestArrayDatasetInMemory(DatasetContract):
    @pytest.fixture
    def make(self):
        fields = {"image": np.arange(96, dtype=np.uint8).reshape(4, 2, 4, 3), "label": np.arange(4)}
        return lambda transform: ArrayDataset(fields, transform)


class TestArrayDatasetOnDisk(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        np.save(tmp_path / "image.npy", np.arange(96, dtype=np.uint8).reshape(4, 2, 4, 3))
        np.save(tmp_path / "label.npy", np.arange(4, dtype=np.int16))
        fields = {"image": tmp_path / "image.npy", "label": str(tmp_path / "label.npy")}
        return lambda transform: ArrayDataset(fields, transform)


class TestDecodedCacheInMemory(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        write_photos(tmp_path)
        return lambda transform: DecodedCache(ImageFolder(tmp_path), 1 << 20, transform)

    def test_a_pickled_copy_reads_the_same(self, dataset):
        # Its memory goes to workers as they are started, and nowhere else.
        with pytest.raises(DatasetError, match="Give it a path="):
            pickle.dumps(dataset)


class TestDecodedCacheInAFile(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        write_photos(tmp_path)
        return lambda transform: DecodedCache(ImageFolder(tmp_path), 1 << 20, transform, path=tmp_path / "cache")
