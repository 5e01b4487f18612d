"""A study asks and is told; its journal is all that it remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuning.landscape import landscape
from tests.tuning.test_space import point
from tuning.asking import HOPELESS
from tuning.config import SpaceConfig, TuningConfig
from tuning.journal import Journal, Trial
from tuning.space import Point
from tuning.study import Study, choose, new_trial

IDENTITY = {"gpu_type": "H100", "steps": (1, 2)}


def study(path: Path, baselines: tuple[Point, ...] = (), slots: int = 1, **settings: object) -> Study:
    land = landscape("H100")
    space = land.space(SpaceConfig())
    expected = {point: land.expected(point) for point in space.points}
    config = TuningConfig.model_validate(settings)
    made = Study("H100", space, expected, config, Journal(path, IDENTITY, Trial), baselines, slots)
    made.begin()
    return made


def measured(where: Point, speed: float, peak: int = 10, noise: float = 0.0, seconds: float = 1.0) -> Trial:
    figures = {"tokens_per_second": speed, "peak_bytes": peak, "noise": noise, "seconds": seconds}
    return new_trial(where, outcome="measured", **figures)


def run(one: Study, most: int = 100) -> list[Point]:
    asked: list[Point] = []
    while len(asked) < most and (where := one.ask()) is not None:
        asked.append(where)
        one.tell(measured(where, landscape("H100").speed(where) or 0.0))
    return asked


def test_a_search_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = run(study(tmp_path / "whole.jsonl"))
    assert len(whole) > 3
    first = run(study(tmp_path / "broken.jsonl"), most=2)
    lost = study(tmp_path / "broken.jsonl")
    assert lost.ask() == whole[2]  # and never told
    rest = run(study(tmp_path / "broken.jsonl"))
    assert first + rest == whole


def test_a_finished_search_measures_nothing_again(tmp_path: Path) -> None:
    finished = study(tmp_path / "j.jsonl")
    run(finished)
    assert finished.over == "no point is left that could be faster"
    again = study(tmp_path / "j.jsonl")
    assert again.ask() is None
    assert again.over == finished.over
    assert again.choice() == finished.choice()


def test_a_larger_budget_opens_it_again(tmp_path: Path) -> None:
    assert len(run(study(tmp_path / "j.jsonl", trials=2))) == 2
    assert study(tmp_path / "j.jsonl", trials=2).over == "2 trials, as many as tuning.trials allows"
    assert len(run(study(tmp_path / "j.jsonl", trials=4))) == 2


def test_time_is_a_budget_too(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", minutes=1.0, searcher="grid")
    for _ in range(2):
        where = one.ask()
        assert where is not None
        one.tell(measured(where, 1.0, seconds=31.0))
    assert one.ask() is None
    assert one.over == "1 minutes, as long as tuning.minutes allows"


def test_of_several_slots_none_stands_idle(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", slots=3, searcher="grid")
    asked = [one.ask() for _ in range(4)]
    assert len({*asked[:3]}) == 3
    assert asked[3] is None
    assert one.over is None


def test_the_budget_counts_what_runs(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", slots=3, trials=2, searcher="grid")
    assert [one.ask() is None for _ in range(3)] == [False, False, True]


def test_baselines_come_first_where_they_are_in_the_space(tmp_path: Path) -> None:
    outside = point(3, "full")
    one = study(tmp_path / "j.jsonl", baselines=(point(2, "experts"), outside, point(8, "full")))
    assert run(one)[:2] == [point(2, "experts"), point(8, "full")]


def test_a_process_that_was_lost_is_tried_again_and_memory_that_ran_out_is_not(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", searcher="grid", retries=1)
    first = one.ask()
    assert first is not None
    one.tell(new_trial(first, outcome="died"))
    assert one.ask() == first
    one.tell(new_trial(first, outcome="died"))
    second = one.ask()
    assert second not in (first, None)
    one.tell(new_trial(second, outcome="out_of_memory"))  # type: ignore[arg-type]
    assert one.ask() not in (first, second)


def test_a_search_in_which_everything_fails_ends_and_says_why(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", searcher="grid")
    for _ in range(HOPELESS):
        where = one.ask()
        assert where is not None
        one.tell(new_trial(where, outcome="failed", reason="ValueError: no"))
    assert one.ask() is None
    assert one.over == "the first 3 trials failed, the last one because ValueError: no"
    assert one.choice() is None


def test_an_interrupted_points_place_is_given_back(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", searcher="grid")
    first = one.ask()
    assert first is not None
    one.give_back(first)
    assert one.ask() == first


def test_a_tie_goes_to_less_memory() -> None:
    fast, small, slow = measured(point(8), 1000, 50), measured(point(4), 995, 30), measured(point(1), 900, 10)
    choice = choose([fast, small, slow], 0.01)
    assert choice is not None
    assert choice.trial == small
    assert choice.why.startswith("within 0.5% of the fastest, 8 × 2 none with 1,000 tokens/s, which is a tie")
    alone = choose([fast, small, slow], 0.001)
    assert alone is not None
    assert (alone.trial, alone.why) == (fast, "the fastest of 3 measured points")
    assert choose([], 0.01) is None


def test_noise_makes_ties() -> None:
    fast, small = measured(point(8), 1000, 50, noise=0.03), measured(point(4), 960, 30, noise=0.04)
    choice = choose([fast, small], 0.01)
    assert choice is not None
    assert choice.trial == small  # 4 % apart, and the error of the difference is 5 %
    quiet = choose([fast.model_copy(update={"noise": 0.01}), small.model_copy(update={"noise": 0.02})], 0.01)
    assert quiet is not None
    assert quiet.trial.where == point(8)


def test_a_journal_that_a_killed_process_left_is_whole_up_to_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, IDENTITY, Trial)
    journal.add(measured(point(1), 1.0))
    journal.add(measured(point(2), 2.0))
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        read = Journal(path, IDENTITY, Trial)
        assert [trial.where for trial in read.trials] == [point(1)]
        read.add(measured(point(2), 2.0))
        assert path.read_bytes() == whole


def test_a_journal_of_another_search_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, IDENTITY, Trial).add(measured(point(1), 1.0))
    other = Journal(path, {**IDENTITY, "driver": "580"}, Trial)
    assert other.trials == []
    assert json.loads(path.read_text()) == {
        "format": 1,
        "identity": {"gpu_type": "H100", "steps": [1, 2], "driver": "580"},
    }


@pytest.mark.parametrize("damage", [b"{}\n", b'{"point": {}, "outcome": "splendid"}\n', b"\xff\n"])
def test_a_line_that_makes_no_sense_ends_what_is_read(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, IDENTITY, Trial).add(measured(point(1), 1.0))
    path.write_bytes(path.read_bytes() + damage)
    assert len(Journal(path, IDENTITY, Trial).trials) == 1
