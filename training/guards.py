"""Guards of a run against failing in silence: steps that would break it, and adapters that do not learn.

They decide alike on all workers, from figures that the workers exchange once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training import stopping
from training.agreement import check_ranks_agree, local, trainable
from training.anomalies import AnomalyDetector
from training.stopping import Wish

PATIENCE = 50
"""good steps within which every adapter must have had a gradient"""
LOOK_STEPS = 10
"""steps between two waits for the device that look whether all have"""
LATE_STEPS = 3
"""good steps before which lora_A may have none: it is zero while lora_B is, as it is in warm-up's first step"""


class TrainingStopped(RuntimeError):  # noqa: N818
    """The run is broken; going on from the last checkpoint would break it again."""


class StepFigures(NamedTuple):
    """One worker's figures of the step whose gradients are complete.

    `loss` [] is its sum over micro-batches, scaled so that the step's loss is the mean over workers; `gradient_norm` []
    the norm over all adapters before clipping, the same on all workers; `trained_tokens` are this worker's.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    trained_tokens: int


class GradientWatch:
    """Sees that every adapter gets a gradient other than zero, without waiting for the device at each step."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.steps = 0
        self.without: list[str] | None = None
        self._seen = torch.zeros(0)

    def look(self, adapters: Mapping[str, torch.Tensor]) -> None:
        """Take in the gradients of a good step.

        Raises:
            TrainingStopped: a tensor has no gradient at all, or none but zero within `patience` steps.
        """
        if self.without is None:
            self._begin(adapters)
        if not self.without:
            return
        self.steps += 1
        self._seen |= _largest(adapters) > 0
        if self.steps % LOOK_STEPS == 0 or self.steps == self.patience:
            self._update(adapters)
        if self.steps >= self.patience:
            self._require_none(self.without)

    def finish(self, adapters: Mapping[str, torch.Tensor]) -> None:
        """Look once more, at the end of a run that had fewer steps than `patience`.

        Raises:
            TrainingStopped: as `look`.
        """
        if self.without and self.steps:
            self._update(adapters)
            self._require_none([name for name in self.without if "lora_A" not in name or self.steps >= LATE_STEPS])

    def _begin(self, adapters: Mapping[str, torch.Tensor]) -> None:
        missing = [name for name, weight in adapters.items() if weight.grad is None]
        if missing:
            raise TrainingStopped(
                f"{len(missing)} trainable tensors get no gradient, among them {missing[0]}: they are outside the "
                'computation of the loss; set model.experts = "grouped_lora" and model.kernels = false'
            )
        self.without = list(adapters)
        self._seen = torch.zeros(len(adapters), dtype=torch.bool, device=next(iter(adapters.values())).device)

    def _update(self, adapters: Mapping[str, torch.Tensor]) -> None:
        """Each worker may hold a part of a sharded tensor, and see the gradient of no more."""
        self._seen = _any_worker(self._seen)
        self.without = [name for name, seen in zip(adapters, self._seen.tolist(), strict=True) if not seen]

    def _require_none(self, without: list[str]) -> None:
        if without:
            raise TrainingStopped(
                f"{len(without)} adapters had no gradient other than zero in {self.steps} steps, among them "
                f"{without[0]}: they learn nothing; raise data.weights or train more channels with data.train_on, and "
                "leave layers that get no tokens out of lora.expert_layers"
            )


