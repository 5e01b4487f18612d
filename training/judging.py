"""By which figure of an evaluation a run is judged: its best checkpoint, and when it has stopped to improve."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.guards import TrainingStopped
from training.sections import METRICS, RISING, RunConfig

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

    What it goes by is the log, which a run takes up with its checkpoint: one that was killed ends where it would have.

    Args:
        run: of the configuration: `best_metric`, `patience` and `minimum_improvement`.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Look at the evaluation.

        Raises:
            TrainingStopped: it has no such metric.
        """
        metric = self.run.best_metric
        if metric not in (metrics or {}):
            known = sorted(name for name in metrics or {} if re.fullmatch(METRICS, name))
            raise TrainingStopped(f"run.best_metric = '{metric}' is not measured: there are {', '.join(known)}")
        if self.is_over(state.log_history) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"stopping  at step {state.global_step}: {self._reason(state.log_history)}", flush=True)

    def is_over(self, history: History) -> bool:
        """Whether patience has come to its end."""
        patience = self.run.patience
        return patience is not None and self._since_best(history)[0] >= patience

    def _reason(self, history: History) -> str:
        since, step, best = self._since_best(history)
        return f"{self.run.best_metric} has not improved for {since} evaluations, since its {best:.4f} of step {step}"

    def _since_best(self, history: History) -> tuple[int, int, float]:
        """Evaluations since the best, its step and its value."""
        metric, by = self.run.best_metric, self.run.minimum_improvement
        values = {int(line["step"]): float(line[metric]) for line in history if metric in line}
        since, step, best = 0, 0, math.nan
        for at, value in values.items():
            if math.isnan(best) or is_better(metric, value, best, by):
                since, step, best = 0, at, value
            else:
                since += 1
        return since, step, best
