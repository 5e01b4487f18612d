"""What is measured next: the ascent against exhaustive search, and what memory that ran out rules out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.record import RESULTS
from tests.benchmarks.tuning import read_grid
from tests.tuning.landscape import EVERY, landscape, regret, replay, trials_to
from tests.tuning.test_space import point
from tuning.config import SpaceConfig
from tuning.searchers import Known, ascent, grid, neighbours, random_points
from tuning.space import Point

GRIDS = sorted(RESULTS.glob("tuning_grid-*.json"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_ascent_finds_a_recorded_grids_best_in_a_third_of_it(path: Path) -> None:
    """Real measurements of every point; within 2 % of the best, and no more than a third of the points."""
    points, truth, expected = read_grid(path)
    assert len(points) >= 24
    asked = replay(points, truth, expected, ascent, len(points))
    assert regret(asked, truth) <= 0.02
    assert len(asked) <= len(points) / 3


def test_there_is_a_recorded_grid() -> None:
    assert GRIDS


@pytest.mark.parametrize("gpu", ["H100", "A100", "GeForce-RTX-4090"])
@pytest.mark.parametrize("seed", range(3))
def test_the_ascent_survives_expectations_that_are_off(gpu: str, seed: int) -> None:
    """Speeds of each kind differ by up to 12 % from what is expected, memory by up to 5 %; points beyond the wall are
    in the space, as the margin is 0."""
    land = landscape(gpu, seed)
    points = list(land.space(EVERY, margin=0.0).points)
    truth = {point: land.speed(point) for point in points}
    expected = {point: land.expected(point) for point in points}
    asked = replay(points, truth, expected, ascent, len(points))
    assert regret(asked, truth) <= 0.02
    assert len(asked) <= max(12, len(points) / 10)


def test_a_wrong_start_is_left() -> None:
    """Arithmetic that expects most of the slowest corner costs trials and not the optimum."""
    land = landscape("H100")
    points = list(land.space(SpaceConfig()).points)
    truth = {point: land.speed(point) for point in points}
    upside_down = {point: 1 / land.expected(point) for point in points}
    asked = replay(points, truth, upside_down, ascent, len(points))
    assert asked[0] == min(points, key=land.expected)
    assert regret(asked, truth) == 0


def test_memory_that_ran_out_rules_out_what_needs_more() -> None:
    points = [point(micro, mode) for micro in (1, 2, 4, 8) for mode in ("none", "experts", "full")]
    truth = {p: None if p.micro_batch_size >= 4 and p.activation_checkpointing == "none" else 1.0 for p in points}
    asked = replay(points, truth, dict.fromkeys(points, 1.0), grid, 100)
    assert point(4, "none") in asked
    assert point(8, "none") not in asked
    assert len(asked) == len(points) - 1


def test_of_a_mode_that_recomputes_more_nothing_is_ruled_out() -> None:
    known = Known(
        points=[point(8, "none"), point(8, "full"), point(4, "none")],
        speeds={},
        failed=frozenset({point(8, "experts")}),
        out_of_memory=frozenset({point(8, "experts")}),
        running=frozenset(),
        expected={},
    )
    assert not known.free(point(8, "none"))
    assert known.free(point(8, "full"))
    assert known.free(point(4, "none"))


def test_what_runs_is_not_asked_for_again() -> None:
    points = [point(1), point(2)]
    known = Known(points, {}, frozenset(), frozenset(), frozenset(points), dict.fromkeys(points, 1.0))
    assert ascent(known) is grid(known) is random_points(0)(known) is None


def test_neighbours_are_one_step_away() -> None:
    points = [
        point(m, mode) for m in (1, 2, 4, 8, 16) for mode in ("none", "experts", "full") if (m, mode) != (16, "none")
    ]
    found = neighbours(point(8, "none"), points)
    assert found == [point(4, "none"), point(8, "experts"), point(16, "experts"), point(8, "full"), point(16, "full")]
    assert neighbours(point(16, "full"), points) == [point(8, "full"), point(8, "none"), point(16, "experts")]


def test_random_order_is_the_seeds() -> None:
    points = [point(m, mode) for m in (1, 2, 4, 8) for mode in ("none", "experts", "full")]
    truth: dict[Point, float | None] = dict.fromkeys(points, 1.0)
    runs = [replay(points, truth, {}, random_points(seed), 100) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[2]) == set(points)


def test_measures_of_a_search() -> None:
    points = [point(1), point(2), point(4)]
    truth: dict[Point, float | None] = {points[0]: 50.0, points[1]: 100.0, points[2]: None}
    assert regret(points[:1], truth) == 0.5
    assert regret([points[2]], truth) == 1.0
    assert trials_to([points[2], points[0], points[1]], truth, 0.02) == 3
    assert trials_to([points[0]], truth, 0.02) is None
