import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import threading
from multiprocessing import forkserver

import numpy as np
import pytest
import torch.utils.data
from support.numpy_datasets import LateTorch, Modules

from loaders import DataLoader, worker_info
from loaders.system.opencv_threads import quiet_opencv
from loaders.workers.info import WorkerInfo, set_worker_info


class Asks:
    """Sample i tells what torch and we say about the worker that reads it."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        ours, theirs = worker_info(), torch.utils.data.get_worker_info()
        return {
            "ours": "none" if ours is None else f"{ours.id} {ours.num_workers} {ours.seed} {ours.dataset is not None}",
            "theirs": "none"
            if theirs is None
            else f"{theirs.id} {theirs.num_workers} {theirs.seed} {theirs.dataset is not None}",
            "same dataset": ours is not None and theirs is not None and ours.dataset is theirs.dataset,
        }


def answers(**arguments):
    told = {"ours": set(), "theirs": set(), "same dataset": set()}
    for batch in DataLoader(Asks(), 3, **arguments):
        for name, values in batch.items():
            told[name].update(values if isinstance(values, list) else values.tolist())
    return told


def test_outside_of_a_loader_there_is_no_worker():
    assert worker_info() is None
    assert answers() == {"ours": {"none"}, "theirs": {"none"}, "same dataset": {False}}


def test_a_worker_process_is_known_to_torch_and_to_us():
    told = answers(num_workers=2)
    assert told["ours"] == told["theirs"]
    assert told["same dataset"] == {True}
    seeds = {answer.split()[0]: int(answer.split()[2]) for answer in told["ours"]}
    assert {answer.split()[1] for answer in told["ours"]} == {"2"}
    assert len({seed - int(number) for number, seed in seeds.items()}) == 1
    assert worker_info() is None


def test_a_worker_thread_is_known_to_us_alone():
    told = answers(num_workers=2, worker_method="thread")
    assert told["theirs"] == {"none"}
    assert {answer.split()[0] for answer in told["ours"]} <= {"0", "1"}
    assert {answer.split()[1] for answer in told["ours"]} == {"2"}
    assert worker_info() is None


def test_each_thread_has_its_own_answer():
    answers = {}
    barrier = threading.Barrier(2)

    def ask(number):
        set_worker_info(WorkerInfo(number, 2, 100 + number, None), process=False)
        barrier.wait(30)
        answers[number] = worker_info().id

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: 0, 1: 1}


def ask_as_worker_5(told):
    inherited = worker_info()
    set_worker_info(WorkerInfo(5, 9, 105, None), process=True)
    told.put((inherited.id, worker_info().id))


def test_a_process_that_a_worker_thread_has_forked_is_itself():
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def thread():
        set_worker_info(WorkerInfo(1, 2, 0, None), process=False)
        process = context.Process(target=ask_as_worker_5, args=(told,))
        process.start()
        process.join()

    forking = threading.Thread(target=thread)
    forking.start()
    forking.join()
    assert not told.empty()
    assert told.get() == (1, 5)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_process_never_imports_torch(method):
    forkserver._forkserver._stop()  # it may have imported what the workers of another test need
    [batch] = DataLoader(Modules(), 4, num_workers=1, multiprocessing_context=method)
    assert batch["heavy"] == [""] * 4
    assert batch["worker"].tolist() == [0] * 4
    assert os.getpid() not in batch["pid"].tolist()


def test_torch_knows_the_worker_also_if_the_dataset_imports_it_late():
    [batch] = DataLoader(LateTorch(), 2, num_workers=1, multiprocessing_context="spawn")
    assert batch["before"].tolist() == [False, False]
    assert batch["id"].tolist() == [0, 0]
    assert batch["num_workers"].tolist() == [1, 1]


def test_worker_threads_leave_the_number_of_opencv_threads_alone():
    cv2 = pytest.importorskip("cv2")

    class Quiet:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            quiet_opencv()
            return index

    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        list(DataLoader(Quiet(), 2, num_workers=2, worker_method="thread"))
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_worker_processes_have_one_opencv_thread_and_one_of_torch():
    cv2 = pytest.importorskip("cv2")

    class Counts:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return cv2.getNumThreads(), torch.get_num_threads()

    [(opencv, of_torch)] = DataLoader(Counts(), 2, num_workers=1)
    assert opencv.tolist() == [1, 1]
    assert of_torch.tolist() == [1, 1]


def test_a_finder_that_waits_for_torch_leaves_other_imports_alone():
    program = (
        "import sys; from loaders.workers.info import *; set_worker_info(WorkerInfo(3, 4, 5, 'mine'), process=True);"
        "import json, numpy; assert 'torch' not in sys.modules; hooks = len(sys.meta_path);"
        "from torch.utils.data import get_worker_info; info = get_worker_info();"
        "assert (info.id, info.num_workers, info.seed, info.dataset) == (3, 4, 5, 'mine');"
        "assert len(sys.meta_path) < hooks + 3 and not any('LateTorch' in repr(each) for each in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class Allocates:
    """Sample i takes 24 MB and lets them go; it tells how many pages had to be mapped for that."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.full(8 << 20, index, np.uint8) for _ in range(3)]
        del arrays
        return {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have ways of their own")
@pytest.mark.parametrize("theirs", [False, True])
def test_a_worker_process_takes_its_memory_from_the_machine_once_unless_the_user_tunes_it(theirs, monkeypatch):
    if theirs:
        monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    else:
        for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
            monkeypatch.delenv(name)
    loader = DataLoader(Allocates(), 1, num_workers=1, multiprocessing_context="spawn")
    faults = [int(batch["faults"][0]) for batch in loader][4:]
    assert (max(faults) < 500) is not theirs
