"""A search for quality without Ray: candidates, what is trained next, what is chosen, and what is shown."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ConfigError, load_files
from cluster.hardware import GIB
from cluster.model import GPT_OSS_20B
from tests.tuning.landscape import GPUS, configured
from tests.tuning.standin import held_out_losses
from tests.tuning.test_profiles import Page
from tests.tuning.test_profiles import result as throughput
from training.config import TrainingConfig
from training.profile import Conditions
from tuning.__main__ import main
from tuning.config import QualityConfig, TuningConfig
from tuning.journal import Journal
from tuning.machines import Machine
from tuning.page import render
from tuning.quality.candidates import (
    Candidate,
    Curve,
    Evaluation,
    baseline,
    make_candidates,
    mean_loss,
    new_curve,
    steps_of,
)
from tuning.quality.result import QualityResult, make_result, overlay, table, write_result
from tuning.quality.search import Halving, rows_of
from tuning.quality.study import QualityStudy
from tuning.quality.supervisor import run_candidate
from tuning.studies import Studies
from tuning.trial import HeldOutLosses

OWN = Candidate(16, 2e-4, 8, 0)
EVALUATIONS = 9


def study(path: Path, slots: int = 1, rows: int = 1152, **settings: Any) -> QualityStudy:
    config = TuningConfig.model_validate({"trials": 40, **settings})
    candidates, _ = make_candidates(configured(), config.quality, rows, GPT_OSS_20B, None, config.seed)
    made = QualityStudy("H100", candidates, OWN, config, Journal(path, {"a": 1}, Curve), slots)
    made.begin()
    return made


def curve_of(candidate: Candidate, evaluations: int = EVALUATIONS, **fields: Any) -> Curve:
    found = []
    for number in range(1, evaluations + 1):
        losses = held_out_losses(candidate, number / EVALUATIONS)
        found.append(Evaluation(step=number, rows=128 * number, loss=mean_loss(0.0, losses), languages=losses))
    outcome = "measured" if evaluations == EVALUATIONS else "stopped"
    return new_curve(candidate, **{"outcome": outcome, "evaluations": found, "seconds": 1.0, **fields})


def run(one: QualityStudy, most: int = 100) -> list[Candidate]:
    """Trains what is asked for, under ASHA, as Tune would one after the other."""
    asking = Studies({"H100": one}, lambda *_: None)
    rule = Halving(asking, one, there=lambda: {"H100"}, grace_seconds=60)
    asked: list[Candidate] = []
    while len(asked) < most and (candidate := one.ask()) is not None:
        asked.append(candidate)
        trial: Any = SimpleNamespace(trial_id=str(len(asked)), config={"point": vars(candidate)})
        rule.on_trial_add(None, trial)
        reached = EVALUATIONS
        for evaluation, each in enumerate(curve_of(candidate).evaluations[:-1], start=1):
            result = {"evaluation": evaluation, "held_out_loss": each.loss, "partial": "{}"}
            if rule.on_trial_result(None, trial, result) == "STOP":
                reached = evaluation
                break
        one.tell(curve_of(candidate, reached))
    return asked


def test_candidates_lie_around_the_runs_own_which_is_the_first() -> None:
    found, refused = make_candidates(configured(), QualityConfig(), 1152, GPT_OSS_20B, GPUS["H100"].memory_bytes, 0)
    assert found[0] == baseline(configured()) == OWN
    assert {candidate.choice for candidate in found} == {
        (rows, rate, rank) for rows in (8, 16, 32) for rate in (6.7e-5, 2e-4, 6e-4) for rank in (4, 8, 16)
    }
    assert refused == []
    other, _ = make_candidates(configured(), QualityConfig(), 1152, GPT_OSS_20B, None, 1)
    assert set(other) == set(found)
    assert other[0] == OWN
    assert other != found


def test_what_cannot_be_trained_is_left_out_with_a_reason() -> None:
    settings = QualityConfig(global_batch_size=(16, 512), rank=(8, 4096), learning_rate=(2e-4,))
    found, refused = make_candidates(configured(), settings, 1152, GPT_OSS_20B, GPUS["H100"].memory_bytes, 0)
    assert found == [OWN]
    assert len(refused) == 3
    assert any("1152 rows are fewer than 9 of its steps" in reason for reason in refused)
    assert any("the GPU has 79.1 GiB: lower tuning.quality.rank" in reason for reason in refused)
    with pytest.raises(ConfigError, match=r"no candidate of tuning\.quality can be trained: .* fewer than 9"):
        make_candidates(configured(), QualityConfig(), 10, GPT_OSS_20B, None, 0)


def test_a_candidate_is_the_run_that_it_describes() -> None:
    run = Candidate(32, 6e-4, 16, 5).apply(configured(batch={"micro_batch_size": 4}))
    assert (run.global_batch_size, run.batch.micro_batch_size, run.accumulation) == (32, 4, 8)
    assert (run.optimizer.learning_rate, run.lora.rank, run.run.seed) == (6e-4, 16, 5)
    assert run.lora.alpha / run.lora.rank == configured().lora.alpha / configured().lora.rank
    rooted = Candidate(32, 6e-4, 16, 0).settings(configured(lora={"rslora": True}))
    assert rooted["alpha"] == pytest.approx(configured().lora.alpha * 2**0.5)


def test_steps_are_a_multiple_of_the_evaluations_whatever_the_batch() -> None:
    assert steps_of(OWN, 1152, 9) == (72, 8)
    assert steps_of(replace(OWN, global_batch_size=32), 1152, 9) == (36, 4)
    assert steps_of(replace(OWN, global_batch_size=128), 1152, 9) == (9, 1)
    assert rows_of(configured(run={"maximum_steps": 10}), 99) == 160
    assert rows_of(configured(run={"epochs": 1.5}), 99) == 149


def test_each_language_counts_alike() -> None:
    assert mean_loss(9.0, {"de": 1.0, "fr": 2.0}) == 1.5
    assert mean_loss(9.0, {}) == 9.0


def test_halving_finds_the_best_with_a_part_of_the_training(tmp_path: Path) -> None:
    one = study(tmp_path / "j.jsonl")
    asked = run(one)
    assert len(asked) == len(set(asked)) == 27 + 2
    choice = one.choice()
    assert choice is not None
    lowest = min(asked, key=lambda candidate: sum(held_out_losses(replace(candidate, seed=0), 1.0).values()))
    assert choice[0].where == lowest
    assert choice[0].where.choice == (32, 6e-4, 16)
    trained = sum(len(curve.evaluations) for curve in one.journal.trials)
    assert trained < 0.65 * EVALUATIONS * len(asked)
    own = [curve for curve in one.journal.trials if curve.where.choice == OWN.choice]
    assert [curve.outcome for curve in own] == ["measured"] * 3
    assert one.noise is not None
    assert f"seeds differ by {one.noise:.4f}" in choice[1]
    assert "the run's own settings came to" in choice[1]


def test_a_search_that_is_interrupted_knows_what_others_came_to(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole.jsonl")
    run(whole)
    run(study(tmp_path / "broken.jsonl"), most=11)
    rest = study(tmp_path / "broken.jsonl")
    run(rest)
    assert rest.journal.trials == whole.journal.trials
    assert rest.over == whole.over == "all candidates were tried"
    assert study(tmp_path / "whole.jsonl").ask() is None


def test_budgets_losses_and_a_lost_process(tmp_path: Path) -> None:
    one = study(tmp_path / "a.jsonl", slots=2, trials=3, retries=1)
    first, second = one.ask(), one.ask()
    assert first == OWN
    assert second is not None
    assert one.ask() is None  # both slots are taken
    one.tell(new_curve(first, outcome="died", reason="signal 9"))
    assert one.ask() == first
    one.tell(curve_of(first))
    one.tell(curve_of(second, 1))
    assert one.over == "3 trials, as many as tuning.trials allows"
    broken = study(tmp_path / "b.jsonl")
    for _ in range(3):
        where = broken.ask()
        assert where is not None
        broken.tell(new_curve(where, outcome="failed", reason="ValueError: no"))
    assert broken.over == "the first 3 trials failed, the last one because ValueError: no"
    assert broken.choice() is None
    timed = study(tmp_path / "c.jsonl", minutes=1.0)
    timed.tell(curve_of(OWN, seconds=61.0))
    assert timed.over == "1 minutes, as long as tuning.minutes allows"


def job() -> dict[str, Any]:
    config = load_files(TrainingConfig, "training/configs/demo.toml")
    one = config.model_copy(update={"workers": config.workers.model_copy(update={"count": 1})})
    usual = {"data": {}, "rows": 64, "evaluations": 2, "trial_seconds": 60.0, "limit_bytes": None}
    return {"config": one.model_dump(mode="json"), **usual}


@pytest.mark.parametrize(
    ("losses", "outcome", "reason"),
    [(("3.0", "2.0"), "measured", ""), (("3.0", "NaN"), "failed", "the held-out loss is nan after step 8")],
)
def test_what_a_process_says_becomes_a_curve(losses: tuple[str, str], outcome: str, reason: str) -> None:
    script = f"""
