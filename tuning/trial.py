"""A trial: real training steps by the run's own worker code, in a process of its own.

    python -m tuning.trial < ORDER

The order is a line of JSON. What happens is written as lines of JSON to the file descriptor that the order names:
`begun`, a `step` for each optimizer step or, of a trial for quality, each evaluation, and at the end `done`,
`out_of_memory` or `error`. All that is printed goes
to standard error. The process ends with its parent: it waits for the end of its standard input, which holds as long as
the parent does. Of several workers each is such a process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from cluster.model import ModelShape
from training.config import TrainingConfig
from training.data.heldout import with_languages
from training.data.prepare import Prepared
from training.data.shards import read_shards
from training.durable import DurableTrainer
from training.finder import is_out_of_memory
from training.judging import as_loss
from training.keeping import Keeper
from training.modeling.engine import build_model
from training.modeling.expert_parallel import ExpertShare
from training.modeling.loading import checkpoint_folder
from training.modeling.sharding import sharding_mesh
from training.scratch import scratch_folder
from training.strategy import choose_strategy
from training.throughput import Meter, flops_per_token
from training.worker import make_trainer, quiet_libraries

ENDLESS = 1_000_000
"""steps of the run that a trial is the beginning of: it never reaches the last one, which would be saved"""
Say = Callable[[dict[str, Any]], None]


class Measured(Exception):  # noqa: N818
    """The steps are done. Unwinds the trainer, whose own end would judge adapters of so short a run."""


class StepTimes(TrainerCallback):
    """Says what each step took, and ends the training after the last one.

    Args:
        meter: that the trainer asks for figures; it is started and stopped here.
        steps: in all, warm-up and measured ones.
        say: takes each event.
    """

    def __init__(self, meter: Meter, steps: int, say: Say) -> None:
        self.meter, self.steps, self.say = meter, steps, say

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.meter.start(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "tokens_per_second" not in logs:
            return
        self.say(
            {
                "event": "step",
                "step": state.global_step,
                "seconds": logs["step_seconds"],
                "tokens_per_second": logs["tokens_per_second"],
                "peak_bytes": round(logs["memory_gib"] * 2**30),
                "loss": logs.get("loss"),
            }
        )
        if state.global_step >= self.steps:
            self.meter.stop()
            raise Measured


class HeldOutLosses(TrainerCallback):
    """Says the held-out losses of each evaluation, and ends the training after the last one, before it is saved.

    Args:
        meter: as of StepTimes.
        steps: of the run.
        rows: of each step.
        metric: what the run is judged by, in place of the loss where it is another.
        say: takes each event.
    """

    def __init__(self, meter: Meter, steps: int, rows: int, metric: str, say: Say) -> None:
        self.meter, self.steps, self.rows, self.metric, self.say = meter, steps, rows, metric, say
        self.trained: float | None = None
        self.peak_gib = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.meter.start(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        self.trained = logs.get("loss", self.trained)
        self.peak_gib = max(self.peak_gib, logs.get("memory_gib", 0.0))
        if self.metric not in logs:
            return
        prefix = f"{self.metric}_"
        of_language = {name: as_loss(self.metric, logs[name]) for name in logs if name.startswith(prefix)}
        self.say(
            {
                "event": "step",
                "step": state.global_step,
                "rows": state.global_step * self.rows,
                "loss": as_loss(self.metric, logs[self.metric]),
                "languages": {name.removeprefix(prefix): value for name, value in of_language.items()},
                "trained": self.trained,
                "peak_bytes": round(self.peak_gib * 2**30),
            }
        )
        if state.global_step >= self.steps:
            self.meter.stop()
            raise Measured


def run_steps(order: dict[str, Any], say: Say) -> None:
    """Train as many steps as `order` says, from the beginning of the run that it holds.

    Args:
        order: `config` and `data` as a worker gets them, `steps`, `rank` and `local_rank`, `workers_per_node`, and
            `limit_bytes` of a CPU or None.
        say: takes each event.

    Raises:
        Whatever the worker's code raises.
    """
    config = _endless(TrainingConfig.model_validate(order["config"]))
    with _set_up(config, order, say) as (scratch, make, meter):
        rows = whole_steps(read_shards(order["data"]["train"], scratch), config.global_batch_size)
        trainer = make(rows, None, StepTimes(meter, order["steps"], say))
        with suppress(Measured):
            trainer.train()


def run_training(order: dict[str, Any], say: Say) -> None:
    """Train a run of `order["steps"]` steps to its end, and say its held-out losses after every `order["every"]`.

    Args:
        order: as of `run_steps`, whose `data` has `evaluation` too; `steps` is a multiple of `every`.
        say: takes each event.

    Raises:
        Whatever the worker's code raises.
    """
    config = _evaluated(TrainingConfig.model_validate(order["config"]), order["steps"], order["every"])
    with _set_up(config, order, say) as (scratch, make, meter):
        train, heldout = (read_shards(order["data"][name], scratch) for name in ("train", "evaluation"))
        trainer = make(
            train, heldout, HeldOutLosses(meter, order["steps"], config.global_batch_size, config.run.best_metric, say)
        )
        with suppress(Measured):
            trainer.train()


Make = Callable[[Dataset, Dataset | None, TrainerCallback], DurableTrainer]


@contextmanager
def _set_up(config: TrainingConfig, order: dict[str, Any], say: Say) -> Iterator[tuple[Path, Make, Meter]]:
    """The run's model on this worker's device: a scratch folder, what makes its trainer, and the meter of that."""
    device = _device(config, order["local_rank"])
    set_seed(config.run.seed)
    base = checkpoint_folder(config.model.path)
    shape = ModelShape.from_folder(base)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    strategy = choose_strategy(config, shape, order["workers_per_node"], memory)
    mesh = sharding_mesh(device, strategy.shards) if strategy.shards > 1 else None
    share = ExpertShare.of_all_workers() if strategy.expert_workers > 1 else None
    with scratch_folder() as scratch:
        config = config.model_copy(update={"run": config.run.model_copy(update={"storage": str(scratch)})})
        model = build_model(config, device, strategy.checkpointing, mesh, share)
        counts = Prepared.model_validate(order["data"]["prepared"]).counts
        meter = Meter(device, flops_per_token(config, shape, counts), None)
        say({"event": "begun", "device": _name(device)})

        def make(train: Dataset, heldout: Dataset | None, callback: TrainerCallback) -> DurableTrainer:
            evaluation = None if heldout is None else with_languages(heldout, base)
            return make_trainer(
                config, base, model, train, evaluation, Keeper(config, scratch), meter, scratch, [callback]
            )

        yield scratch, make, meter


def whole_steps(rows: Dataset, rows_of_step: int) -> Dataset:
    """Rows for whole optimizer steps: repeated where there are fewer than one step has, else some are left out."""
    if len(rows) < rows_of_step:
        rows = concatenate_datasets([rows] * -(-rows_of_step // len(rows)))
    return rows.select(range(len(rows) // rows_of_step * rows_of_step))


def limit_memory(limit_bytes: int) -> None:
    """From now on allow this process so many more bytes than it has: what a CPU has for a wall."""
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit_bytes, resource.RLIM_INFINITY))


def _endless(config: TrainingConfig) -> TrainingConfig:
    """The run, without end, that says each step and keeps nothing."""
    changed = {"maximum_steps": ENDLESS, "logging_steps": 1, "saving_steps": ENDLESS, "tracker": "none"}
    run = config.run.model_copy(update=changed)
    data = config.data.model_copy(update={"evaluation": None})
    return config.model_copy(update={"run": run, "data": data})


def _evaluated(config: TrainingConfig, steps: int, every: int) -> TrainingConfig:
    """The run of so many steps that evaluates and keeps nothing."""
    changed = {"maximum_steps": steps, "evaluation_steps": every, "logging_steps": 1, "saving_steps": ENDLESS}
    run = config.run.model_copy(update=changed | {"tracker": "none", "export": "last", "patience": None})
    return config.model_copy(update={"run": run})


def _device(config: TrainingConfig, local_rank: int) -> torch.device:
    """This worker's device; the process group is joined, as Ray Train does for a run's workers, also for a single one:
    data parallelism then wraps the model as it does there."""
    if config.workers.gpus:
        device = torch.device("cuda", local_rank * config.workers.gpus)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(config.workers.cpus)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    torch.distributed.init_process_group("nccl" if config.workers.gpus else "gloo")
    return device


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _end_with_parent() -> None:
    """End this process when its standard input does, wherever it is."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> int:
    """Do what the first line of standard input says; returns the exit code."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            return 1
        line += piece
    order = json.loads(line)
    _end_with_parent()
    os.dup2(2, 1)  # whatever libraries print
    began = time.monotonic()

    def say(event: dict[str, Any]) -> None:
        text = json.dumps({**event, "rank": order["rank"], "since": time.monotonic() - began})
        os.write(order["events"], text.encode() + b"\n")

    quiet_libraries()
    try:
        if order["limit_bytes"] is not None:
            limit_memory(order["limit_bytes"])
        (run_training if "every" in order else run_steps)(order, say)
    except Exception as error:
        if is_out_of_memory(error):
            say({"event": "out_of_memory", "reason": str(error).splitlines()[0][:300]})
            os._exit(0)  # nothing that is left could be freed in order
        say({"event": "error", "reason": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:1000]})
        return 1
    say({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
