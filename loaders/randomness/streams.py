"""Randomness that belongs to the sample being read, not to the worker that reads it.

One function makes every key: (domain, seed, epoch, position) address a Philox stream (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). The generator is counter-based: two streams differ by key or by the upper half of
the counter, so they never overlap, and seeking to any position takes the same time.
"""

from __future__ import annotations

import enum
import random
import sys
import threading
from typing import Any

import numpy as np

_MASK = (1 << 64) - 1


class Domain(enum.IntEnum):
    """What a stream is for: equal positions in different domains are independent."""

    SAMPLE = 0
    TRANSFORM = 1
    COLLATE = 2
    SUBSTITUTE = 3
    ORDER = 4
    WEIGHTED = 5
    MIXTURE = 6
    PROCESS = 7
    COLLATE_PROCESS = 8
    DEVICE = 9
    GROUPED = 10


class KeyedGenerator:
    """A NumPy generator and a Python one that can be set to any key, reusing their memory."""

    def __init__(self) -> None:
        self._counter = np.zeros(4, np.uint64)
        self._key = np.zeros(2, np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        self.numpy = np.random.Generator(np.random.Philox(key=0))
        self.python = random.Random(0)

    def rekey(self, domain: Domain, seed: int, epoch: int, position: int, stream: int = 0) -> np.random.Generator:
        """Set `numpy` to the start of a stream and return it; `python` is unchanged."""
        self._key[0] = seed & _MASK
        self._key[1] = (epoch << 8 | domain) & _MASK
        self._counter[2] = position & _MASK
        self._counter[3] = stream
        # The bit generator is not stored separately: a copy of this object must set the state of its own.
        self.numpy.bit_generator.state = self._state
        return self.numpy


def keyed_word(domain: Domain, seed: int, epoch: int, position: int) -> int:
    """64 bits from the start of a stream, to seed other generators with."""
    return int(_current.spare.rekey(domain, seed, epoch, position).bit_generator.random_raw())


Key = tuple[Domain, int, int, int]


class _Current(threading.local):
    """The sample that this thread is reading."""

    key: Key | None = None
    drawing: Key | None = None  # the one that `generator` is set to

    def __init__(self) -> None:
        self.generator = KeyedGenerator()
        self.spare = KeyedGenerator()


_current = _Current()


def enter_sample(seed: int, epoch: int, position: int, domain: Domain = Domain.SAMPLE) -> None:
    """Key what this thread draws by the sample at `position` of `epoch`, or by a batch in a `domain` for batches."""
    _current.key = (domain, seed, epoch, position)


def leave_sample() -> None:
    """This thread is done with its sample."""
    _current.key = None


Reading = tuple[Key | None, Key | None, KeyedGenerator]


def set_aside() -> Reading:
    """Suspend the sample that this thread reads: a loader may be iterated inside another's `__getitem__`."""
    reading = _current.key, _current.drawing, _current.generator
    if _current.key is not None:
        _current.key, _current.generator = None, KeyedGenerator()
    return reading


def take_up(reading: Reading) -> None:
    """Resume the sample that `set_aside` returned."""
    _current.key, _current.drawing, _current.generator = reading


def sample_rng() -> np.random.Generator:
    """The random generator of the sample that is being read. Draw from it in `__getitem__` and transforms.

    In a `loaders.DataLoader` it is keyed by (seed, epoch, position in the epoch): the same sample draws the same
    numbers with any engine and any number of workers; a second call for it continues where the first one stopped.

    Outside of one the position is unknown: every call returns a new generator, keyed by the process's global one. If
    torch is loaded, that is torch's seed and 63 bits drawn from it (a stock DataLoader seeds it per worker and epoch,
    `torch.manual_seed` in the main process), else 63 bits drawn from NumPy's (`np.random.seed`).

    Returns:
        A Philox generator, valid until the sample is done.
    """
    key = _current.key
    if key is None:
        return np.random.Generator(np.random.Philox(key=_draw_process_key()))
    if _current.drawing is not key:
        _current.generator.rekey(*key)
        _current.drawing = key
    return _current.generator.numpy


def _draw_process_key() -> int:
    # Looked up, never imported: a NumPy-only process must not load torch, and does not set its seed.
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "default_generator"):
        # torch seeds its Mersenne twister with the low 32 bits of a seed, so two workers of a long run could draw the
        # same by chance; the whole seed in the key prevents that. The device is explicit because a default may be set.
        drawn = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        return int(torch.default_generator.initial_seed()) << 64 | drawn
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))
