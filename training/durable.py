"""The trainer of a run: it saves to a store and resumes from it, judges each step, and measures how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from training import stopping
from training.agreement import check_ranks_agree, of_all_ranks, trainable
from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.rng import Rng, own_rng, rng_kept, set_rng
from training.checkpoints.snapshot import Snapshot, gather_tensors, restore_snapshot, take_snapshot
from training.data.order import StepSampler
from training.guards import StepFigures, StepGuard
from training.judging import Judge
from training.keeping import Keeper
from training.stopping import Wish
from training.throughput import Meter
from training.together import together
from training.trainer import WeightedTrainer


class DurableTrainer(WeightedTrainer):
    """WeightedTrainer whose checkpoints are snapshots, written while it goes on, and whose steps are guarded.

    The log has, beside WeightedTrainer's, the meter's figures and `skipped_steps`; its `loss` is the mean over the
    steps since the last line that were not skipped.

    Args:
        arguments: as WeightedTrainer's.
        keeper: of this worker's checkpoints.
        meter: of this worker.
        tolerated_skips: as StepGuard's.
        judge: of the evaluations; None where there are none.
        keywords: as WeightedTrainer's.
    """

    def __init__(
        self,
        *arguments: Any,
        keeper: Keeper,
        meter: Meter,
        tolerated_skips: int,
        judge: Judge | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.judge = judge
        if judge is not None:
            self.add_callback(judge)
        self.keeper, self.meter = keeper, meter
        keeper.said = lambda step: f"{step}/{self.state.max_steps}"
        self.guard = StepGuard(self._step_figures, tolerated_skips=tolerated_skips, wish=self._wish)
        self.add_callback(self.guard)
        self.latest: dict[str, float] = {}
        """newest value of everything that was logged"""
        self._buffers = SnapshotBuffers()
        self._snapshot: Snapshot | None = None
        self._gradient_norm = self._step_loss = torch.zeros(())
        self._step_items: Any = None

    def train_from(self, snapshot: Snapshot | None, scratch: Path) -> None:
        """Train to the end, or go on from `snapshot`, to whose step everything goes back.

        Args:
            snapshot: the same on all workers.
            scratch: folder of this worker alone.

        Raises:
            Agreed: the snapshot is of another model or other LoRA targets, or the storage fails for good.
            TrainingStopped: as StepGuard.
        """
        if snapshot is None:
            self.train()
            return
        over = self.judge is not None and self.judge.is_over(snapshot.trainer_state["log_history"])
        if over or snapshot.step >= snapshot.trainer_state["max_steps"]:
            self.state.global_step = snapshot.step  # the run ended just after its last checkpoint
            return
        self._snapshot = snapshot
        snapshot.new_trainer_state().save_to_json(str(scratch / TRAINER_STATE_NAME))
        self.train(resume_from_checkpoint=str(scratch))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        """As WeightedTrainer's, and added to the step's figures."""
        with self.meter.forward() if model.training else nullcontext():
            loss = super().compute_loss(model, inputs, *arguments, **keywords)
        if model.training:
            self._step_loss = self._step_loss + loss.detach()
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As transformers', for a new step; the wait for its batches is the meter's."""
        self._step_loss = torch.zeros((), device=device)
        found = super().get_batch_samples(self.meter.timed(epoch_iterator), num_batches, device)
        self._step_items = found[1]
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As WeightedTrainer's, with the figures of this class."""
        if "loss" in logs and self.model.training:
            mean = self.guard.take_mean_loss()
            logs["loss"] = float("nan") if mean is None else mean
            logs["skipped_steps"] = self.guard.detector.skipped
        super().log(logs, start_time)
        self.latest |= {name: value for name, value in logs.items() if isinstance(value, int | float)}

    def figures(self, tokens: int) -> dict[str, float]:
        """The meter's."""
        return self.meter.figures(tokens, self.state.global_step)

    def _wish(self) -> Wish:
        """Where the storage has failed for good, to save and end: the save then tells all workers why."""
        return Wish.END if self.keeper.failed else stopping.wish()

    def _step_figures(self) -> StepFigures:
        items = self._step_items
        return StepFigures(self._step_loss, self._gradient_norm, 0 if items is None else int(items))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._gradient_norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        return self._gradient_norm

    def _evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        """As transformers'; its loader draws a random number, and dropout would go on otherwise than without it."""
        with self.meter.paused(), rng_kept():
            return super()._evaluate(*arguments, **keywords)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Hand a snapshot to the saver; training goes on as soon as it is taken."""
        with self.meter.paused():
            check_ranks_agree(trainable(self.model))
            states = of_all_ranks(own_rng())
            whole = gather_tensors(self.model, self.optimizer)
            together(lambda: self._save_snapshot(states, whole))

    def _save_snapshot(self, states: list[Rng], whole: dict[str, torch.Tensor]) -> None:
        """What the leading worker does in a save, in which the storage may have failed for good."""
        if not self.keeper.leads:
            return
        snapshot = take_snapshot(
            self.model,
            self.optimizer,
            self.lr_scheduler,
            self.state,
            rng=states,
            data=self._position(),
            metrics=self.latest | {"step": self.state.global_step},
            identity=self.keeper.identity,
            buffers=self._buffers,
            whole=whole,
        )
        self.keeper.save(snapshot)

    def _position(self) -> dict[str, Any]:
        sampler: StepSampler = self.callback_handler.train_dataloader.step_sampler
        return {
            **sampler.position(self.state.global_step)._asdict(),
            "global_batch_size": self.global_batch_size,
            "guard": self.guard.state_dict(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: adapters are put back with the optimizer's moments, once both are there."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._snapshot is not None:
            snapshot = self._snapshot
            together(lambda: restore_snapshot(snapshot, self.model, self.optimizer, self.lr_scheduler))
            self.guard.load_state_dict(self._snapshot.data["guard"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._snapshot is not None:
            set_rng(self._snapshot.rng, self.args.process_index)
