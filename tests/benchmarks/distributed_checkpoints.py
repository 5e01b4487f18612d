"""Row of `distributed` about checkpoints, on CPU: what they cost training's steps.

Windows without checkpoints, with asynchronous and with synchronous ones follow one another in one run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from tests.benchmarks.distributed_trainer import make_trainer
from training.durable import DurableTrainer

KINDS = ("none", "asynchronous", "synchronous")
"""of windows, in the order in which they follow one another"""


def checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps with a checkpoint among every `checkpoint_steps` of them, and with none."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    windows = Windows(options.checkpoint_steps)
    steps = options.checkpoint_steps * (len(KINDS) * options.rounds + 1) + 1
    with tempfile.TemporaryDirectory(prefix="raysoner-", dir=options.storage or None) as folder:
        trainer = make_trainer(options, 1, steps, Path(folder), TimedSaves, [windows])
        windows.trainer = trainer
        with trainer.keeper:
            trainer.train_from(None, Path(folder))
            newest = trainer.keeper.store.steps()[-1]
        size = sum(file.stat().st_size for file in Path(folder).glob(f"**/step-{newest:08}*/*"))
    seconds = {kind: windows.seconds[place :: len(KINDS)] for place, kind in enumerate(KINDS)}
    blocked = {kind: trainer.blocked[kind][1:] or trainer.blocked[kind] for kind in KINDS[1:]}
    whole = {kind: _ratio(seconds[kind], seconds["none"]) for kind in KINDS[1:]}
    return {
        "step_seconds": round(median(seconds["none"]) / options.checkpoint_steps, 4),
        "steps_a_checkpoint": options.checkpoint_steps,
        "checkpoint_mb": round(size / 1e6, 2),
        "blocked_seconds": round(median(blocked["asynchronous"]), 4),
        "blocked_ratio": round(1 + median(blocked["asynchronous"]) / median(seconds["none"]), 4),
        "step_ratio": round(whole["asynchronous"], 4),
        "synchronous_blocked_seconds": round(median(blocked["synchronous"]), 4),
        "synchronous_step_ratio": round(whole["synchronous"], 4),
        "first_blocked_seconds": round(trainer.blocked["asynchronous"][0], 4),
        "windows": {kind: [round(value, 3) for value in values] for kind, values in seconds.items()},
        "note": "one core in all, so that what the writer computes counts too",
    }


class Windows(TrainerCallback):
    """Windows of `steps` after one of warm-up, each of the next of `KINDS`, with its checkpoint in the middle."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[float] = []
        self.trainer: Any = None
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        window, step = divmod(state.global_step, self.steps)
        if step == 0:
            now = time.perf_counter()
            if window > 1:
                self.seconds.append(now - self._began)
                print(f"{self.trainer.kind}: {self.seconds[-1]:.2f} s for {self.steps} steps", flush=True)
            self._began = now
            self.trainer.kind = KINDS[(window - 1) % len(KINDS)]
        control.should_save = window > 0 and step == self.steps // 2 and self.trainer.kind != "none"


class TimedSaves(DurableTrainer):
    """DurableTrainer that times its saves, by `kind`, and in a synchronous window waits until they are written."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.kind = KINDS[0]
        self.blocked: dict[str, list[float]] = {kind: [] for kind in KINDS}
        super().__init__(*arguments, **keywords)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        super()._save_checkpoint(model, trial)
        if self.kind == "synchronous" and self.keeper.saver is not None:
            self.keeper.saver.wait()
        self.blocked[self.kind].append(time.perf_counter() - began)


def _ratio(own: list[float], none: list[float]) -> float:
    """Median over windows that followed one another."""
    return median(one / other for one, other in zip(own, none, strict=True))
