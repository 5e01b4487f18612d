"""Shares and means with their uncertainty, and comparisons of two targets on the same questions.

Sources: Wilson 1927 (interval of a share), Efron 1979 (bootstrap), McNemar 1947 (exact form), Holm 1979 (several
tests), Chen et al. 2021, arXiv:2107.03374 (pass@k). All draws are seeded: the same answers give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

CONFIDENCE = 0.95
Z = 1.959963984540054
"""two-sided normal quantile of `CONFIDENCE`"""
DRAWS = 2000
_CHUNK_VALUES = 4_000_000
"""values that are drawn at a time, to bound the memory"""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval; `count` is the number of items that it is of."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int) -> Interval:
    """A share of independent yes-or-no outcomes, with Wilson's score interval.

    Raises:
        ValueError: there are no outcomes, or more successes than outcomes.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no share")
    share = successes / count
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    middle = share + Z**2 / (2 * count)
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return Interval(share, 0.0 if successes == 0 else low, 1.0 if successes == count else high, count)


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """A mean over items, with a percentile bootstrap over them.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean needs a value")
    means = _bootstrap(numpy.asarray(values, dtype=float), seed)
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(math.fsum(values) / len(values), float(low), float(high), len(values))


def share_of(outcomes: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """A share over items that were each asked one or more times; `outcomes` holds 0, 1 or scores between, by item.

    Wilson's interval where each item has one yes or no, else a bootstrap over items: samples of one item are not
    independent.

    Raises:
        ValueError: there are no outcomes.
    """
    if all(len(each) == 1 and each[0] in (0, 1) for each in outcomes):
        return wilson(round(sum(each[0] for each in outcomes)), len(outcomes))
    return mean([math.fsum(each) / len(each) for each in outcomes], seed)


def pass_at(k: int, right: int, samples: int) -> float:
    """Probability that one of k samples is right, estimated without bias from `samples` of which `right` are.

    Raises:
        ValueError: k is more than the samples, or below 1.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} cannot be told from {right} of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(votes: Sequence[tuple[Hashable | None, float]]) -> float:
    """Score of the answer that most samples gave; where several were given as often, the mean of theirs.

    Args:
        votes: for each sample what it answered, None without an answer, which is no vote, and its score. Without any
            vote the score is 0.
    """
    counts: dict[Hashable, list[float]] = {}
    for given, score in votes:
        if given is not None:
            counts.setdefault(given, []).append(score)
    if not counts:
        return 0.0
    most = max(map(len, counts.values()))
    tied = [sum(scores) / len(scores) for scores in counts.values() if len(scores) == most]
    return math.fsum(tied) / len(tied)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the items whose outcome changed, `lost` and `won` are as likely."""
    changed = lost + won
    if changed == 0:
        return 1.0
    whole = math.lgamma(changed + 1) - changed * math.log(2)
    logarithms = (whole - math.lgamma(k + 1) - math.lgamma(changed - k + 1) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logarithms)))


@dataclass(frozen=True)
class Difference:
    """After minus before over the same items, with its 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Difference:
    """The mean difference over paired items, by a bootstrap over the pairs.

    Raises:
        ValueError: there are no pairs, or one side is longer.
    """
    differences = numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float)
    if differences.ndim != 1 or not len(differences) or len(before) != len(after):
        raise ValueError("a paired comparison needs as many values before as after")
    value = math.fsum(differences.tolist()) / len(differences)
    if not differences.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    means = _bootstrap(differences, seed)
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * (beyond + 1) / (len(means) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several tests (Holm's step-down), in their order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _bootstrap(values: NDArray[Any], seed: int) -> NDArray[Any]:
    """Means of `DRAWS` samples with replacement."""
    rng = numpy.random.default_rng(seed)
    rows = max(1, min(DRAWS, _CHUNK_VALUES // len(values)))
    chunks = []
    for first in range(0, DRAWS, rows):
        places = rng.integers(0, len(values), size=(min(rows, DRAWS - first), len(values)))
        chunks.append(values[places].mean(axis=1))
    return numpy.concatenate(chunks)