import json, os, sys, time
order = json.loads(sys.stdin.readline())
assert (order["steps"], order["every"], order["config"]["lora"]["rank"]) == (8, 4, 4)
def say(event):
    os.write(order["events"], json.dumps(dict(event, rank=0, peak_bytes=5)).encode() + b"\\n")
say(dict(event="begun", device="test"))
for step, loss in ((4, {losses[0]}), (8, float("{losses[1]}"))):
    say(dict(event="step", step=step, rows=step * 8, loss=loss, languages=dict(de=loss), trained=None))
say(dict(event="done"))
time.sleep(60)
"""
    reports: list[Curve] = []
    candidate = Candidate(8, 1e-3, 4, 0)
    curve = run_candidate(candidate, job(), reports.append, (sys.executable, "-c", script))
    assert (curve.outcome, curve.reason, curve.device, curve.peak_bytes) == (outcome, reason, "test", 5)
    assert [len(each.evaluations) for each in reports] == [1]
    assert reports[0].outcome == "stopped"
    assert curve.loss == (2.0 if outcome == "measured" else None)
    assert curve.where == candidate


def result(folder: Path) -> QualityResult:
    one = study(folder / "j.jsonl")
    run(one)
    machine = Machine("H100", 1, "NVIDIA H100 80GB HBM3", "580.1", 80 * GIB)
    return make_result(one, machine, configured(), "gpt-oss-20b", 1152, {"torch": "2.11.0"}, "python -m tuning", ["x"])


def test_the_overlay_is_a_configuration(tmp_path: Path) -> None:
    found = result(tmp_path)
    path = write_result(found, tmp_path / "profiles")
    assert path.name == "quality-gpt-oss-20b.json"
    assert QualityResult.model_validate_json(path.read_text(encoding="utf-8")) == found
    written = path.with_suffix(".toml").read_text(encoding="utf-8")
    assert written == overlay(found)
    assert tomllib.loads(written) == {
        "batch": {"global_batch_size": 32},
        "optimizer": {"learning_rate": 6e-4},
        "lora": {"rank": 16, "alpha": 32.0},
    }
    config = load_files(TrainingConfig, "training/configs/gpt-oss-20b.toml", path.with_suffix(".toml"))
    assert (config.global_batch_size, Conditions.of(config).rank) == (32, 16)


def test_table_and_page_show_curves_languages_and_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(tmp_path)
    assert found.languages == ["de", "fr"]
    lines = table(found).splitlines()
    assert lines[1].startswith("  chosen: 32 rows, rate 0.0006, rank 16: the lowest held-out loss, 1.1")
    assert lines[3].startswith("  32 rows, rate 0.0006, rank 16 ")
    assert " · fr 1.2" in lines[3]
    html = render([throughput(), found])
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.references == []
    assert html.count('role="img"') == 3 + 2
    assert f"{found.noise:.4f} nats, standard deviation between seeds" in html
    assert "<td>fr</td>" in html
    write_result(found, tmp_path / "found")
    assert main(["report", str(tmp_path / "found"), "--html", str(tmp_path / "page.html")]) == 0
    assert "quality of gpt-oss-20b" in capsys.readouterr().out
    assert "What searches found" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metric", "loss", "languages"),
    [
        ("eval_loss", 1.5, {"de": 1.0, "fr": 2.0}),
        ("eval_loss_fr", 2.0, {}),
        ("eval_adherence", 0.25, {"de": 0.0, "fr": 0.5}),
    ],
)
def test_a_trial_says_what_its_run_is_judged_by(metric: str, loss: float, languages: dict[str, float]) -> None:
    """Of a share what it lacks of 1, so that less is better of all."""
    said: list[dict[str, Any]] = []
    losses = HeldOutLosses(SimpleNamespace(), 100, 8, metric, said.append)  # type: ignore[arg-type]
    logs = {"eval_loss": 1.5, "eval_loss_de": 1.0, "eval_loss_fr": 2.0}
    logs |= {"eval_adherence": 0.75, "eval_adherence_de": 1.0, "eval_adherence_fr": 0.5, "eval_complete": 0.9}
    losses.on_log(None, SimpleNamespace(global_step=4), None, logs=logs)  # type: ignore[arg-type]
    assert (said[0]["loss"], said[0]["languages"]) == (loss, languages)
    losses.on_log(None, SimpleNamespace(global_step=5), None, logs={"loss": 3.0})  # type: ignore[arg-type]
    assert len(said) == 1
