"""The process's own generators (Python's, NumPy's legacy one, torch's), keyed for the samples that draw from them.

Seeding the three takes longer than reading a small sample, and most datasets never draw from them. So at first their
states are only compared before and after each span. The first span that changes them is repeated with every sample
keyed, and all later spans are keyed: either way the result of a span depends only on its keys.
"""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import numpy as np

from loaders.randomness.streams import Domain, keyed_word

# 624 words of a Mersenne twister, and its position.
_TWISTER_NBYTES = 625 * 4
# NumPy creates this object on first access, which takes a millisecond: done here once, not in every forked worker.
_ = np.random.get_bit_generator().ctypes  # type: ignore[attr-defined]  # missing in NumPy's stubs alone


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
        self._left: tuple[Any, ...] | None = None
        self._callers: tuple[Any, Any, Any] | None = None
        self._touched = False  # since `begin`
        self._is_known = False  # `_left` is the fingerprint of the caller's own states

    def begin(self) -> None:
        """Start a span."""
        self._touched = self.keyed
        if not self._shared and (self.keyed or self._left is not None):
            return
        if self._is_known and not self.keyed and _fingerprint() == self._left:
            return  # as when the span before began: reading the states of the caller's generators takes 60 µs
        legacy: Any = np.random.get_state(legacy=False)
        if self._shared:
            torch = _torch()
            self._callers = random.getstate(), legacy, torch and torch.get_rng_state()
        if not self.keyed:
            # NumPy keeps every second normal number for the next call, which would then not change the fingerprint.
            if legacy.get("has_gauss"):
                self._touched = True
                np.random.set_state({**legacy, "has_gauss": 0, "gauss": 0.0})
            self._left = _fingerprint()
        self._is_known = self._shared and not self._touched

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
        if self.keyed:
            return False
        now = _fingerprint()
        if self._left is not None and self._left[-1] is None and (torch := _torch()) is not None:
            # torch was imported during the span, which alone is not a draw.
            unused = torch.Generator().manual_seed(torch.default_generator.initial_seed())
            self._left, self._is_known = (*self._left[:-1], _bytes(unused)), False
        if now == self._left:
            return False
        self.keyed = self._touched = True
        self.end()
        return True

    def end(self) -> None:
        """Restore the caller's generators if this span changed them."""
        if self._callers is not None and self._touched:
            python, legacy, torchs = self._callers
            random.setstate(python)
            np.random.set_state(legacy)
            if torchs is not None:
                sys.modules["torch"].set_rng_state(torchs)


def _torch() -> Any:
    """torch, if this process has loaded it."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "default_generator") else None


def _fingerprint() -> tuple[Any, ...]:
    """What changes whenever one of the generators is drawn from or seeded."""
    legacy = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in NumPy's stubs alone
    # Read at the address that NumPy documents for C: `get_state` takes 36 µs, as long as reading several samples.
    twister = type(legacy) is np.random.MT19937
    state = ctypes.string_at(legacy.ctypes.state_address, _TWISTER_NBYTES) if twister else repr(np.random.get_state())
    torch = _torch()
    return random.getstate(), state, torch and _bytes(torch.default_generator)


def _bytes(generator: Any) -> Any:
    return generator.get_state().numpy().tobytes()
