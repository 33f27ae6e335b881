"""Checks of a machine. Each inspects one thing, or is given its value, and returns one finding."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.doctor.finding import Finding
from loaders.errors import BufferMemoryError, DeviceError
from loaders.memory.arena import PAGE, Arena
from loaders.system.limits import affinity_cores, available_nbytes, quota_cores

_LITTLE_SHM_NBYTES = 1 << 30  # containers get 64 MiB by default
_LITTLE_MEMORY_NBYTES = 2 << 30
_FEW_DESCRIPTORS = 1024
_LEFT_DESCRIPTORS = 64
_OPENCVS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def check_batch_memory() -> Finding:
    """Whether batches can be placed in memory shared with workers."""
    check = "shared memory of batches"
    try:
        arena = Arena(1 << 24, shared=True)
    except (OSError, AttributeError, BufferMemoryError) as error:
        return Finding(
            check,
            "problem",
            f"none can be made: {error}",
            'Allow memfd_create (seccomp profiles of containers may not), or use worker_method="thread".',
        )
    try:
        arena.reserve(PAGE)
    except BufferMemoryError as error:
        return Finding(
            check, "problem", f"not one page can be had: {error}", "Free memory, or raise the cgroup's limit."
        )
    finally:
        arena.close()
    kind = "memfd, without a name or a limit of its own" if hasattr(os, "memfd_create") else "shared_memory, unlinked"
    return Finding(check, "fine", f"works ({kind})")


def check_shm_folder(free_nbytes: int | None = None) -> Finding:
    """How much space is free in /dev/shm, which torch's own loader needs."""
    check = "/dev/shm"
    if free_nbytes is None:
        try:
            status = os.statvfs("/dev/shm")
        except (OSError, AttributeError):
            return Finding(check, "fine", "there is none; loaders needs none")
        free_nbytes = status.f_bavail * status.f_frsize
    if free_nbytes < _LITTLE_SHM_NBYTES:
        return Finding(
            check,
            "warning",
            f"{_size(free_nbytes)} are free. loaders does not use it; torch's own DataLoader and tensors sent through "
            "queues do, and die of a bus error when it is full",
            "Give a container more: docker run --shm-size=8g, or an emptyDir of medium Memory in Kubernetes.",
        )
    return Finding(check, "fine", f"{_size(free_nbytes)} free")


def check_memory(available: int | None = None) -> Finding:
    """How much memory this process may still take."""
    available = available_nbytes() if available is None else available
    told = f"{_size(available)} available to this process (machine and cgroup)"
    if available < _LITTLE_MEMORY_NBYTES:
        return Finding(
            "memory",
            "warning",
            told,
            "Batches may take half of it: use a smaller batch_size, prefetch_factor or max_buffer_bytes.",
        )
    return Finding("memory", "fine", told)


def check_descriptors(soft: int | None = None, open_now: int | None = None) -> Finding:
    """How many files this process may have open."""
    check = "open files"
    if soft is None:
        try:
            import resource
        except ImportError:
            return Finding(check, "fine", "this platform has no limit of its own")
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft == resource.RLIM_INFINITY:
            return Finding(check, "fine", "no limit")
    if open_now is None:
        try:
            open_now = len(os.listdir("/proc/self/fd"))
        except OSError:
            open_now = 0
    told = f"{open_now} of {soft:,} descriptors in use"
    if soft - open_now < _LEFT_DESCRIPTORS:
        return Finding(check, "problem", told, "Raise the limit before starting Python: ulimit -n 65536.")
    if soft < _FEW_DESCRIPTORS:
        return Finding(
            check,
            "warning",
            f"{told}. loaders needs three for each worker; torch's own DataLoader needs one for each tensor under way",
            "Raise the limit before starting Python: ulimit -n 65536.",
        )
    return Finding(check, "fine", told)


def check_cores(affinity: int | None = None, quota: float | None = None, machine: int | None = None) -> Finding:
    """How many cores workers can use. If the affinity is given, the quota is taken as given, too."""
    if affinity is None:
        affinity, quota = affinity_cores(), quota_cores()
    machine = machine or os.cpu_count() or affinity
    told = f"{affinity} of {machine} cores" + ("" if quota is None else f", a cgroup quota of {quota:.1f}")
    if quota is not None and quota < affinity:
        return Finding(
            "cores",
            "warning",
            f"{told}: programs that count cores start more threads and workers than may run, and all are throttled",
            f"num_workers={max(1, int(quota))} at most, and OMP_NUM_THREADS={max(1, int(quota))}; or raise the quota.",
        )
    if affinity < machine:
        return Finding(
            "cores",
            "warning",
            f"{told}: this process is bound to a part of the machine",
            f"Count on {affinity}, or start it without taskset, --cpuset-cpus or the scheduler's --cpus-per-task.",
        )
    return Finding("cores", "fine", told)


def check_start_method(method: str | None = None) -> Finding:
    """How worker processes are started."""
    method = (
        method or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_context().get_start_method()
    )
    if method == "fork":
        return Finding("start method", "fine", "fork: workers share what the dataset has loaded")
    return Finding(
        "start method",
        "warning",
        f"{method}: workers import the program anew and get the dataset by pickle",
        'Keep the program\'s start below `if __name__ == "__main__":`. '
        'Where no other threads hold locks, multiprocessing_context="fork" starts at once.',
    )


