"""Row of `distributed` about data parallelism, on CPU, and the trainer that it and `distributed_checkpoints` run.

What is compared takes turns of a few steps each, so that whatever else the machine does weighs on all alike, and each
ratio is of turns that follow one another.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.multiprocessing.spawn import spawn
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from cluster.harmony import CHANNEL_LABELS
from cluster.local import free_ports
from tests.benchmarks.train_step import DEMO
from training.arguments import row_multiple, trainer_arguments
from training.config import TrainingConfig
from training.data.collator import Collator
from training.durable import DurableTrainer
from training.keeping import Keeper
from training.modeling.engine import build_model
from training.throughput import Meter

CPU = torch.device("cpu")
SEED = 0
NEVER = 10**9


def data_parallel(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of two workers on a core each, and of one worker on one core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("data_parallel needs two cores, and this process may use one")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raysoner-") as folder:
        spawn(_worker, (options, cores, free_ports(1)[0], context.Barrier(3), folder), nprocs=3)
        found = [json.loads((Path(folder) / f"{worker}.json").read_text()) for worker in (0, 1)]
    alone, pair = (each["seconds"] for each in found)
    busy = [median(each["busy_seconds"]) / options.turn_steps for each in found]
    tokens = options.turn_steps * options.rows_of_worker * options.sequence_length
    ratios = [2 * own / both for own, both in zip(alone, pair, strict=True)]
    return {
        "one_worker_tokens_per_second": round(tokens / median(alone), 1),
        "two_workers_tokens_per_second": round(2 * tokens / median(pair), 1),
        "tokens_ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "one_worker_step_seconds": round(median(alone) / options.turn_steps, 4),
        "two_workers_step_seconds": round(median(pair) / options.turn_steps, 4),
        "one_worker_busy_seconds": round(busy[0], 4),
        "two_workers_busy_seconds": round(busy[1], 4),
        "rows_of_worker": options.rows_of_worker,
        "sequence_length": options.sequence_length,
        "turns": len(ratios),
        "steps_of_turn": options.turn_steps,
    }


def _worker(number: int, options: argparse.Namespace, cores: list[int], port: int, barrier: Any, folder: str) -> None:
    """Process 0 is the one worker, 1 and 2 are the two."""
    os.sched_setaffinity(0, {cores[number == 2]})
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # as on Ray; without it accelerate sets the threads to the machine's cores
    workers = 1 if number == 0 else 2
    if workers == 2:
        rank = number - 1
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        dist.init_process_group("gloo")
    turns = Turns(options.turn_steps, barrier, first=number == 0)
    steps = options.turn_steps * (options.turns + 1)
    trainer = make_trainer(options, workers, steps, Path(folder) / f"scratch{number}", DurableTrainer, [turns])
    with trainer.keeper:
        trainer.train_from(None, Path(folder))
    measured = {"seconds": turns.seconds[1:], "busy_seconds": turns.busy_seconds[1:]}  # the first is a warm-up
    (Path(folder) / f"{number}.json").write_text(json.dumps(measured))
    if workers == 2:
        dist.destroy_process_group()


class Turns(TrainerCallback):
    """Trains `steps` at a time, in turn with the processes on the other side of `barrier`.

    Of each turn `seconds` on the clock and `busy_seconds` of this process's CPU time, which on a machine with nothing
    else to do are nearly the same. A round has two turns, and all processes meet before each of them.
    """

    def __init__(self, steps: int, barrier: Any, *, first: bool) -> None:
        self.steps, self.barrier, self.first = steps, barrier, first
        self.seconds: list[float] = []
        self.busy_seconds: list[float] = []
        self._began = self._busy = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step % self.steps == 0:
            for _ in range(1 if self.first else 2):
                self.barrier.wait(600)
            self._began, self._busy = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step % self.steps == 0:
            self.seconds.append(time.perf_counter() - self._began)
            self.busy_seconds.append(time.process_time() - self._busy)
            if self.first:
                self.barrier.wait(600)
            print(f"turn {len(self.seconds)}: {self.seconds[-1]:.2f} s, busy {self.busy_seconds[-1]:.2f} s", flush=True)


def make_trainer(
    options: argparse.Namespace,
    workers: int,
    steps: int,
    scratch: Path,
    kind: Callable[..., Any],
    callbacks: list[TrainerCallback],
) -> Any:
    """The trainer as a worker sets it up, on rows of random tokens, of which each worker takes the same in a step."""
    scratch.mkdir(exist_ok=True)
    rows = options.rows_of_worker
    config = TrainingConfig.model_validate(
        {
            "model": {"path": DEMO, "precision": "fp32"},
            "data": {"sequence_length": options.sequence_length},
            "batch": {"micro_batch_size": rows, "accumulation_steps": 1},
            "workers": {"count": workers, "gpus": 0},
            "run": {"storage": str(scratch), "maximum_steps": steps, "saving_steps": NEVER, "tracker": "none"},
        }
    )
    torch.manual_seed(SEED)
    keeper = Keeper(config, scratch)
    keeper.find(Path(DEMO), "random")
    meter = Meter(CPU, 0.0, None)
    trainer = kind(
        model=build_model(config, CPU, "none"),
        args=trainer_arguments(config, scratch, evaluate=False),
        data_collator=Collator(config.data.loss_weights, multiple=row_multiple(config)),
        train_dataset=_random_rows(8 * rows * workers, options.sequence_length),
        processing_class=AutoTokenizer.from_pretrained(DEMO, trust_remote_code=False),
        global_batch_size=config.global_batch_size,
        keeper=keeper,
        meter=meter,
        tolerated_skips=0,
        callbacks=[Metering(meter), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Metering(TrainerCallback):
    """Starts and stops the meter, which `training.progress.Metrics` does in a run on Ray."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.meter.start(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.meter.stop()


def _random_rows(count: int, length: int) -> Dataset:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, 3000, (count, length), generator=generator).tolist()
    labels = [CHANNEL_LABELS["final"]] * length
    return Dataset.from_list([{"tokens": row, "labels": labels, "lengths": [length], "size": length} for row in tokens])
