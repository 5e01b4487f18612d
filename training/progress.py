"""What a run says about itself: the line in the log, the gauges of Ray, the reports to Ray Train."""

from __future__ import annotations

import math
import time
from typing import Any

import ray.train
from ray.train import CheckpointUploadMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cluster.metrics import TRAINING, TRAINING_METRICS, Gauges
from training.throughput import Meter

BAR_WIDTH = 20
NOTABLE_WAIT = 0.1
"""share of the time spent waiting for data from which on the progress line says so"""

REPORT_SECONDS = 5.0
"""training time between two reports; Ray Train's controller takes one from each worker every two seconds"""

OF_LANGUAGE = "eval_loss_"
"""before the tag of a language in transformers' log: its held-out loss"""

RENAMED = {
    "eval_loss": "evaluation_loss",
    "eval_adherence": "evaluation_adherence",
    "eval_complete": "evaluation_complete",
    "eval_right": "evaluation_right",
    "grad_norm": "gradient_norm",
}
"""gauges whose names are not those of transformers' log"""


class Metrics(TrainerCallback):
    """Sends what the trainer logs to Ray: each line as gauges, and to Ray Train as reports.

    Of rank 0 come the gauges of the run, of every rank its own memory and data wait. The trainer puts the meter's
    figures into its log, from where TensorBoard has them too.

    A report is a barrier over all workers, so whether one is due follows from what is the same on all: the training
    time. It is handed over by Ray Train's upload thread, behind any checkpoint that is still on its way, so training
    waits neither for that nor for the controller.

    Args:
        meter: that the trainer asks for figures; it is started and stopped here.
        run: name of the run.
        rank: of this worker in the world.
    """

    def __init__(self, meter: Meter, run: str, rank: int) -> None:
        self.meter = meter
        self.tags = {"run": run, "rank": str(rank)}
        self.leads = rank == 0
        self.gauges: Gauges | None = None
        self.latest: dict[str, float] = {}
        """newest value of everything that was logged, by the log's names"""
        self.reported = -math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gauges = Gauges(TRAINING, TRAINING_METRICS, self.tags)
        self.meter.start(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        assert self.gauges is not None
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        numbers["step"] = float(state.global_step)
        self.latest |= numbers
        named = {RENAMED.get(name, name): value for name, value in numbers.items()}
        of_run = {name: value for name, value in named.items() if name in TRAINING_METRICS}
        self.gauges.set({**(of_run if self.leads else {}), **self.meter.own})
        if self.meter.training_seconds - self.reported >= REPORT_SECONDS:
            self.reported = self.meter.training_seconds
            ray.train.report(
                {**self.latest, "step": state.global_step}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.gauges is not None
        self.meter.stop()
        self.gauges.close()


class Progress(TrainerCallback):
    """One line at each log: a bar, the loss, the speed and memory that the trainer logged, and the time left."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        """of the last line of training; a line of evaluation has none of its own"""
        self.since, self.step, self.warm = 0.0, 0, False
        self.step_seconds: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.since, self.step, self.warm = time.perf_counter(), state.global_step, False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.figures |= {name: logs[name] for name in logs if name in TRAINING_METRICS}
        named = {"loss": "loss", "eval_loss": "held-out loss"}
        parts = [f"{title} {float(logs[key]):.4f}" for key, title in named.items() if key in logs]
        if parts:
            parts += (
                _by_language(logs)
                + _answered(logs)
                + _speed(self.figures)
                + self._time_left(state)
                + _limits(self.figures)
            )
            print(f"{_bar(state.global_step, state.max_steps)} {', '.join(parts)}", flush=True)

    def _time_left(self, state: TrainerState) -> list[str]:
        """From all that took time since the first line; for that one since the start, compilation and all."""
        now, step = time.perf_counter(), state.global_step
        if step > self.step:
            self.step_seconds = (now - self.since) / (step - self.step)
            if not self.warm:
                self.since, self.step, self.warm = now, step, True
        if self.step_seconds is None:
            return []
        left = self.step_seconds * (state.max_steps - step)
        return [f"{int(left // 60)}:{int(left % 60):02} left"]


def _by_language(logs: dict[str, float]) -> list[str]:
    """The held-out loss of each language, in a line of evaluation, like `de 1.32 · fr 1.28`."""
    named = {name.removeprefix(OF_LANGUAGE): logs[name] for name in sorted(logs) if name.startswith(OF_LANGUAGE)}
    return [" · ".join(f"{tag} {loss:.4f}" for tag, loss in named.items())] if named else []


def _answered(logs: dict[str, float]) -> list[str]:
    """What came of the held-out questions that the model answered, like `92% think as asked`."""
    titles = {"eval_adherence": "think as asked", "eval_complete": "whole", "eval_right": "right"}
    return [f"{float(logs[name]):.0%} {title}" for name, title in titles.items() if name in logs]


def _speed(figures: dict[str, float]) -> list[str]:
    if "tokens_per_second" not in figures:
        return []
    return [f"{figures['tokens_per_second']:,.0f} tokens/s", f"{figures['memory_gib']:.1f} GiB"]


def _limits(figures: dict[str, float]) -> list[str]:
    peak = [f"{figures['mfu']:.0%} of peak"] if "mfu" in figures else []
    waits = figures.get("data_wait", 0.0)
    return peak + ([f"waiting for data {waits:.0%}"] if waits > NOTABLE_WAIT else [])


def _bar(step: int, steps: int) -> str:
    filled = BAR_WIDTH * step // max(1, steps)
    return f"step {step}/{steps} [{'█' * filled}{'·' * (BAR_WIDTH - filled)}]"
