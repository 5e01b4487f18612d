"""Exact and near duplicates among millions of texts, from signatures of 80 bytes each.

Exact: equal 64-bit digests of the rendered tokens. Near: MinHash (Broder 1997) over the set of a text's character
5-grams, which needs no words and so suits Chinese and Japanese. Candidates are pairs that agree in one of 8 bands of
10 minima (LSH); they are judged by the similarity that 256 one-bit minima estimate (Li & König 2010, b-bit minwise
hashing).

Precision: the estimate of a similarity J has the standard error 2·sqrt(p·(1-p)/256) with p = (1+J)/2: 0.02 at 0.95,
0.03 at 0.9, 0.04 at 0.8. With the threshold of 0.9 nearly all pairs of 0.95 are found, about half of those of 0.9, and
hardly any of 0.8 (test_duplicates.py counts them). Each text is compared to the first of its band and to the
one before it, so that a cluster of k texts costs 2k comparisons, and is reported as k - 1 duplicates of earlier texts.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

GRAM = 5
"""characters of a shingle"""
SHINGLES = 1024
"""of a longer text, the shingles with the smallest hashes stand for all (bottom-k sketch)"""
HASHES = 256
BANDS, BAND_ROWS = 8, 10
MINIMUM_CHARACTERS = 20
"""shorter texts are compared exactly, and never nearly"""

Words = npt.NDArray[np.uint64]
Hashes = npt.NDArray[np.uint32]


class Duplicate(NamedTuple):
    """Text number `later` repeats number `earlier`, exactly or nearly; `similarity` estimates their Jaccard index."""

    later: int
    earlier: int
    similarity: float
    exact: bool


class DuplicateIndex:
    """Signatures of the texts added so far; `find` compares them."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self._bands = array("I")
        self._bits = array("Q")
        self._numbers = array("Q")

    def add(self, tokens: list[int], text: str) -> None:
        """Add the next text, with the tokens it is rendered to."""
        number = len(self._digests)
        self._digests.append(digest(tokens))
        if len(text) < MINIMUM_CHARACTERS:
            return
        bands, bits = signature(text)
        self._numbers.append(number)
        self._bands.frombytes(bands.tobytes())
        self._bits.frombytes(bits.tobytes())

    def find(self, threshold: float = 0.9) -> list[Duplicate]:
        """Every text that repeats an earlier one, in the order of the texts; an exact duplicate is no near one too."""
        exact = self._find_exact()
        near = self._find_near(threshold, set(exact))
        found = [Duplicate(later, earlier, 1.0, True) for later, earlier in exact.items()]
        found += [Duplicate(later, earlier, likeness, False) for later, (earlier, likeness) in near.items()]
        return sorted(found)

    def _find_exact(self) -> dict[int, int]:
        digests = np.frombuffer(self._digests, np.uint64) if self._digests else np.empty(0, np.uint64)
        order = np.argsort(digests, kind="stable")
        firsts = _first_of_group(digests[order])
        repeated = firsts != np.arange(len(order))
        return dict(zip(order[repeated].tolist(), order[firsts[repeated]].tolist(), strict=True))

    def _find_near(self, threshold: float, exact: set[int]) -> dict[int, tuple[int, float]]:
        if not self._numbers:
            return {}
        numbers = np.frombuffer(self._numbers, np.uint64).astype(np.int64)
        bands = np.frombuffer(self._bands, np.uint32).reshape(-1, BANDS)
        bits = np.frombuffer(self._bits, np.uint64).reshape(-1, HASHES // 64)
        best: dict[int, tuple[int, float]] = {}
        for band in range(BANDS):
            for later, earlier in _candidates(bands[:, band]):
                likeness = _estimate(bits[later], bits[earlier])
                close = np.flatnonzero(likeness >= threshold)
                for row in close.tolist():
                    one, other = int(numbers[later[row]]), int(numbers[earlier[row]])
                    if one not in exact and likeness[row] > best.get(one, (0, 0.0))[1]:
                        best[one] = other, float(likeness[row])
        return best


def digest(tokens: list[int]) -> int:
    """64 bits that stand for a list of tokens."""
    return int.from_bytes(hashlib.blake2b(array("I", tokens).tobytes(), digest_size=8).digest(), "little")


def signature(text: str) -> tuple[Hashes, Words]:
    """A text's band keys [BANDS] and its one-bit minima [HASHES / 64]."""
    minima = _minima(shingles(text))
    keys = minima[: BANDS * BAND_ROWS].reshape(BANDS, BAND_ROWS)
    bands = _mix((keys * _BAND_FACTORS).sum(axis=1, dtype=np.uint32))
    bits = np.packbits((_mix(minima) & 1).astype(np.uint8)).view(np.uint64)
    return bands, bits


def shingles(text: str) -> Hashes:
    """Hashes of the different 5-grams of a text, without regard to case and white space; at most `SHINGLES` of them."""
    plain = " ".join(text.casefold().split())
    letters = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32)
    width = max(len(letters) - GRAM + 1, 1)
    hashed = np.zeros(width, np.uint32)
    for offset, factor in enumerate(_GRAM_FACTORS):
        part = letters[offset : offset + width]
        hashed[: len(part)] += part * factor
    unique = np.unique(_mix(hashed))
    return unique[:SHINGLES]


def _minima(hashed: Hashes) -> Hashes:
    """The smallest value of each of `HASHES` permutations over a set of hashes: its MinHash."""
    minima: Hashes = (hashed[:, None] * _FACTORS).min(axis=0)
    return minima


def _candidates(keys: Hashes) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs (later, earlier) of rows with equal keys: each with the first of its group, and with the one before it."""
    order = np.argsort(keys, kind="stable")
    firsts = _first_of_group(keys[order])
    positions = np.arange(len(order))
    repeated = np.flatnonzero(firsts != positions)
    third = repeated[positions[repeated] - firsts[repeated] > 1]
    return [(order[repeated], order[firsts[repeated]]), (order[third], order[third - 1])]


def _first_of_group(ordered: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.int64]:
    """For each position of a sorted array, the position where its value stands first."""
    positions = np.arange(len(ordered))
    starts = np.ones(len(ordered), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return np.maximum.accumulate(np.where(starts, positions, 0))


def _estimate(one: Words, other: Words) -> npt.NDArray[np.float64]:
    """Jaccard similarities: one-bit minima of unrelated texts agree by half."""
    agreeing = HASHES - np.bitwise_count(one ^ other).sum(axis=1)
    similarities: npt.NDArray[np.float64] = 2 * agreeing / HASHES - 1
    return similarities


def _mix(values: Hashes) -> Hashes:
    """Scatter 32-bit values (the finaliser of MurmurHash3)."""
    values = values ^ (values >> np.uint32(16))
    values = values * np.uint32(0x85EBCA6B)
    values = values ^ (values >> np.uint32(13))
    values = values * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _odd_numbers(count: int, seed: int) -> Hashes:
    return np.random.default_rng(seed).integers(0, 2**31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)


_GRAM_FACTORS = _odd_numbers(GRAM, seed=1)
_BAND_FACTORS = _odd_numbers(BAND_ROWS, seed=2)
_FACTORS = _odd_numbers(HASHES, seed=3)
