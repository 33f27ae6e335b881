import pickle

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from dataset_contract import DatasetContract
from support.annotated import box, coco, voc_object, write_coco, write_picture, write_voc, write_yolo
from support.tars import write_tar

from loaders import (
    ArrayDataset,
    ArrowDataset,
    CenterCrop,
    CocoDetection,
    DatasetError,
    DecodedCache,
    ImageFiles,
    ImageFolder,
    MaskFolder,
    TarFiles,
    VocDetection,
    YoloDetection,
    numpy_collate,
)


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


def write_shards(root):
    contents = [path.read_bytes() for path in write_photos(root / "photos")]
    for first in (0, 2):
        members = [(f"{n}.png", contents[n]) for n in (first, first + 1)]
        write_tar(root / f"{first}.tar", [*members, *((f"{n}.cls", b"%d" % (n + 3)) for n in (first, first + 1))])
    return str(root / "{0,2}.tar")


class TestTarFiles(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        shards, crop = write_shards(tmp_path), CenterCrop(4, resize=4)
        return lambda transform: TarFiles(shards, None, transform, crop=crop, index=tmp_path / "index")


def table(tmp_path):
    images = [path.read_bytes() for path in write_photos(tmp_path)]
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(16, dtype=np.float32)), 4)
    return pa.table({"image": images, "label": [3, 1, 2, 0], "box": boxes, "name": list("abcd")})


class TestArrowDatasetInMemory(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda transform: ArrowDataset(table(tmp_path), transform=transform, image="image")


class TestArrowDatasetOfParquet(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        pyarrow.parquet.write_table(table(tmp_path), tmp_path / "a.parquet", row_group_size=3)
        return lambda transform: ArrowDataset(tmp_path / "*.parquet", transform=transform, image="image")


class TestArrowDatasetOfAMappedFile(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        pyarrow.feather.write_feather(table(tmp_path), tmp_path / "a.arrow", compression="uncompressed")
        return lambda transform: ArrowDataset(str(tmp_path / "a.arrow"), transform=transform, image="image")


class TestArrowDatasetOfACompressedFile(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        pyarrow.feather.write_feather(table(tmp_path), tmp_path / "a.arrow", compression="lz4", chunksize=3)
        return lambda transform: ArrowDataset([tmp_path / "a.arrow"], ["name", "label"], transform)


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


class Labelled:
    """Adds what the contract looks at: a "label", the number of the first box or pixel; then another transform."""

    def __init__(self, then):
        self.then = then

    def __call__(self, sample):
        value = sample["labels"][0] if "labels" in sample else sample["mask"][0, 0]
        sample = {**sample, "label": int(value)}
        return sample if self.then is None else self.then(sample)


class TestCocoDetection(DatasetContract):
    @pytest.fixture
    def make(self, tmp_path):
        content = coco(*(box(image, segmentation=[[1, 2, 9, 2, 9, 9]], keypoints=[1, 2, 2]) for image in (10, 20, 30)))
        content["categories"][0]["keypoints"] = ["nose"]
        file = write_coco(tmp_path, content)
        options = {"masks": True, "keypoints": True, "extras": ("iscrowd", "ids", "areas")}
        return lambda transform: CocoDetection(tmp_path, file, Labelled(transform), **options)


class ForkedContract(DatasetContract):
    """The contract without starting another interpreter: what spawn sends is what `test_a_pickled_copy…` reads."""

    @pytest.mark.parametrize(("method", "collate"), [("fork", numpy_collate)])
    def test_stock_loaders_read_it_in_worker_processes(self, make, method, collate):
        super().test_stock_loaders_read_it_in_worker_processes(make, method, collate)


class TestYoloDetection(ForkedContract):
    @pytest.fixture
    def make(self, tmp_path):
        write_yolo(tmp_path, dict.fromkeys("abc", "1 0.1 0.1 0.5 0.1 0.5 0.6"))
        return lambda transform: YoloDetection(tmp_path, "train", Labelled(transform), masks=True)


class TestVocDetection(ForkedContract):
    @pytest.fixture
    def make(self, tmp_path):
        write_voc(tmp_path, {name: voc_object("dog") + voc_object("cat") for name in "abc"})
        return lambda transform: VocDetection(tmp_path, None, Labelled(transform), extras=("difficult", "truncated"))


class TestMaskFolder(ForkedContract):
    @pytest.fixture
    def make(self, tmp_path):
        for number, name in enumerate("abc"):
            write_picture(tmp_path / "images" / f"{name}.jpg", value=number)
            (tmp_path / "masks").mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / "masks" / f"{name}.png"), np.full((30, 40), number + 1, np.uint8))
        return lambda transform: MaskFolder(tmp_path / "images", tmp_path / "masks", Labelled(transform))
