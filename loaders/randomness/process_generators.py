"""The process's own generators (Python's, NumPy's legacy one, torch's), keyed for the samples that draw from them.

Seeding the three takes longer than reading a small sample, and most datasets never draw from them. So at first their
states are only compared before and after each span. The first span that changes them is repeated with every sample
keyed, and all later spans are keyed: either way the result of a span depends only on its keys.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.randomness.streams import Domain, keyed_word

# 624 words of a Mersenne twister, and its position.
_TWISTER_NBYTES = 625 * 4
# NumPy creates this object on first access, which takes a millisecond: done here once, not in every forked worker.
_ = np.random.get_bit_generator().ctypes  # type: ignore[attr-defined]  # missing in NumPy's stubs alone

# Of Python's generator, NumPy's and torch's, in this order: what changes whenever one is drawn from or seeded.
_Fingerprint = tuple[Any, Any, Any]


class ProcessGenerators:
    """Watches the generators of this process, and keys them once something draws from them.

    Args:
        shared: True outside of worker processes, where the caller uses them too: they are restored after every span, so
            that reading does not affect a model's dropout.
        keyed: True to key from the start, for samples that cannot be read again.
    """

    def __init__(self, *, shared: bool, keyed: bool) -> None:
        self.keyed = keyed
        self._shared = shared
        self._left: _Fingerprint | None = None  # before the span
        self._known: _Fingerprint = (None, None, None)  # when `_callers` were read
        self._callers: tuple[Any, Any, Any] = (None, None, None)
        self._touched = False  # since `begin`, so that they must be restored

    def begin(self) -> None:
        """Start a span. Whatever interrupts it, `end` restores the caller's generators."""
        self._touched = False
        if not self._shared and (self.keyed or self._left is not None):
            return
        now = _fingerprint()
        if now == self._known:  # reading the states themselves takes ten times as long
            self._left, self._touched = now, self.keyed
            return
        python, legacy, torchs = self._callers
        if now[0] != self._known[0]:
            python = random.getstate()
        if now[1] != self._known[1]:
            legacy = np.random.get_state(legacy=False)
        if now[2] != self._known[2]:
            torchs = sys.modules["torch"].get_rng_state()
        # NumPy keeps every second normal number for the next call, which would then not change the fingerprint.
        has_gauss = bool(legacy.get("has_gauss"))
        if self._shared:
            self._callers, self._known = (python, legacy, torchs), (now[0], None if has_gauss else now[1], now[2])
        self._left, self._touched = now, self.keyed or has_gauss
        if has_gauss and not self.keyed:
            np.random.set_state({**legacy, "has_gauss": 0, "gauss": 0.0})

    def enter(self, domain: Domain, seed: int, epoch: int, position: int) -> None:
        """Seed the generators by this key, unless they are only watched."""
        if not self.keyed:
            return
        word = keyed_word(domain, seed, epoch, position)
        random.seed(word)
        np.random.seed(word & 0xFFFFFFFF)
        if (torch := _torch()) is not None:
            torch.default_generator.manual_seed(word)

    def drew(self) -> bool:
        """Whether the span that ends here drew without keys. It must then be repeated, now with keys."""
        if self.keyed or self._left is None:
            return False
        now = _fingerprint()
        if self._left[2] is None and (torch := _torch()) is not None:
            # torch was imported during the span, which alone is not a draw.
            unused = torch.Generator().manual_seed(torch.default_generator.initial_seed())
            self._left, self._known = (*self._left[:2], _bytes(unused)), (None, None, None)
        if now == self._left:
            return False
        self.keyed = self._touched = True
        self.end()
        return True

    def end(self) -> None:
        """Restore the caller's generators if this span changed them."""
        if self._shared and self._touched:
            python, legacy, torchs = self._callers
            random.setstate(python)
            np.random.set_state(legacy)
            if torchs is not None:
                sys.modules["torch"].set_rng_state(torchs)


def _torch() -> Any:
    """torch, if this process has loaded it."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "default_generator") else None


def _fingerprint() -> _Fingerprint:
    legacy = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in NumPy's stubs alone
    # Read at the address that NumPy documents for C: `get_state` takes 36 µs, as long as reading several samples.
    twister = type(legacy) is np.random.MT19937
    state = ctypes.string_at(legacy.ctypes.state_address, _TWISTER_NBYTES) if twister else repr(np.random.get_state())
    torch = _torch()
    return _pythons(), state, torch and _bytes(torch.default_generator)


def _reader_of_pythons() -> Callable[[], Any]:
    """What reads the state of Python's generator: from its memory where that is laid out as in CPython, in 1 µs."""
    generator = getattr(random, "_inst", None)
    address = id(generator) + object.__basicsize__
    if sys.implementation.name == "cpython" and type(generator) is random.Random:
        (*words, position), _ = random.getstate()[1:]
        as_laid_out = np.array([position, *words], np.uint32).tobytes()
        has_room = type(generator).__basicsize__ >= object.__basicsize__ + _TWISTER_NBYTES
        if has_room and ctypes.string_at(address, _TWISTER_NBYTES) == as_laid_out:
            # `gauss` keeps every second number, outside of that memory.
            return lambda: (ctypes.string_at(address, _TWISTER_NBYTES), vars(generator)["gauss_next"])
    return random.getstate


_pythons = _reader_of_pythons()


def _bytes(generator: Any) -> Any:
    state = generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.nbytes)