def check_opencv(installed: Sequence[str] | None = None) -> Finding:
    """Which OpenCV is installed: its packages overwrite each other."""
    if installed is None:
        installed = [name for name in _OPENCVS if _is_installed(name)]
    if len(installed) > 1:
        return Finding(
            "OpenCV",
            "problem",
            f"{' and '.join(installed)} are installed into the same folder and break each other",
            f"pip uninstall -y {' '.join(installed)}; pip install {installed[-1]}",
        )
    try:
        import cv2
    except ImportError as error:
        return Finding("OpenCV", "problem", f"cannot be imported: {error}", "pip install opencv-python-headless")
    return Finding("OpenCV", "fine", f"{cv2.__version__}")


def check_opencv_threads(threads: int | None = None, cores: int | None = None) -> Finding:
    """Whether OpenCV uses threads of its own here."""
    if threads is None:
        import cv2

        threads = int(cv2.getNumThreads())
    cores = cores or affinity_cores()
    if threads > cores:
        return Finding(
            "OpenCV's threads",
            "warning",
            f"{threads} for {cores} cores. Workers of loaders run with one each; what decodes in your own process or "
            "in threads fights itself",
            f"Set OPENCV_FOR_THREADS_NUM={cores}, or call cv2.setNumThreads({cores}).",
        )
    return Finding("OpenCV's threads", "fine", f"{threads} in this process, one in each worker")


def check_decoders(has_nvimagecodec: bool | None = None, agrees: bool | None = None) -> Finding:
    """What decodes regions of JPEGs."""
    if has_nvimagecodec is None:
        from loaders.errors import MissingExtraError
        from loaders.images.decode import nvimagecodec

        try:
            nvimagecodec.require()
            has_nvimagecodec, agrees = True, nvimagecodec.agrees_with_opencv()
        except MissingExtraError:
            has_nvimagecodec = False
    if not has_nvimagecodec:
        return Finding(
            "decoders",
            "warning" if sys.platform == "linux" else "fine",
            "OpenCV alone: a crop (RandomResizedCrop) decodes rows that it does not need",
            "pip install 'loaders[nvimagecodec]' (no GPU is needed).",
        )
    if not agrees:
        return Finding(
            "decoders",
            "warning",
            "nvImageCodec is installed but gives other pixels than OpenCV here, so it is not used",
            "Install the versions that constraints.txt names.",
        )
    return Finding("decoders", "fine", "OpenCV, and nvImageCodec for regions of JPEGs")


def check_accelerator(has_driver: bool | None = None, seen: str | None = None, built_for: str | None = None) -> Finding:
    """Whether torch sees the accelerator that the machine has. If one value is given, all are taken as given."""
    if has_driver is None:
        import torch

        has_driver = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        seen = None if device is None else f"{device.type}, {torch.accelerator.device_count()} of them"
        built_for = torch.version.cuda or torch.version.hip
    if seen is not None:
        return Finding("accelerator", "fine", f"torch sees {seen}")
    if has_driver and built_for is None:
        return Finding(
            "accelerator",
            "problem",
            "there is a GPU here, and this torch was built for the CPU alone",
            "Install the build that pytorch.org names under Get started.",
        )
    if has_driver:
        return Finding(
            "accelerator",
            "problem",
            f"there is a GPU here, and torch, built for {built_for}, cannot use it",
            "Compare the driver with what this build needs (nvidia-smi); in a container: docker run --gpus all.",
        )
    return Finding("accelerator", "fine", "none: the model runs on the CPU")


def check_pinning(accelerator: Any = None, locked_nbytes: int | None = None) -> Finding:
    """Whether memory can be page-locked for the accelerator, and how much this process may lock."""
    check = "page-locked memory"
    if locked_nbytes is None:
        locked_nbytes = _locked_limit()
    limit = "no limit" if locked_nbytes is None or locked_nbytes < 0 else f"a limit of {_size(locked_nbytes)}"
    if accelerator is None:
        from loaders.memory.accelerator import open_accelerator

        accelerator = open_accelerator()
    if accelerator is None:
        return Finding(check, "fine", f"torch sees no accelerator that would need it (ulimit -l: {limit})")
    if not accelerator.can_page_lock:
        told = f"torch has nothing to lock the memory of batches with for {accelerator.device.type}"
        told += ": each is copied into pinned memory of torch's first"
        return Finding(check, "fine", f"{told} (ulimit -l: {limit})")
    import ctypes

    arena = Arena(1 << 24, shared=True)
    try:
        offset = arena.reserve(1 << 20)
        address = ctypes.addressof(ctypes.c_char.from_buffer(arena.buffer, offset))
        accelerator.page_lock(address, 1 << 20)
        accelerator.page_unlock(address)
    except (DeviceError, BufferMemoryError) as error:
        return Finding(
            check,
            "problem",
            f"{error} (ulimit -l: {limit})",
            "Raise the limit: ulimit -l unlimited, docker run --ulimit memlock=-1. Without it pin_memory=True copies.",
        )
    finally:
        arena.close()
    return Finding(check, "fine", f"works (ulimit -l: {limit}; CUDA does not count against it)")


def _locked_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"


MACHINE_CHECKS = (
    check_batch_memory,
    check_shm_folder,
    check_memory,
    check_descriptors,
    check_cores,
    check_start_method,
    check_opencv,
    check_opencv_threads,
    check_decoders,
    check_accelerator,
    check_pinning,
)
