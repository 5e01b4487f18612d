"""What happens around the training loop: reports to Ray Train, the progress line, and guards against silent failure."""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

CHECKPOINT_FOLDER = "checkpoint"
"""folder inside a Ray Train checkpoint that holds the Hugging Face checkpoint, as in Ray's own callback"""

BAR_WIDTH = 20


class RayReport(TrainerCallback):
    """Hands metrics and checkpoints to Ray Train, and waits until Ray has committed each checkpoint.

    Without the wait, a worker killed within two seconds of a save starts from scratch: the controller learns of the
    report when it next polls.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.metrics |= {**(logs or {}), "step": state.global_step, "memory_gib": memory_gib()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
            shutil.move(saved, Path(folder) / CHECKPOINT_FOLDER)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({**self.metrics, "step": state.global_step}, checkpoint=checkpoint)
        ray.train.get_all_reported_checkpoints()
        if state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps} saved", flush=True)


class Progress(TrainerCallback):
    """One line at each log: a bar, the loss, tokens a second over all workers, device memory and the time left."""

    def __init__(self, tokens_per_step: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        steps = state.global_step - self.first_step
        if not state.is_world_process_zero or not logs or steps == 0:
            return
        seconds = time.perf_counter() - self.started
        left = seconds / steps * (state.max_steps - state.global_step)
        named = {"loss": "loss", "eval_loss": "held-out loss"}
        losses = ", ".join(f"{title} {float(logs[key]):.4f}" for key, title in named.items() if key in logs)
        if losses:
            print(
                f"{_bar(state.global_step, state.max_steps)} {losses}, "
                f"{steps * self.tokens_per_step / seconds:,.0f} tokens/s, {memory_gib():.1f} GiB, "
                f"{int(left // 60)}:{int(left % 60):02} left",
                flush=True,
            )


class DidItTrain(TrainerCallback):
    """Stops a run that would finish without having learned: an adapter without gradient, a loss that is no number."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        if without:
            raise RuntimeError(f"{len(without)} trainable tensors get no gradient, among them {without[0]}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise RuntimeError(f"the loss at step {state.global_step} is {loss}; lower optimizer.learning_rate")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        still = [name for name, weight in adapters.items() if "lora_B" in name and not weight.detach().any()]
        if still and state.global_step > 0:
            raise RuntimeError(f"{len(still)} adapters are still zero after training, among them {still[0]}")
        broken = [name for name, weight in adapters.items() if not weight.detach().isfinite().all()]
        if broken:
            raise RuntimeError(f"{len(broken)} adapters hold NaN or infinity, among them {broken[0]}")
        check_ranks_agree(adapters)


def check_ranks_agree(adapters: dict[str, torch.Tensor]) -> None:
    """All workers hold the same adapters, bit for bit.

    Raises:
        RuntimeError: a tensor differs between two workers.
    """
    if not torch.distributed.is_initialized():
        return
    for name, weight in adapters.items():
        highest, lowest = weight.detach().clone(), weight.detach().clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        if not torch.equal(highest, lowest):
            raise RuntimeError(f"workers disagree about {name}: data-parallel training has come apart")


def memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _bar(step: int, steps: int) -> str:
    filled = BAR_WIDTH * step // max(1, steps)
    return f"step {step}/{steps} [{'█' * filled}{'·' * (BAR_WIDTH - filled)}]"
