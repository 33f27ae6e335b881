"""What every dataset of the package promises. Its tests inherit the class and define how it is made."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from loaders import Dataset, numpy_collate
from loaders.nested import leaves


def double_label(sample):
    return {**sample, "label": sample["label"] * 2}


def index_error(sample):
    raise IndexError("inside the transform")


def equal(one, other):
    return [path for path, _ in leaves(one)] == [path for path, _ in leaves(other)] and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(one), leaves(other), strict=True)
    )


class DatasetContract:
    """Subclasses define a fixture `make`: transform → a dataset of at least 3 samples with an int-like "label"."""

    @pytest.fixture
    def dataset(self, make):
        return make(None)

    def test_it_is_a_dataset(self, dataset):
        assert isinstance(dataset, Dataset)
        assert len(dataset) >= 3

    def test_samples_hold_arrays_scalars_and_strings_but_no_tensors(self, dataset):
        for _, leaf in leaves(dataset[0]):
            assert isinstance(leaf, (np.ndarray, np.generic, int, float, str))
            assert not isinstance(leaf, torch.Tensor)

    def test_negative_indices_count_from_the_end(self, dataset):
        assert equal(dataset[-1], dataset[len(dataset) - 1])
        assert equal(dataset[-len(dataset)], dataset[0])

    def test_numpy_integers_are_indices(self, dataset):
        assert equal(dataset[np.int64(1)], dataset[1])
        assert equal(dataset[np.uint8(1)], dataset[1])

    @pytest.mark.parametrize("index", [1.0, "1", slice(0, 2), None])
    def test_other_types_are_refused(self, dataset, index):
        with pytest.raises(TypeError):
            dataset[index]

    def test_an_index_outside_names_itself_and_the_length(self, dataset):
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError, match=rf"index {index} .* {len(dataset)} samples"):
                dataset[index]

    def test_iteration_ends_after_the_last_sample(self, dataset):
        assert sum(1 for _ in dataset) == len(dataset)

    def test_an_index_error_in_the_transform_does_not_end_the_iteration_quietly(self, make):
        with pytest.raises(IndexError, match="inside the transform"):
            list(make(index_error))

    def test_the_transform_gets_the_sample_and_returns_the_sample(self, make, dataset):
        assert make(double_label)[1]["label"] == 2 * dataset[1]["label"]

    @pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="tracebacks have notes from Python 3.11 on")
    def test_an_error_in_the_transform_names_the_sample(self, make):
        with pytest.raises(IndexError) as caught:
            make(index_error)[-1]
        dataset = make(None)
        assert f"sample {len(dataset) - 1}" in caught.value.__notes__[0]
        assert dataset.describe(-1) in caught.value.__notes__[0]

    def test_a_pickled_copy_reads_the_same(self, dataset):
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset)
        assert all(equal(copy[index], dataset[index]) for index in range(len(dataset)))

    # torch warns once that read-only rows could be written to; numpy_collate copies them and does not warn.
    # Python 3.12 and later warn of a fork while threads run, and torch and OpenCV start some.
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
    @pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
    @pytest.mark.parametrize(
        ("method", "collate"), [("fork", default_collate), ("fork", numpy_collate), ("spawn", numpy_collate)]
    )
    def test_stock_loaders_read_it_in_worker_processes(self, make, method, collate):
        if method not in multiprocessing.get_all_start_methods():
            pytest.skip(f"this system cannot {method}")
        dataset = make(double_label)
        loader = DataLoader(dataset, 3, num_workers=1, multiprocessing_context=method, collate_fn=collate, timeout=60)
        batch = next(iter(loader))
        assert equal(batch, collate([dataset[0], dataset[1], dataset[2]]))

    def test_the_repr_is_one_short_line_with_the_length(self, dataset):
        assert str(len(dataset)) in repr(dataset)
        assert len(repr(dataset)) < 200
        assert "\n" not in repr(dataset)
