"""Which record comes when, as functions of the seed and a count, so that resuming costs nothing.

`Permutation` shuffles the records of an epoch, `Mixture` chooses the source of each draw. Neither remembers anything.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from fractions import Fraction

ROUNDS = 8
PHASES = 1 << 16  # steps in which a lane's schedule may be shifted against another's


def key_of(*parts: object) -> int:
    """Return 64 bits drawn from the parts, the same on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Permutation:
    """A shuffle of range(size) that is computed entry by entry.

    A Feistel network on the next even number of bits; what falls outside goes round again (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002), less than four times on average from 16 elements on.
    """

    def __init__(self, size: int, key: int):
        self.size = size
        self._half = max(2, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = tuple(key_of(key, i) for i in range(ROUNDS))

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_scramble(right ^ key) & self._mask)
            index = left << self._half | right
            if index < self.size:
                return index


def _scramble(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Mixture:
    """Choose a source for every draw of a lane, each in exact proportion to its weight.

    The first source takes draw j when floor((j + 1) p + phase) exceeds floor(j p + phase), so its count after j draws
    is within one of j p; the draws that it leaves are dealt to the others in the same way, each within as many as there
    are sources before it and itself. The phase differs from lane to lane, or all lanes would draw the same source at
    the same time.
    """

    def __init__(self, weights: Sequence[float | int], seed: int):
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self._phase = functools.cache(lambda lane, i: key_of(seed, "phase", lane, i) % PHASES)

    def draw(self, lane: int, j: int) -> tuple[int, int]:
        """Return the source of a lane's draw j, and how many of its earlier draws were from that source."""
        last = len(self._shares) - 1
        for i in range(last + 1):
            count = self._count(lane, i, j)
            if i == last or self._count(lane, i, j + 1) > count:
                return i, count
            j -= count
        raise AssertionError("no source has a weight")

    def count(self, lane: int, i: int, draws: int) -> int:
        """Return how many of a lane's first `draws` are from source i."""
        for before in range(i):
            draws -= self._count(lane, before, draws)
        return self._count(lane, i, draws)

    def _count(self, lane: int, i: int, draws: int) -> int:
        share = self._shares[i]
        if share == 1:
            return draws
        return (draws * share.numerator * PHASES + self._phase(lane, i) * share.denominator) // (
            share.denominator * PHASES
        )
