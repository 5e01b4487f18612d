"""Two Ray Train workers that log as a trainer does, without a model: what reaches Ray from `training.progress`.

`python -m tests.training.reporting FOLDER`, on a running Ray, leaves `reports.json` and `gauges.txt` in FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import ray
import ray.train
import torch
from ray.train import LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from transformers import TrainerControl, TrainerState, TrainingArguments

from training.progress import REPORT_SECONDS, Metrics
from training.throughput import Meter

LINES = 5
SCRAPE_SECONDS = 40.0


class Clock:
    """Each reading is so much later that every line is due for a report."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += REPORT_SECONDS
        return self.now


class Keeps(UserCallback):
    """Writes down what each report brought from every worker."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: list[list[dict[str, Any]]] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        assert checkpoint is None
        self.found.append(metrics)
        self.file.write_text(json.dumps(self.found), encoding="utf-8")


def log_lines(raw: dict[str, Any]) -> None:
    """What a worker does: so many lines, the time they took, and on rank 0 what Prometheus would read."""
    rank = ray.train.get_context().get_world_rank()
    callback = Metrics(Meter(torch.device("cpu"), 1.0, None, Clock()), "reporting", rank)
    arguments, state, control = object.__new__(TrainingArguments), TrainerState(max_steps=LINES), TrainerControl()
    callback.on_train_begin(arguments, state, control)
    began = time.monotonic()
    for step in range(1, LINES + 1):
        state.global_step = step
        logs = {"loss": float(step), "seconds": time.monotonic() - began, **callback.meter.figures(10, step)}
        callback.on_log(arguments, state, control, logs=logs)
    if rank == 0:
        (Path(raw["folder"]) / "gauges.txt").write_text("\n".join(scrape()), encoding="utf-8")
    torch.distributed.barrier()
    callback.on_train_end(arguments, state, control)


def scrape() -> list[str]:
    """The training gauges at the node's metrics port, once those of both workers are there."""
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    end, found = time.monotonic() + SCRAPE_SECONDS, [""]
    while time.monotonic() < end and not all(f'rank="{rank}"' in " ".join(found) for rank in (0, 1)):
        time.sleep(0.5)
        found = [line for line in httpx.get(url).text.splitlines() if line.startswith("ray_raysoner_training_")]
    return found


def main(folder: Path) -> None:
    """Run both workers."""
    TorchTrainer(
        log_lines,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="reporting",
            storage_path=str(folder),
            callbacks=[Keeps(folder / "reports.json")],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    ).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
