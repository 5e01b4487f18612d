"""What a search tells Prometheus of each GPU type."""

from __future__ import annotations

import math
from pathlib import Path

from ray import cloudpickle

from cluster.hardware import GIB
from cluster.metrics import TUNING_METRICS
from tests.tuning.test_quality import study as quality_study
from tests.tuning.test_study import measured, study
from tuning.metrics import SearchMetrics, standing, standing_of_quality
from tuning.quality.candidates import Evaluation, new_curve
from tuning.study import new_trial


def test_standing_follows_the_study(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl", slots=2, trials=9)
    before = standing(one)
    gauges = {name for name, metric in TUNING_METRICS.items() if metric.kind == "gauge"}
    assert before.keys() == gauges - {"best_held_out_loss"}
    assert math.isnan(before["best_tokens_per_second"])
    assert math.isnan(before["best_memory_gib"])
    assert (before["running_trials"], before["known_trials"], before["trial_budget"]) == (0, 0, 9)
    assert before["space_points"] == len(one.space.points) > 0
    first, second = one.ask(), one.ask()
    assert first
    assert second
    assert standing(one)["running_trials"] == 2
    one.tell(measured(first, 100.0, peak=3 * GIB))
    one.tell(new_trial(second, outcome="out_of_memory", reason="too large"))
    after = standing(one)
    assert (after["running_trials"], after["known_trials"]) == (0, 2)
    assert (after["best_tokens_per_second"], after["best_memory_gib"]) == (100.0, 3.0)


def test_a_search_for_quality_tells_its_best_loss(tmp_path: Path) -> None:
    one = quality_study(tmp_path / "j.jsonl", trials=3)
    before = standing_of_quality(one)
    assert before.keys() <= TUNING_METRICS.keys()
    assert (before["known_trials"], before["trial_budget"], before["space_points"]) == (0, 3, len(one.order))
    assert math.isnan(before["best_held_out_loss"])
    where = one.ask()
    assert where
    curve = new_curve(where, outcome="measured", evaluations=(Evaluation(step=9, rows=72, loss=1.25),))
    with SearchMetrics("tiny", {"H100": one}, standing_of_quality) as metrics:
        one.tell(curve)
        metrics.told("H100", curve)
        assert metrics.recorders["H100"].total("trials", outcome="measured") == 1
        assert metrics.recorders["H100"].gauges()["best_held_out_loss"] == 1.25


def test_trials_are_counted_by_type_and_outcome(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl")
    where = one.ask()
    assert where
    with SearchMetrics("tiny", {"H100": one, "A100": one}, standing) as metrics:
        metrics.told("H100", measured(where, 100.0))
        metrics.told("H100", new_trial(where, outcome="hung", reason="too long"))
        metrics.told("A100", measured(where, 100.0))
    h100, a100 = metrics.recorders["H100"], metrics.recorders["A100"]
    assert (h100.total("trials"), h100.total("trials", outcome="hung"), a100.total("trials")) == (2, 1, 1)
    assert h100.total("trial_seconds") == 2
    assert h100.gauges()["running_trials"] == 1


def test_ray_tune_can_keep_a_copy(tmp_path: Path) -> None:
    with SearchMetrics("tiny", {"H100": study(tmp_path / "j.jsonl")}, standing) as metrics:
        assert cloudpickle.loads(cloudpickle.dumps(metrics)).recorders == {}
