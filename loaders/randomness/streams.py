"""Randomness that belongs to the sample being read, not to the worker that reads it.

One function makes every key: (domain, seed, epoch, position) address a Philox stream (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). The generator is counter-based: two streams differ by key or by the upper half of
the counter, so they never overlap, and going to a position costs the same wherever it is.
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


class KeyedGenerator:
    """A NumPy generator and a Python one that can be sent to any key, reusing their memory."""

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
        """Go to the start of a stream; `python` is left alone."""
        self._key[0] = seed & _MASK
        self._key[1] = (epoch << 8 | domain) & _MASK
        self._counter[2] = position & _MASK
        self._counter[3] = stream
        # Not kept apart: a copy or pickle of this object must go on steering the generator that it hands out.
        self.numpy.bit_generator.state = self._state
        return self.numpy


def keyed_word(domain: Domain, seed: int, epoch: int, position: int) -> int:
    """64 bits from the start of a stream, to seed other generators with."""
    return int(_current.spare.rekey(domain, seed, epoch, position).bit_generator.random_raw())


class _Current(threading.local):
    """The sample that this thread is reading."""

    key: tuple[Domain, int, int, int] | None = None
    entered = False

    def __init__(self) -> None:
        self.generator = KeyedGenerator()
        self.spare = KeyedGenerator()


_current = _Current()


def enter_sample(seed: int, epoch: int, position: int, domain: Domain = Domain.SAMPLE) -> None:
    """From here on this thread reads the sample at `position` of `epoch`, or does what `domain` says with a batch."""
    _current.key = (domain, seed, epoch, position)
    _current.entered = False


def leave_sample() -> None:
    """This thread reads no sample any more."""
    _current.key = None


Reading = tuple[Any, bool, KeyedGenerator]


def set_aside() -> Reading:
    """What this thread reads, to be taken up again: a loader may be iterated in the middle of another's sample."""
    reading = _current.key, _current.entered, _current.generator
    if _current.key is not None:
        _current.key, _current.generator = None, KeyedGenerator()
    return reading


def take_up(reading: Reading) -> None:
    """This thread reads again what was set aside."""
    _current.key, _current.entered, _current.generator = reading


def sample_rng() -> np.random.Generator:
    """The random generator of the sample that is being read. Draw from it in `__getitem__` and transforms.

    In a `loaders.DataLoader` it is keyed by (seed, epoch, position in the epoch): the same sample draws the same
    numbers whatever the engine and the number of workers; a second call for the same sample goes on where the first
    one stopped.

    Outside of one no position in an epoch is known. There every call gives a new generator keyed by the seed of the
    process's own global generator and 63 bits drawn from it: torch's where torch is loaded (a stock DataLoader seeds it
    per worker and epoch, `torch.manual_seed` in the main process), else NumPy's (`np.random.seed`).

    Returns:
        A Philox generator. Not to be kept after the sample is done.
    """
    if _current.key is None:
        return np.random.Generator(np.random.Philox(key=_draw_process_key()))
    if not _current.entered:
        _current.generator.rekey(*_current.key)
        _current.entered = True
    return _current.generator.numpy


def _draw_process_key() -> int:
    # Looked up, never imported: a NumPy-only process stays one, and there torch's seeds mean nothing.
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "default_generator"):
        # torch seeds its Mersenne twister with the low 32 bits of a seed, so two workers of a long run could agree by
        # chance; the whole seed in the key keeps them apart. The device is named because a default may be set.
        drawn = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        return int(torch.default_generator.initial_seed()) << 64 | drawn
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))
