"""What a run is judged by: its best checkpoint, and when it has stopped to improve."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainerControl

from cluster.config import ConfigError
from cluster.storage import Storage
from tests.training.checkpointing import new_run
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig
from training.judging import Judge, as_loss, is_better
from training.sections import RunConfig

HELD_OUT = "training/demo/data/train.jsonl"


def evaluated(judge: Judge, *values: float, metric: str = "eval_loss", last: int = 1000) -> tuple[TrainerControl, int]:
    """What the trainer is told after so many evaluations, one every ten steps, and how many it took."""
    control, history = TrainerControl(), []
    for number, value in enumerate(values, start=1):
        history.append({"step": 10 * number, metric: value})
        state: Any = SimpleNamespace(
            log_history=history, global_step=10 * number, max_steps=last, is_world_process_zero=True
        )
        judge.on_evaluate(None, state, control, metrics={metric: value})  # type: ignore[arg-type]
        if control.should_training_stop:
            break
    return control, len(history)


def test_more_of_a_share_is_better_and_less_of_a_loss() -> None:
    assert is_better("eval_loss", 1.0, 1.1)
    assert is_better("eval_loss_fr", 1.0, 1.1)
    assert not is_better("eval_loss", 1.0, 1.1, by=0.2)
    assert is_better("eval_adherence", 0.9, 0.8)
    assert is_better("eval_adherence_pt-BR", 0.9, 0.8)
    assert not is_better("eval_right", 0.8, 0.8)
    assert (as_loss("eval_loss_de", 1.5), as_loss("eval_complete", 0.75)) == (1.5, 0.25)


def test_a_run_ends_with_a_checkpoint_once_it_has_not_improved_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    control, taken = evaluated(Judge(RunConfig(patience=2)), 3.0, 2.0, 2.1, 1.9, 1.95, 1.91, 1.8)
    assert taken == 6
    assert control.should_save
    assert capsys.readouterr().out == (
        "stopping  at step 60: eval_loss has not improved for 2 evaluations, since its 1.9000 of step 40\n"
    )
    rising = RunConfig(patience=2, best_metric="eval_right", evaluation_answers=8)
    assert evaluated(Judge(rising, answers=["right"]), 0.1, 0.2, 0.3, 0.3, 0.3, metric="eval_right")[1] == 5
    little = RunConfig(patience=2, minimum_improvement=0.1)
    assert evaluated(Judge(little), 3.0, 2.95, 2.92, 2.91)[1] == 3
    assert evaluated(Judge(RunConfig()), 3.0, 4.0, 5.0, 6.0)[1] == 4
    assert not evaluated(Judge(RunConfig(patience=1)), 3.0, 4.0, last=20)[0].should_training_stop, "it ends anyway"


def test_a_run_that_was_killed_decides_as_it_would_have() -> None:
    """By the log alone: an evaluation that is done again after a kill counts once."""
    judge = Judge(RunConfig(patience=2))
    history = [{"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 1.1}, {"step": 20, "eval_loss": 1.1}]
    assert not judge.is_over(history)
    assert judge.is_over([*history, {"step": 25, "loss": 2.0}, {"step": 30, "eval_loss": 1.2}])


def test_a_metric_that_is_not_measured_is_told_with_those_that_are() -> None:
    said = r"run.best_metric = 'eval_loss_ko' is not measured: there are eval_complete, eval_loss, eval_loss_fr$"
    with pytest.raises(ConfigError, match=said):
        Judge(RunConfig(best_metric="eval_loss_ko"), ["fr"], ["complete"])
    with pytest.raises(ConfigError, match="'eval_right' is not measured"):
        Judge(RunConfig(best_metric="eval_right"), ["fr"], ["complete"])
    Judge(RunConfig(best_metric="eval_loss_fr"), ["fr"])


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({}, []),
        ({"patience": 9}, [10, 20, 40]),
        ({"patience": 9, "minimum_improvement": 9.0}, [10, 20, 40]),
        ({"export": "best"}, [10, 20, 40]),
        ({"patience": 9, "keep_best": False}, []),
    ],
)
def test_an_evaluation_that_is_the_best_so_far_is_saved_where_it_counts(
    settings: dict[str, Any], saved: list[int]
) -> None:
    judge, history, found = Judge(RunConfig(**settings)), [], []
    for step, loss in zip((10, 20, 30, 40), (3.0, 2.0, 2.5, 1.9), strict=True):
        history.append({"step": step, "eval_loss": loss})
        control, state = TrainerControl(), SimpleNamespace(log_history=history, global_step=step, max_steps=1000)
        judge.on_evaluate(None, state, control)  # type: ignore[arg-type]
        found += [step] * control.should_save
    assert found == saved


@pytest.mark.parametrize(
    ("run", "data", "said"),
    [
        ({"patience": 3}, {}, "run.patience needs data.evaluation"),
        ({"evaluation_answers": 3}, {}, "run.evaluation_answers needs data.evaluation"),
        ({"best_metric": "eval_loss_fr"}, {}, "run.best_metric = 'eval_loss_fr' needs data.evaluation"),
        (
            {"best_metric": "eval_adherence"},
            {"evaluation": HELD_OUT},
            "a figure of the model's own answers: set run.evaluation_answers",
        ),
        ({"best_metric": "bleu"}, {"evaluation": HELD_OUT}, "String should match pattern"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: dict[str, Any], data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainingConfig.model_validate({"model": {"path": "a/b"}, "run": run, "data": data})


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 20), ("eval_right", 10), ("eval_loss_fr", 30)])
def test_the_best_checkpoint_is_the_metric_s(metric: str, best: int, tmp_path: Path) -> None:
    store = CheckpointStore(Storage.at(str(tmp_path)), keep_last=1, metric=metric)
    figures = {
        10: {"eval_loss": 1.0, "eval_right": 0.9, "eval_loss_fr": 3.0},
        20: {"eval_loss": 0.5, "eval_right": 0.8, "eval_loss_fr": 2.0},
        30: {"eval_loss": 0.7, "eval_right": 0.9, "eval_loss_fr": 1.0},
    }
    run = new_run()
    run.step()
    snapshot = run.snapshot()
    for step, metrics in figures.items():
        store.write(dataclasses.replace(snapshot, step=step, metrics=metrics))
    found = store.best()
    assert found is not None
    assert found.step == best
    store.prune()
    assert store.steps() == sorted({best, 30})
