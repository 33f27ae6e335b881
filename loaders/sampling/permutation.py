"""A shuffle that is computed, not stored: a keyed bijection on [0, n), evaluated for a block of positions at once.

Small n are shuffled in a table, every permutation as likely as any other. Larger n go through a Feistel network over
two halves, [0, a) and [0, b) with a·b just above n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains");
the few results past n walk on along their cycle until they fall inside. The bijective shuffle of Mitchell et al. 2021
("Bandwidth-optimal random shuffling for GPUs") is the same over a power of two, where up to half of all must walk.

Rounds: with this hash, and at n = 65, four and five show in the differences of neighbours; from six on nothing was
found at any n. Eight are used, and only for n above 4,096.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from loaders.randomness.streams import Domain, KeyedGenerator

MAX_N = 1 << 40
_TABLE_N = 1 << 12
_ROUNDS = 8
_HALF = np.uint64(32)
_ODD = np.uint64(1)

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def draw_keys(generator: np.random.Generator, count: int) -> Words:
    """Keys for `scramble`, uint64 (count, 3).

    Raw words: NumPy may change a generator's distributions in any version, but never a bit generator's stream (NEP 19).
    """
    keys = np.asarray(generator.bit_generator.random_raw(3 * count), np.uint64).reshape(count, 3)
    keys[:, ::2] |= _ODD
    return keys


def scramble(values: Words, key: Words, out: Words, scratch: Words) -> None:
    """A keyed hash of every value into `out`; its upper halves are the better ones. `out` may be `values`."""
    np.multiply(values, key[0], out=out)
    np.add(out, key[1], out=out)
    np.right_shift(out, _HALF, out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, key[2], out=out)


def scale(hashes: Words, size: int | Words) -> None:
    """Map hashes to [0, size) by their upper halves, in place; size < 2³²."""
    np.right_shift(hashes, _HALF, out=hashes)
    np.multiply(hashes, np.asarray(size, np.uint64), out=hashes)
    np.right_shift(hashes, _HALF, out=hashes)


class Permutation:
    """A bijection on [0, n), fixed by the words that `generator` gives next.

    Memory is constant: a table of at most 32 KiB, else 24 keys.
    """

    def __init__(self, n: int, generator: np.random.Generator) -> None:
        self.n = n
        self._table: Indices | None = None
        if n <= _TABLE_N:
            # 64 random bits per position: no two agree in practice, and `stable` fixes the result where they would.
            self._table = np.argsort(np.asarray(generator.bit_generator.random_raw(n), np.uint64), kind="stable")
        else:
            self._keys = draw_keys(generator, _ROUNDS)
            self._sides = (a := math.isqrt(n - 1) + 1, -(-n // a))

    def __call__(self, positions: Indices) -> Indices:
        """Where the positions go, int64 of the same shape (N,). All must lie in [0, n)."""
        if self._table is not None:
            return self._table[positions]
        result = self._encipher(positions.astype(np.uint64))
        outside = np.flatnonzero(result >= self.n)
        while len(outside):
            result[outside] = self._encipher(result[outside])
            outside = outside[result[outside] >= self.n]
        return result.view(np.int64)

    def _encipher(self, values: Words) -> Words:
        """The bijection on [0, a·b)."""
        width = np.uint64(self._sides[1])
        left: Words = values // width
        right = values - left * width
        added, scratch = np.empty_like(values), np.empty_like(values)
        halves = (left, right)
        for number, key in enumerate(self._keys):
            changed, side = number % 2, self._sides[number % 2]
            scramble(halves[1 - changed], key, added, scratch)
            scale(added, side)
            half = halves[changed]
            np.add(half, added, out=half)
            # Modulo: where the sum is below `side`, the difference wraps around to a huge number.
            np.subtract(half, np.uint64(side), out=scratch)
            np.minimum(half, scratch, out=half)
        left *= width
        left += right
        return left


@functools.lru_cache(maxsize=64)
def permutation(n: int, domain: Domain, seed: int, epoch: int, stream: int = 0) -> Permutation:
    """The permutation of [0, n) that belongs to a key. Making one costs under a millisecond; the last ones are kept."""
    return Permutation(n, KeyedGenerator().rekey(domain, seed, epoch, 0, stream))
