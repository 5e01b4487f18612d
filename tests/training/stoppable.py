"""A run for the tests of stopping: two workers that count, and save their count when they agree to stop.

    python -m tests.training.stoppable FOLDER [--steps N] [--workers N] [--deaf]

Each worker appends what it does to FOLDER/RANK.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from training.stopping import Wish, leave, stopping_by_signal, wish

STEP_SECONDS = 0.05


def train(raw: dict[str, Any]) -> dict[str, Any]:
    """Count from the last checkpoint's step; returns whether the count was finished."""
    rank = ray.train.get_context().get_world_rank()
    checkpoint = ray.train.get_checkpoint()
    first = 0
    if checkpoint:
        with checkpoint.as_directory() as folder:
            first = int((Path(folder) / "step").read_text())
    with (Path(raw["folder"]) / f"{rank}.jsonl").open("a", buffering=1) as events:

        def write(event: str, step: int, **more: Any) -> None:
            events.write(
                json.dumps({"event": event, "step": step, "time": time.time(), "pid": os.getpid(), **more}) + "\n"
            )

        write("start", first)
        for step in range(first + 1, raw["steps"] + 1):
            time.sleep(STEP_SECONDS)
            agreed = torch.tensor(Wish.NONE if raw["deaf"] else wish())
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            write("step", step)
            if agreed:
                save(step)
                write("stop", step, wish=Wish(int(agreed)).name)
                leave(Wish(int(agreed)), step)
                return {"finished": False}
    return {"finished": True}


def save(step: int) -> None:
    """Save the step and wait until Ray has committed it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "step").write_text(str(step))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    ray.train.get_all_reported_checkpoints()


def main(arguments: list[str]) -> int:
    """Run, as the driver would; no failure is forgiven but a preemption."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deaf", action="store_true", help="the workers go on, whatever is wished")
    flags = parser.parse_args(arguments)
    ray.init(log_to_driver=False, logging_level="WARNING")
    with stopping_by_signal() as stop:
        trainer = TorchTrainer(
            train,
            train_loop_config=vars(flags),
            scaling_config=ScalingConfig(num_workers=flags.workers, placement_strategy="SPREAD"),
            run_config=RunConfig(
                name="counting",
                storage_path=flags.folder,
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="WARNING"),
                callbacks=[stop.callback],
            ),
        )
        print("fitting", flush=True)
        result = stop.run(trainer.fit)
    print(f"asked {stop.asked}, finished {result.return_value['finished']}", flush=True)
    return stop.exit_code if stop.asked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
