"""Datasets without torch, importable in spawned workers, and a gate that makes chosen samples wait."""

import mmap
import os
import select
import struct
import sys

import numpy as np

_RECORD = struct.Struct("<q")
PATIENCE_S = 20  # a test that waits this long has found a fault


class Gate:
    """Samples report that they are read, and those held wait until `open` lets one through.

    Works between threads and between forked processes: two pipes and a page of shared memory, nothing else.
    """

    def __init__(self):
        self._held = mmap.mmap(-1, mmap.PAGESIZE)
        self._wait, self._open = os.pipe()
        self._told, self._tell = os.pipe()

    def hold(self, *indices):
        """From now on these samples wait, and no others."""
        self._held[:] = bytes(index in indices for index in range(len(self._held)))

    def pass_by(self, index):
        os.write(self._tell, _RECORD.pack(index))
        if self._held[index]:
            os.read(self._wait, 1)

    def open(self, times=1):
        os.write(self._open, b"." * times)

    def entered(self, count):
        """The next `count` samples that were begun, in order."""
        begun = []
        while len(begun) < count:
            assert self._is_told(PATIENCE_S), f"of {count} samples only these were begun: {begun}"
            begun.append(_RECORD.unpack(os.read(self._told, _RECORD.size))[0])
        return begun

    def is_quiet(self):
        """Whether `entered` has returned every sample that was begun."""
        return not self._is_told(0)

    def _is_told(self, timeout_s):
        return bool(select.select([self._told], [], [], timeout_s)[0])

    def close(self):
        for fd in (self._wait, self._open, self._told, self._tell):
            os.close(fd)


class Numbers:
    """Sample i is {"x": uint8 (2, 3) full of i, "label": i}; those in `fail` raise, those held by `gate` wait."""

    def __init__(self, length=64, gate=None, fail=()):
        self.length = length
        self.gate = gate
        self.fail = fail

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.gate is not None:
            self.gate.pass_by(index)
        if index in self.fail:
            raise LookupError(f"no number {index}")
        return {"x": np.full((2, 3), index % 256, np.uint8), "label": index}

    def describe(self, index):
        return f"number/{index}"


class Draws:
    """Sample i holds two draws of `sample_rng` and two of a keyed transform."""

    def __init__(self, length=64):
        self.length = length
        self.transform = Noise()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        from loaders import sample_rng

        draws = [sample_rng().random(), sample_rng().random(), *self.transform()]
        return {"index": index, "draws": np.array(draws)}


class Noise:
    """A stateful transform, keyed as an albumentations Compose is."""

    def __init__(self):
        self.generator = np.random.default_rng(0)
        self.python = None

    def set_random_state(self, generator, python):
        self.generator, self.python = generator, python

    def __call__(self):
        return self.generator.random(), self.python.random()


class Modules:
    """Each sample lists the heavy packages that its process has imported, and names the worker and the process."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        from loaders import worker_info

        heavy = [name for name in ("torch", "albumentations", "cv2") if name in sys.modules]
        info = worker_info()
        return {"heavy": ",".join(heavy), "worker": -1 if info is None else info.id, "pid": os.getpid()}


class LateTorch:
    """Imports torch when its first sample is read, and asks it which worker this is."""

    before = None

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.before is None:  # a sample may be read again
            self.before = "torch" in sys.modules
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        return {"before": self.before, "id": info.id, "num_workers": info.num_workers, "seed": info.seed}


class Counted:
    """Arrays of `shape` filled with their index; `reads` lists the indices that were read."""

    classes = ("cat", "dog")

    def __init__(self, length=8, shape=(10, 12, 3)):
        self.length = length
        self.shape = shape
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads.append(index)
        return {"image": np.full(self.shape, index, np.uint8), "label": index}

    def describe(self, index):
        return f"counted/{index}"
