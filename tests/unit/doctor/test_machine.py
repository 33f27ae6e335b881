"""Each check of a machine finds the fault that is planted, and says what to do."""

import pytest
import torch

from loaders.doctor import machine
from loaders.doctor.finding import Finding, exit_status
from loaders.errors import BufferMemoryError, DeviceError
from loaders.memory import arena


@pytest.mark.parametrize("check", machine.MACHINE_CHECKS)
def test_a_check_of_this_machine_gives_a_finding_with_a_remedy_if_one_is_needed(check):
    found = check()
    assert isinstance(found, Finding)
    assert found.severity == "fine" or found.remedy


class Locks:
    """An accelerator that page-locks, refuses to, or has nothing to do it with."""

    device = torch.device("xpu")

    def __init__(self, refuses=False, can_page_lock=True):
        self.refuses = refuses
        self.can_page_lock = can_page_lock
        self.locked = []

    def page_lock(self, address, nbytes):
        if self.refuses:
            raise DeviceError("cudaHostRegister says: out of memory.")
        self.locked.append(address)

    def page_unlock(self, address):
        self.locked.remove(address)


@pytest.mark.parametrize(
    ("found", "severity", "what", "remedy"),
    [
        (lambda: machine.check_shm_folder(64 << 20), "warning", "67 MB are free", "--shm-size"),
        (lambda: machine.check_shm_folder(8 << 30), "fine", "8.6 GB free", ""),
        (lambda: machine.check_memory(100 << 20), "warning", "105 MB available", "batch_size"),
        (lambda: machine.check_memory(64 << 30), "fine", "68.7 GB", ""),
        (lambda: machine.check_descriptors(256, 10), "warning", "10 of 256", "ulimit -n"),
        (lambda: machine.check_descriptors(256, 250), "problem", "250 of 256", "ulimit -n"),
        (lambda: machine.check_descriptors(65536, 10), "fine", "10 of 65,536", ""),
        (lambda: machine.check_cores(8, 2.5, 16), "warning", "a cgroup quota of 2.5", "num_workers=2"),
        (lambda: machine.check_cores(8, 0.5, 8), "warning", "quota of 0.5", "num_workers=1"),
        (lambda: machine.check_cores(8, None, 16), "warning", "8 of 16 cores", "taskset"),
        (lambda: machine.check_cores(16, None, 16), "fine", "16 of 16 cores", ""),
        (lambda: machine.check_start_method("spawn"), "warning", "by pickle", "__main__"),
        (lambda: machine.check_start_method("fork"), "fine", "fork", ""),
        (
            lambda: machine.check_opencv(["opencv-python", "opencv-python-headless"]),
            "problem",
            "break each other",
            "pip uninstall -y opencv-python opencv-python-headless; pip install opencv-python-headless",
        ),
        (lambda: machine.check_opencv_threads(64, 4), "warning", "64 for 4 cores", "cv2.setNumThreads(4)"),
        (lambda: machine.check_opencv_threads(4, 4), "fine", "4 in this process", ""),
        (lambda: machine.check_decoders(False), "warning", "OpenCV alone", "loaders[nvimagecodec]"),
        (lambda: machine.check_decoders(True, False), "warning", "other pixels", "constraints.txt"),
        (lambda: machine.check_decoders(True, True), "fine", "nvImageCodec", ""),
        (lambda: machine.check_accelerator(True, None, None), "problem", "built for the CPU alone", "pytorch.org"),
        (lambda: machine.check_accelerator(True, None, "12.8"), "problem", "cannot use it", "nvidia-smi"),
        (lambda: machine.check_accelerator(True, "cuda, 2 of them", "12.8"), "fine", "torch sees cuda, 2 of", ""),
        (lambda: machine.check_accelerator(False, None, None), "fine", "none", ""),
        (lambda: machine.check_pinning(Locks(refuses=True), 65536), "problem", "ulimit -l: a limit of 0 MB", "memlock"),
        (lambda: machine.check_pinning(Locks(), -1), "fine", "no limit", ""),
        (lambda: machine.check_pinning(Locks(can_page_lock=False), -1), "fine", "for xpu: each is copied", ""),
    ],
)
def test_a_planted_fault_is_found_with_its_remedy(found, severity, what, remedy):
    finding = found()
    assert finding.severity == severity
    assert what in finding.what
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (severity != "fine")


def test_what_was_locked_on_trial_is_unlocked():
    accelerator = Locks()
    machine.check_pinning(accelerator, -1)
    assert accelerator.locked == []


def test_memory_that_cannot_be_shared_is_a_problem(monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(arena, "_anonymous_descriptor", refused)
    found = machine.check_batch_memory()
    assert (found.severity, "Operation not permitted" in found.what) == ("problem", True)
    assert "memfd_create" in found.remedy


def test_memory_that_is_all_taken_is_a_problem(monkeypatch):
    def full(self, nbytes):
        raise BufferMemoryError("nothing is left.")

    monkeypatch.setattr(arena.Arena, "reserve", full)
    assert machine.check_batch_memory().what == "not one page can be had: nothing is left."


# -- exit status


@pytest.mark.parametrize(("severities", "status"), [((), 0), (("fine", "warning"), 0), (("warning", "problem"), 1)])
def test_only_problems_change_the_exit_status(severities, status):
    assert exit_status(Finding("a", severity, "b", "c") for severity in severities) == status
