"""Albumentations 2.0.8 keeps its random state in the pipeline: a stock DataLoader copies it to each worker and epoch.

The first test shows the trap with a bare pipeline, without which the others would prove nothing.
"""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from loaders import Albumentations, ArrayDataset, numpy_collate, read_image
from loaders.system import opencv_threads

# Python 3.12 and later warn of a fork while threads run, and torch and OpenCV start some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

SAMPLES, WORKERS, EPOCHS = 32, 2, 2
METHODS = ("fork", "forkserver", "spawn")


class CropCorner:
    """What a bare pipeline does to a sample; picklable, as spawn needs it."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __call__(self, sample):
        return {**sample, "image": self.pipeline(image=sample["image"])["image"]}


def dataset(adapt):
    """One photo many times: samples differ only in what the pipeline draws."""
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return ArrayDataset(
        {"image": np.stack([photo] * SAMPLES)}, adapt(A.Compose([A.RandomCrop(8, 8), A.GaussNoise(p=1)]))
    )


def epochs(adapt, method, persistent=False, seed=0, workers=WORKERS):
    """What each sample of each epoch became: [epoch][sample] → bytes."""
    torch.manual_seed(seed)
    parallel = {"multiprocessing_context": method, "persistent_workers": persistent, "timeout": 60} if workers else {}
    loader = DataLoader(dataset(adapt), 4, num_workers=workers, collate_fn=numpy_collate, **parallel)
    return [[image.numpy().tobytes() for batch in loader for image in batch["image"]] for _ in range(EPOCHS)]


def test_a_bare_pipeline_repeats_itself_in_every_worker_and_every_epoch():
    first, second = epochs(CropCorner, "fork")
    assert first == second
    assert len(set(first)) == SAMPLES // WORKERS


@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
@pytest.mark.parametrize("method", METHODS)
def test_ours_never_repeats_and_gives_the_same_epochs_again_by_any_start_method(method, persistent):
    # A worker that is not forked imports Albumentations for seconds: two start, both at once or one in each epoch.
    workers = WORKERS if method == "fork" or persistent else 1
    found = epochs(Albumentations, method, persistent, workers=workers)
    assert len({sample for epoch in found for sample in epoch}) == SAMPLES * EPOCHS
    assert found == epochs(Albumentations, "fork", persistent, workers=workers)


@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
def test_another_seed_gives_other_epochs(persistent):
    assert epochs(Albumentations, "fork", persistent, seed=1) != epochs(Albumentations, "fork", persistent)


def test_ours_never_repeats_without_workers_either():
    first = epochs(Albumentations, None, workers=0)
    assert len({sample for epoch in first for sample in epoch}) == SAMPLES * EPOCHS
    assert epochs(Albumentations, None, workers=0) == first


class ReportsThreads:
    """Samples that report the number of OpenCV's threads after a function of ours, another for each, has run."""

    def __init__(self, *via):
        self.via = via

    def __len__(self):
        return len(self.via)

    def __getitem__(self, index):
        assert get_worker_info() is not None
        opencv_threads._quiet = False  # as in a worker whose first sample this is
        cv2.setNumThreads(3)
        image = np.zeros((8, 8, 3), np.uint8)
        if self.via[index] == "read_image":
            read_image(cv2.imencode(".png", image)[1].tobytes())
        elif self.via[index] == "Albumentations":
            Albumentations(A.NoOp())({"image": image})
        return cv2.getNumThreads()


def report(batch):
    numpy_collate(batch)
    return [*batch, cv2.getNumThreads()]


VIA = {"read_image": 1, "Albumentations": 1, "numpy_collate": 3}


@pytest.mark.parametrize("via", VIA)
def test_opencv_has_one_thread_in_forked_workers_and_the_main_process_keeps_its_own(via):
    # OpenCV's threads run here before the fork, so the worker inherits a thread pool without its threads.
    before = cv2.getNumThreads()
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (9, 9), 0)
    loader = DataLoader(
        ReportsThreads(via), 1, num_workers=1, multiprocessing_context="fork", collate_fn=report, timeout=60
    )
    assert list(loader) == [[VIA[via], 1]]
    assert cv2.getNumThreads() == before


def test_opencv_has_one_thread_in_spawned_workers():
    loader = DataLoader(
        ReportsThreads(*VIA), 1, num_workers=1, multiprocessing_context="spawn", collate_fn=report, timeout=60
    )
    assert list(loader) == [[threads, 1] for threads in VIA.values()]
