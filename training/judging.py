"""By which figure of an evaluation a run is judged: its best checkpoint, and when it has stopped to improve."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cluster.config import ConfigError
from training.sections import RISING, RunConfig

History = Sequence[Mapping[str, Any]]
"""lines of transformers' log"""


def is_better(metric: str, value: float, other: float, by: float = 0.0) -> bool:
    """Whether a value of the metric is better than another by more than `by`."""
    return value - other > by if re.fullmatch(RISING, metric) else other - value > by


def as_loss(metric: str, value: float) -> float:
    """The metric's value as something of which less is better: of a share, what it lacks of 1."""
    return 1 - value if re.fullmatch(RISING, metric) else value


class Judge(TrainerCallback):
    """Ends a run, with a checkpoint, once its metric has not improved for a number of evaluations.

    Where a run may end so, or exports its best checkpoint, every evaluation that is the best so far is saved: between
    two checkpoints it would be lost.

    What it goes by is the log, which a run takes up with its checkpoint: one that was killed ends where it would have.

    Args:
        run: of the configuration: `best_metric`, `patience`, `minimum_improvement`, `keep_best` and `export`.
        languages: tags of those whose held-out loss is measured.
        answers: figures of the model's own answers, as `training.answering.Answering` names them.

    Raises:
        ConfigError: `best_metric` is none of what an evaluation measures.
    """

    def __init__(self, run: RunConfig, languages: Iterable[str] = (), answers: Iterable[str] = ()) -> None:
        self.run = run
        self.saves_best = run.keep_best and (run.patience is not None or run.export == "best")
        measured = ["loss", *(f"loss_{tag}" for tag in languages), *answers]
        if run.best_metric.removeprefix("eval_") not in measured:
            known = ", ".join(f"eval_{name}" for name in sorted(measured))
            raise ConfigError(f"run.best_metric = '{run.best_metric}' is not measured: there are {known}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Look at the evaluation, which is in the log already."""
        if self.saves_best and self._since_best(state.log_history)[0] == 0:
            control.should_save = True
        if self.is_over(state.log_history) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"stopping  at step {state.global_step}: {self._reason(state.log_history)}", flush=True)

    def is_over(self, history: History) -> bool:
        """Whether patience has come to its end."""
        patience = self.run.patience
        return patience is not None and self._since_best(history, self.run.minimum_improvement)[0] >= patience

    def _reason(self, history: History) -> str:
        since, step, best = self._since_best(history, self.run.minimum_improvement)
        return f"{self.run.best_metric} has not improved for {since} evaluations, since its {best:.4f} of step {step}"

    def _since_best(self, history: History, by: float = 0.0) -> tuple[int, int, float]:
        """Evaluations since the last that was better by more than `by`, its step and its value."""
        metric = self.run.best_metric
        values = {int(line["step"]): float(line[metric]) for line in history if metric in line}
        since, step, best = 0, 0, math.nan
        for at, value in values.items():
            if math.isnan(best) or is_better(metric, value, best, by):
                since, step, best = 0, at, value
            else:
                since += 1
        return since, step, best
