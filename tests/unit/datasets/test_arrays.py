import pickle

import numpy as np
import pytest

from loaders import ArrayDataset, DatasetError


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.arange(5 * 1000, dtype=np.uint16).reshape(5, 10, 100))
    return path


def test_rows_of_all_fields_are_aligned_and_keep_their_dtype(images):
    dataset = ArrayDataset({"image": images, "label": np.arange(5, dtype=np.int16), "name": np.array(list("abcde"))})
    sample = dataset[3]
    assert list(sample) == ["image", "label", "name"]
    assert sample["image"].dtype == np.uint16
    assert sample["image"][0, 0] == 3000
    assert (sample["label"], sample["label"].dtype) == (3, np.int16)
    assert sample["name"] == "d"
    assert repr(dataset) == "ArrayDataset(5 samples, image: uint16 (10, 100), label: int16 (), name: <U1 ())"


def test_rows_are_plain_ndarrays_that_share_memory_with_the_field(images):
    array = np.zeros((3, 4))
    assert np.shares_memory(ArrayDataset({"x": array})[1]["x"], array)
    row = ArrayDataset({"image": images})[1]["image"]
    assert type(row) is np.ndarray
    assert row.base is not None


@pytest.mark.parametrize("on_disk", [True, False])
def test_writing_into_a_row_is_refused_and_the_array_given_stays_writable(images, on_disk):
    array = np.load(images)
    row = ArrayDataset({"image": images if on_disk else array})[0]["image"]
    with pytest.raises(ValueError, match="read-only"):
        row[0, 0] = 1
    assert array.flags.writeable


def test_a_row_outlives_its_dataset(images):
    row = ArrayDataset({"image": images})[4]["image"]
    assert row[0, 0] == 4000


def test_a_file_is_pickled_as_its_path_and_opened_again(images):
    pickled = pickle.dumps(ArrayDataset({"image": images}))
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[2]["image"][0, 0] == 2000


def test_fields_of_different_length_are_refused_with_their_lengths(images):
    with pytest.raises(DatasetError, match=r"'image' has 5, 'label' has 4"):
        ArrayDataset({"image": images, "label": np.arange(4)})


def test_no_fields_are_refused():
    with pytest.raises(DatasetError, match="there are none"):
        ArrayDataset({})


def test_a_single_value_is_no_field():
    with pytest.raises(DatasetError, match="field 'x' is a single value"):
        ArrayDataset({"x": np.float32(1)})


def test_files_that_hold_no_single_array_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    with pytest.raises(DatasetError, match=r"'x'.*a.npz' is an archive"):
        ArrayDataset({"x": tmp_path / "a.npz"})
    np.save(tmp_path / "o.npy", np.array([{}, {}], object))
    (tmp_path / "t.npy").write_text("text")
    (tmp_path / "e.npy").write_bytes(b"")
    for name in ("o.npy", "t.npy", "e.npy"):
        with pytest.raises(DatasetError, match=rf"field 'x': .*{name}' cannot be mapped"):
            ArrayDataset({"x": tmp_path / name})


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npy"):
        ArrayDataset({"x": tmp_path / "nowhere.npy"})


def test_lists_and_empty_arrays_are_arrays(tmp_path):
    assert ArrayDataset({"x": [1, 2]})[1]["x"] == 2
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    assert len(ArrayDataset({"x": tmp_path / "none.npy"})) == 0


def test_constructor_arguments_are_kept(images):
    dataset = ArrayDataset({"image": images}, len)
    assert (dataset.fields, dataset.transform) == ({"image": images}, len)