class StepGuard(TrainerCallback):
    """Skips steps that would break the run, stops it where they are too many, and sees that all workers agree.

    Each step the workers exchange their figures: the step's loss, trained tokens, and whether one wants to stop. A step
    whose loss or gradient norm is not finite, or explodes, is skipped: its gradients are dropped, so that the optimizer
    changes neither parameters nor moments, and the schedule goes on. At a wish to stop the trainer is told to save and
    to end its loop after this step; `stop` then says which wish it was.

    Args:
        figures: called once a step.
        tolerated_skips: so many steps in a row may be skipped.
        explosion: a loss over so many times its running mean is skipped.
        wish: what this worker wants, called once a step.

    Attributes:
        stop: what the workers agreed on, `Wish.NONE` while the run goes on.
        detector: counts of steps that were skipped.
    """

    def __init__(
        self,
        figures: Callable[[], StepFigures],
        *,
        tolerated_skips: int = 10,
        explosion: float = 3.0,
        wish: Callable[[], Wish] = stopping.wish,
    ) -> None:
        self.figures, self.wish = figures, wish
        self.detector = AnomalyDetector(explosion, tolerated_skips)
        self.stop = Wish.NONE
        self._watch = GradientWatch()
        self._compared = False
        self._loss_sum, self._losses = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers with which a resumed run decides as this one would; the same on all workers."""
        settings = ("explosion", "tolerated_skips")
        counts = {name: value for name, value in asdict(self.detector).items() if name not in settings}
        return {**counts, "loss_sum": self._loss_sum, "losses": self._losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        counts = dict(state)
        self._loss_sum, self._losses = counts.pop("loss_sum"), counts.pop("losses")
        self.detector = AnomalyDetector(self.detector.explosion, self.detector.tolerated_skips, **counts)

    def take_mean_loss(self) -> float | None:
        """Mean loss of the good steps since the last call, over all workers; None if there was none."""
        mean = self._loss_sum / self._losses if self._losses else None
        self._loss_sum, self._losses = 0.0, 0
        return mean

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Judge the step.

        Raises:
            TrainingStopped: no token of the step is trained, too many were skipped, or an adapter has no gradient.
        """
        step, adapters = state.global_step + 1, trainable(model)
        loss, norm, trained_tokens = self._exchange()
        if not trained_tokens:
            raise TrainingStopped(
                f"no token of step {step} is trained, on any worker: train more channels with data.train_on, give them "
                "data.weights above 0, or put more rows in a step with batch.micro_batch_size or "
                "batch.accumulation_steps"
            )
        anomaly = self.detector.judge(loss, norm)
        if anomaly is None:
            self._loss_sum, self._losses = self._loss_sum + loss, self._losses + 1
            self._watch.look(adapters)
            return
        for weight in adapters.values():
            weight.grad = None
        if state.is_world_process_zero:
            print(f"step {step} skipped: {anomaly}", flush=True)
        if self.detector.hopeless:
            self._give_up(step, loss, norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Have the trainer save and stop where that was agreed.

        Raises:
            RuntimeError: after the first step the workers' adapters differ.
        """
        if not self._compared:
            self._compared = True
            check_ranks_agree(trainable(model))
        if state.global_step >= state.max_steps:
            self.stop = Wish.NONE
        if self.stop is not Wish.NONE:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at the adapters that come out.

        Raises:
            TrainingStopped: one had no gradient, is still zero, or holds NaN or infinity.
            RuntimeError: they differ between workers.
        """
        adapters = trainable(model)
        if not adapters or not self.detector.steps:
            return
        check_ranks_agree(adapters)
        weights = [local(weight.detach()) for weight in adapters.values()]
        nonzero = _any_worker(torch.stack([weight.any() for weight in weights])).tolist()
        broken = _any_worker(torch.stack([~weight.isfinite().all() for weight in weights])).tolist()
        if self.stop is Wish.NONE:
            still = [name for name, filled in zip(adapters, nonzero, strict=True) if "lora_B" in name and not filled]
            _require_no(still, "are still zero after training", "raise optimizer.learning_rate or run.epochs")
            self._watch.finish(adapters)
        holding = [name for name, holds in zip(adapters, broken, strict=True) if holds]
        _require_no(holding, "hold NaN or infinity", "lower optimizer.learning_rate and begin a new run")

    def _exchange(self) -> tuple[float, float, int]:
        """The step's loss, gradient norm and trained tokens over all workers; sets `stop`."""
        own, wish = self.figures(), self.wish()
        counts = (own.trained_tokens, wish is Wish.LEAVE, wish is Wish.END)
        norm = own.gradient_norm.full_tensor() if isinstance(own.gradient_norm, DTensor) else own.gradient_norm
        device = own.loss.device
        values = torch.cat(
            (
                torch.stack((own.loss.double(), norm.to(device, torch.float64))),
                torch.tensor(counts, dtype=torch.float64, device=device),
            )
        )
        workers = 1
        if dist.is_initialized():
            dist.all_reduce(values)
            workers = dist.get_world_size()
        loss_sum, norm_sum, trained_tokens, leaving, ending = values.tolist()
        self.stop = Wish.END if ending else Wish.LEAVE if leaving else Wish.NONE
        return loss_sum / workers, norm_sum / workers, int(trained_tokens)

    def _give_up(self, step: int, loss: float, norm: float) -> None:
        counts = self.detector
        raise TrainingStopped(
            f"stopped at step {step}: {counts.skipped_in_a_row} steps in a row and {counts.skipped} of {counts.steps} "
            f"in all were skipped, the last with loss {loss:.4g} and gradient norm {norm:.4g}; lower "
            f'optimizer.learning_rate, look at the data of step {step}, or set model.precision = "fp32"'
        )


def _require_no(names: list[str], what: str, remedy: str) -> None:
    if names:
        raise TrainingStopped(f"{len(names)} adapters {what}, among them {names[0]}; {remedy}")


def _largest(adapters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Largest magnitude in this worker's part of each gradient, fp32 [adapters]; 0 where it has none."""
    parts = {name: local(weight.grad) for name, weight in adapters.items() if weight.grad is not None}
    there = {name: part for name, part in parts.items() if part.numel()}
    largest = torch._foreach_norm([*there.values()], math.inf) if there else ()
    found = dict(zip(there, largest, strict=True))
    zero = torch.zeros((), device=next(iter(adapters.values())).device)
    return torch.stack([found.get(name, zero).float() for name in adapters])


def _any_worker(flags: torch.Tensor) -> torch.Tensor:
    """bool [N]: true where it is on any worker."""
    if not dist.is_initialized():
        return flags
    highest = flags.int()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.bool()
