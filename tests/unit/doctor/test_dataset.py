"""Each check of a dataset finds the fault that is planted, and says what to do."""

import random

import numpy as np
import pytest
import torch

from loaders import ArrayDataset, DataLoader, Field, sample_rng
from loaders.doctor import behaviour, examine_dataset, samples
from loaders.doctor.open_files import check_open_files
from loaders.doctor.samples import Read, read_samples


class Made:
    """A dataset of whatever a function gives."""

    def __init__(self, make, count=8):
        self.make = make
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.make(index)


def image(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


def reads(make, count=8):
    return read_samples(Made(make, count), range(count))


def raises(index):
    if index == 3:
        raise OSError("the file is gone")
    return {"image": image(2, 2)}


@pytest.mark.parametrize(
    ("check", "make", "severity", "what", "remedy"),
    [
        (samples.check_reading, raises, "problem", "1 of 8 samples raise; sample 3: OSError: the file is gone", "skip"),
        (
            samples.check_fields,
            lambda index: {"image": 1} if index else {"image": 1, "label": 2},
            "problem",
            "sample 0: image, label; sample 1: image",
            "same fields",
        ),
        (
            samples.check_shapes,
            lambda index: {"boxes": image(index, 4)},
            "problem",
            'field "boxes" has 8 shapes: (0, 4) in sample 0, (1, 4) in sample 1',
            'fields={"boxes": Field(pad=0)}',
        ),
        (
            samples.check_dtypes,
            lambda index: {"x": image(3, dtype=np.float32 if index else np.uint8)},
            "problem",
            'field "x" has several: uint8 in sample 0, float32 in sample 1',
            "Convert",
        ),
        (samples.check_dtypes, lambda index: {"x": np.zeros(3)}, "warning", "float64", "astype(np.float32)"),
        (samples.check_dtypes, lambda index: {"x": image(3, dtype=object)}, "warning", "Python objects", "arrays"),
        (
            samples.check_dtypes,
            lambda index: {"image": image(3, 8, 8, dtype=np.float32)},
            "warning",
            "four times the bytes",
            "Normalize",
        ),
        (samples.check_tensors, lambda index: (torch.zeros(3), index), "warning", 'field "0" is a tensor', "ToTensor"),
        (
            samples.check_contiguity,
            lambda index: {"image": image(64, 64, 3)[:, ::-1]},
            "warning",
            'field "image" of sample 0 has strides (192, -3, 1)',
            "cv2.flip",
        ),
    ],
)
def test_a_planted_fault_is_found_with_its_remedy(check, make, severity, what, remedy):
    found = check(reads(make))
    assert found.severity == severity
    assert what in found.what
    assert remedy in found.remedy


SOUND = [
    samples.check_reading,
    samples.check_fields,
    samples.check_shapes,
    samples.check_dtypes,
    samples.check_tensors,
    samples.check_contiguity,
    samples.check_slow_samples,
]


@pytest.mark.parametrize("check", SOUND)
def test_sound_samples_are_found_fine(check):
    found = check([Read(index, None, 0.001, {"image": image(8, 8, 3), "label": index}) for index in range(8)])
    assert (found.severity, found.remedy) == ("fine", "")


def test_shapes_that_are_declared_may_differ():
    found = samples.check_shapes(reads(lambda index: {"boxes": image(index, 4)}), declared=("boxes",))
    assert found.severity == "fine"


def test_batches_that_do_not_fit_into_memory_are_a_problem():
    found = reads(lambda index: {"image": image(1000, 1000)})
    assert samples.check_sizes(found, 64, available=1 << 40).severity == "fine"
    tight = samples.check_sizes(found, 64, available=300_000_000)
    assert (tight.severity, "64.0 MB a batch of 64" in tight.what) == ("problem", True)


def test_slow_samples_are_named_with_their_share():
    timed = [Read(index, f"{index}.jpg", 0.09 if index == 5 else 0.001, {"x": 1}) for index in range(11)]
    found = samples.check_slow_samples(timed)
    assert found.severity == "warning"
    assert '1 of 10 take 91% of the time: sample 5 ("5.jpg") 90 ms' in found.what


def test_a_first_sample_that_is_slow_is_forgiven():
    timed = [Read(index, None, 0.001 if index else 0.5, {"x": 1}) for index in range(8)]
    assert samples.check_slow_samples(timed).severity == "fine"


# -- randomness


class OwnGenerator(Made):
    """Draws from a generator that is part of it: each worker has a copy, and all draw the same."""

    def __init__(self):
        super().__init__(None)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return {"x": self.generator.random(3)}


def keyed(index):
    return {"x": sample_rng().random(3)}


def of_the_process(index):
    return {"x": np.array([random.random(), np.random.rand()])}


def constant(index):
    return {"x": np.full(3, float(index))}


def test_a_generator_of_its_own_repeats_in_workers_and_is_not_deterministic():
    assert behaviour.check_determinism(OwnGenerator(), [0, 1]).severity == "problem"
    found = behaviour.check_repeated_augmentation(OwnGenerator(), 0)
    assert (found.severity, "two workers draw the same" in found.what) == ("problem", True)
    assert "sample_rng" in found.remedy


@pytest.mark.parametrize("make", [keyed, of_the_process])
def test_what_is_keyed_by_the_sample_is_deterministic_and_repeats_nowhere(make):
    assert "other keys others" in behaviour.check_determinism(Made(make), [0, 1]).what
    found = behaviour.check_repeated_augmentation(Made(make), 0)
    assert (found.severity, found.what) == ("fine", "two workers draw differently")


class Pipeline:
    """Augments as albumentations does: from a generator of its own, which can be set."""

    def __init__(self):
        self.set_random_state(np.random.default_rng(0), random.Random(0))

    def set_random_state(self, generator, python):
        self.generator = generator

    def __call__(self, sample):
        return {"x": sample["x"] + self.generator.random()}


@pytest.mark.parametrize(
    ("loader", "severity"), [(DataLoader, "fine"), (torch.utils.data.DataLoader, "problem"), (None, "fine")]
)
def test_a_pipeline_of_albumentations_repeats_in_torchs_own_loader_alone(loader, severity):
    dataset = ArrayDataset({"x": np.zeros((8, 3))}, Pipeline())
    target = dataset if loader is None else loader(dataset, num_workers=2)
    (found,) = [
        each for each in examine_dataset(target, count=4, spawn=False) if each.check == "augmentation in workers"
    ]
    assert found.severity == severity


def test_without_randomness_there_is_nothing_to_repeat():
    assert behaviour.check_repeated_augmentation(Made(constant), 0).what == "nothing is drawn"
    assert behaviour.check_determinism(Made(constant), [0]).what == "equal keys give equal samples"


def test_a_sample_that_changes_what_it_reads_from_is_not_deterministic():
    kept = np.zeros(3)

    def brighter(index):
        kept[:] += 1
        return {"x": kept.copy()}

    assert behaviour.check_determinism(Made(brighter), [0]).severity == "problem"


# -- workers


def test_a_dataset_that_cannot_be_pickled_is_a_problem_where_workers_are_spawned():
    found = behaviour.check_pickling(Made(lambda index: index), "spawn")
    assert (found.severity, "cannot be pickled" in found.what) == ("problem", True)
    assert behaviour.check_pickling(Made(lambda index: index), "fork").severity == "warning"
    assert behaviour.check_pickling(Made(constant), "spawn").severity == "fine"


def test_a_dataset_that_is_large_when_pickled_is_told(monkeypatch):
    monkeypatch.setattr(behaviour, "_LARGE_NBYTES", 1000)
    found = behaviour.check_pickling(ArrayDataset({"x": np.zeros((10, 1000))}), "spawn")
    assert (found.severity, "DecodedCache" in found.remedy) == ("warning", True)


def test_open_files_are_found_also_below_a_subset(tmp_path):
    dataset = Made(constant)
    (tmp_path / "file").write_bytes(b"0")
    with open(tmp_path / "file", "rb") as dataset.file:
        found = check_open_files(torch.utils.data.Subset(dataset, [0]))
    assert (found.severity, "attribute 'file' is an open BufferedReader" in found.what) == ("problem", True)
    assert check_open_files(Made(constant)).severity == "fine"


LEVEL = 0.0


class DependsOnTheProgram(Made):
    """Reads a variable that the program has set."""

    def __init__(self):
        super().__init__(None)

    def __getitem__(self, index):
        return {"x": np.full(3, LEVEL)}


def test_a_spawned_worker_that_gives_other_samples_is_found(monkeypatch):
    assert behaviour.check_spawned_worker(DependsOnTheProgram(), 0).severity == "fine"
    monkeypatch.setitem(globals(), "LEVEL", 1.0)
    assert behaviour.check_spawned_worker(DependsOnTheProgram(), 0).severity == "problem"


# -- all of them


def test_a_loader_is_examined_with_its_own_fields_and_batch_size():
    loader = DataLoader(Made(lambda index: {"boxes": image(index, 4)}), batch_size=3, fields={"boxes": Field(pad=0)})
    found = {finding.check: finding for finding in examine_dataset(loader, spawn=False)}
    assert found["shapes"].severity == "fine"
    assert "a batch of 3" in found["sizes"].what


def test_a_dataset_of_which_nothing_can_be_read_is_told_so_and_no_more():
    def broken(index):
        raise OSError("gone")

    assert [finding.check for finding in examine_dataset(Made(broken))] == ["dataset", "reading"]


def test_an_empty_dataset_is_a_problem():
    (found,) = examine_dataset(Made(constant, count=0))
    assert (found.severity, found.what) == ("problem", "the Made is empty")


def test_a_stream_is_not_looked_at_and_it_says_so():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    (found,) = examine_dataset(DataLoader(Stream()))
    assert (found.severity, "a Stream has no items by number" in found.what) == ("warning", True)


def test_samples_that_make_no_batch_are_a_problem():
    found = {each.check: each for each in examine_dataset([{"label": None, "n": 1}] * 8, spawn=False)}
    assert found["batches"].severity == "problem"
    assert "NoneType" in found["batches"].what
    collated = DataLoader([{"label": None}] * 8, 4, collate_fn=len)
    found = {each.check: each for each in examine_dataset(collated, spawn=False)}
    assert found["batches"].severity == "fine"


def test_attributes_of_a_dataset_are_not_taken_for_arguments_of_a_loader():
    dataset = ArrayDataset({"image": image(8, 4, 4)})  # its `fields` are arrays
    dataset.batch_size, dataset.collate_fn = "many", None
    found = examine_dataset(dataset, spawn=False)
    assert [(each.check, each.what) for each in found if each.severity == "problem"] == []
