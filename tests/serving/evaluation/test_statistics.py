"""Statistics against values worked out elsewhere.

Wilson's intervals: Newcombe 1998, Statistics in Medicine 17, table I (method 3). McNemar: binomial tails by hand.
pass@k: the definition, over all subsets. Holm: the example worked by hand below.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.evaluation.statistics import (
    holm,
    majority,
    mcnemar,
    mean,
    paired,
    pass_at,
    share_of,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_newcombes(successes: int, count: int, low: float, high: float) -> None:
    found = wilson(successes, count)
    assert found.value == successes / count
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilsons_interval_holds_the_share_and_mirrors(pair: tuple[int, int]) -> None:
    successes, count = pair
    one, other = wilson(successes, count), wilson(count - successes, count)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert math.isclose(one.low, 1 - other.high, abs_tol=1e-12)


def test_a_share_of_nothing_is_none() -> None:
    for bad in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson(*bad)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (1, 8, 20 / 512), (5, 5, 1.0), (0, 10, 2 / 1024), (2, 10, 158 / 4096)],
)
def test_mcnemars_exact_test_by_hand(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == mcnemar(won, lost) == pytest.approx(p)


def test_mcnemars_test_of_many_changes_is_near_the_normal_one() -> None:
    lost, won = 24_700, 25_300
    z = (won - lost - 1) / math.sqrt(lost + won)
    assert mcnemar(lost, won) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_mcnemar_keeps_its_level() -> None:
    """Of two targets that are equal, at most one comparison in twenty is significant."""
    rng = random.Random(1)
    significant = 0
    for _ in range(2000):
        lost = sum(rng.random() < 0.5 for _ in range(30))
        significant += mcnemar(lost, 30 - lost) < 0.05
    assert significant <= 0.05 * 2000


@pytest.mark.parametrize(("right", "samples"), [(0, 4), (1, 4), (2, 5), (4, 4), (3, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: int, samples: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at(k, right, samples) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="cannot be told"):
        pass_at(samples + 1, right, samples)


def test_the_majority_decides_and_a_tie_is_shared() -> None:
    assert majority([("4", 1.0), ("4", 1.0), ("5", 0.0)]) == 1.0
    assert majority([("4", 1.0), ("5", 0.0)]) == 0.5
    assert majority([("4", 1.0), (None, 0.0), (None, 0.0)]) == 1.0
    assert majority([(None, 0.0)]) == 0.0
    assert majority([]) == 0.0


def test_holms_adjustment_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_bootstrapped_mean_repeats_and_matches_the_normal_interval() -> None:
    rng = random.Random(2)
    values = [rng.gauss(10, 2) for _ in range(400)]
    found = mean(values)
    assert found == mean(values)
    assert found.value == pytest.approx(sum(values) / 400)
    spread = 1.96 * math.sqrt(sum((each - found.value) ** 2 for each in values) / 399 / 400)
    assert found.low == pytest.approx(found.value - spread, abs=0.03)
    assert found.high == pytest.approx(found.value + spread, abs=0.03)
    assert mean([3.0]).low == mean([3.0]).high == 3.0


def test_samples_of_one_item_are_not_counted_as_independent() -> None:
    once = share_of([[1.0], [0.0]] * 10)
    ten_times = share_of([[1.0] * 10, [0.0] * 10] * 10)
    assert once == wilson(10, 20)
    assert ten_times.value == 0.5
    assert ten_times.count == 20
    assert ten_times.high - ten_times.low == pytest.approx(once.high - once.low, rel=0.3)


def test_a_paired_difference_finds_what_unpaired_noise_hides() -> None:
    rng = random.Random(3)
    before = [rng.gauss(100, 30) for _ in range(60)]
    after = [value + 2 + rng.gauss(0, 1) for value in before]
    found = paired(before, after)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2, abs=0.5)
    assert found.p < 0.01
    assert paired(before, before).p == 1.0
    noise = [value + rng.gauss(0, 5) for value in before]
    assert paired(before, noise).low < 0 < paired(before, noise).high
    with pytest.raises(ValueError, match="as many"):
        paired([1.0], [])
