"""A shuffle that is computed, not stored: a keyed bijection on [0, n), evaluated for a block of positions at once.

For small n a table is shuffled, every permutation with the same probability. For larger n a Feistel network is used
over two halves, [0, a) and [0, b) with a·b just above n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"); the few results outside of [0, n) are enciphered again until they fall inside (cycle walking). The bijective
shuffle of Mitchell et al. 2021 ("Bandwidth-optimal random shuffling for GPUs") is the same over a power of two, where
up to half of all results are outside.

Rounds: with this hash, at n = 65, four and five rounds leave structure in the differences of neighbours; with six or
more none was found at any n. Eight are used, and only for n above 4,096.
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
    """Write a keyed hash of every value to `out`; the upper 32 bits are of better quality. `out` may be `values`."""
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
    """A bijection on [0, n), determined by the next words of `generator`.

    Memory is constant: a table of at most 32 KiB, else 24 words.
    """

    def __init__(self, n: int, generator: np.random.Generator) -> None:
        self.n = n
        self._table: Indices | None = None
        if n <= _TABLE_N:
            # 64 random bits per position: no two are equal in practice, and if they are, `stable` defines the result.
            self._table = np.argsort(np.asarray(generator.bit_generator.random_raw(n), np.uint64), kind="stable")
        else:
            self._keys = draw_keys(generator, _ROUNDS)
            self._sides = (a := math.isqrt(n - 1) + 1, -(-n // a))

    def __call__(self, positions: Indices) -> Indices:
        """The images of the positions, int64 of the same shape (N,). All must be in [0, n)."""
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
    """The permutation of [0, n) for a key. Making one takes less than a millisecond; the last 64 used are cached."""
    return Permutation(n, KeyedGenerator().rekey(domain, seed, epoch, 0, stream))
