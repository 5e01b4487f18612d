"""A small run with everything that a checkpoint holds: adapters, AdamW, a schedule, and dropout that draws numbers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState, get_cosine_schedule_with_warmup

from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.rng import Rng, own_rng
from training.checkpoints.snapshot import Snapshot, take_snapshot

from .packed import tiny_model

IDENTITY = {"model": "tiny", "lora": {"rank": 3, "targets": ["q_proj", "v_proj"]}}


@dataclass
class Run:
    """What trains, as a fresh process would make it."""

    model: PeftModel
    optimizer: AdamW
    scheduler: LRScheduler
    state: TrainerState

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def step(self) -> float:
        """One optimizer step on random tokens; the loss hangs on three generators."""
        device = self.model.device
        tokens = torch.from_numpy(np.random.randint(0, 97, (2, 12))).to(device)
        loss = self.model(tokens, labels=tokens).loss * (1 + random.gauss(0, 0.1))
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        self.state.global_step += 1
        self.state.log_history.append({"step": self.state.global_step, "loss": value})
        return value

    def snapshot(
        self, rng: Sequence[Rng] | None = None, buffers: SnapshotBuffers | None = None, **metrics: Any
    ) -> Snapshot:
        return take_snapshot(
            self.model,
            self.optimizer,
            self.scheduler,
            self.state,
            rng=[own_rng()] if rng is None else rng,
            data={"epoch": 1, "rows_seen": 2 * self.state.global_step, "global_batch_size": 2},
            metrics=metrics,
            identity=IDENTITY,
            buffers=buffers,
        )


def new_run(seed: int = 1, device: str = "cpu", *, fused: bool = False, **lora: Any) -> Run:
    """Weights of adapters and random numbers hang on `seed`; the base is always the same."""
    base = tiny_model(device=device)
    seed_all(seed)
    settings: dict[str, Any] = {"r": 3, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", **settings, **lora})).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": weights[::2], "weight_decay": 0.1}, {"params": weights[1::2], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-2, fused=fused)
    return Run(model, optimizer, get_cosine_schedule_with_warmup(optimizer, 2, 40), TrainerState())


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def differences(left: Snapshot, right: Snapshot) -> list[str]:
    """Names of what is not the same to the bit, of all that is kept."""
    found = []
    for field in dataclasses.fields(Snapshot):
        own, other = getattr(left, field.name), getattr(right, field.name)
        if field.name in ("adapter", "moments"):
            equal = _equal(own, other)
        elif field.name == "rng":
            equal = len(own) == len(other) and all(map(_equal, own, other))
        else:
            equal = field.name == "buffers" or own == other
        if not equal:
            found.append(field.name)
    return found


def _equal(own: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(
        own[name].dtype == other[name].dtype and torch.equal(own[name], other[name]) for name in own
    )
