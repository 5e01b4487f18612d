"""What a search for quality tries, and what became of each candidate. No torch, no ray."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import ConfigError
from cluster.memory import MODES, size
from cluster.model import ModelShape
from training.config import TrainingConfig
from training.memory import needed_bytes
from tuning.config import QualityConfig

SECTIONS = {"global_batch_size": "batch", "learning_rate": "optimizer", "rank": "lora", "alpha": "lora"}
"""tables of the training configuration that a candidate's settings belong to"""


@dataclass(frozen=True)
class Candidate:
    """How a run learns, and with which seed."""

    global_batch_size: int
    learning_rate: float
    rank: int
    seed: int

    @property
    def choice(self) -> tuple[int, float, int]:
        """What is chosen: all but the seed."""
        return self.global_batch_size, self.learning_rate, self.rank

    def settings(self, run: TrainingConfig) -> dict[str, float | int]:
        """Settings by name. The scale of an adapter's output, alpha / rank or alpha / √rank, stays the run's."""
        share = self.rank / run.lora.rank
        alpha = run.lora.alpha * (share**0.5 if run.lora.rslora else share)
        found: dict[str, float | int] = {name: value for name, value in asdict(self).items() if name in SECTIONS}
        return found | {"alpha": round(alpha, 6)}

    def apply(self, run: TrainingConfig) -> TrainingConfig:
        """The run with these settings.

        Raises:
            ValidationError: they contradict the rest of the configuration.
        """
        raw = run.model_dump()
        for name, value in self.settings(run).items():
            raw[SECTIONS[name]][name] = value
        raw["run"]["seed"] = self.seed
        return TrainingConfig.model_validate(raw)

    def __str__(self) -> str:
        return f"{self.global_batch_size} rows, rate {self.learning_rate:g}, rank {self.rank}"


class Evaluation(BaseModel):
    """The held-out losses after so many steps, in nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    rows: int
    """that were trained on"""
    loss: float
    """the mean over the languages, or over all tokens where no document asks for a language"""
    languages: dict[str, float] = {}
    """by tag, `und` for documents that ask for none"""
    trained: float | None = None
    """loss of training at the same time"""


class Curve(BaseModel):
    """What became of a candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: dict[str, Any]
    outcome: Literal["measured", "stopped", "out_of_memory", "hung", "died", "failed"]
    """trained to its end; ended early, being worse than others; the rest as of a `tuning.journal.Trial`"""
    evaluations: list[Evaluation] = []
    seconds: float = 0.0
    peak_bytes: int | None = None
    device: str | None = None
    host: str | None = None
    date: str = ""
    reason: str = ""

    @property
    def where(self) -> Candidate:
        """Its candidate."""
        return Candidate(**self.candidate)

    @property
    def loss(self) -> float | None:
        """After the last step; None where it was not reached."""
        return self.evaluations[-1].loss if self.outcome == "measured" else None


def new_curve(candidate: Candidate, **fields: object) -> Curve:
    """The record of a candidate."""
    return Curve.model_validate({"candidate": asdict(candidate), **fields})


def mean_loss(loss: float, languages: dict[str, float]) -> float:
    """What is minimised: each language counts as much as the others, however much of the data speaks it."""
    return fmean(languages.values()) if languages else loss


def steps_of(candidate: Candidate, rows: int, evaluations: int) -> tuple[int, int]:
    """Optimizer steps of a candidate, and those between two evaluations; the former is a multiple of the latter."""
    every = max(1, round(rows / candidate.global_batch_size / evaluations))
    return every * evaluations, every


def baseline(run: TrainingConfig) -> Candidate:
    """The run's own settings."""
    return Candidate(run.global_batch_size, run.optimizer.learning_rate, run.lora.rank, run.run.seed)


def make_candidates(
    run: TrainingConfig,
    settings: QualityConfig,
    rows: int,
    shape: ModelShape,
    memory_bytes: int | None,
    order_seed: int,
) -> tuple[list[Candidate], list[str]]:
    """All combinations in random order, the run's own first, and sentences about those that are left out.

    Args:
        run: of which everything else is taken.
        settings: values to combine.
        rows: that each candidate is trained on.
        shape: of the model.
        memory_bytes: of the GPU; None leaves none out for it.
        order_seed: of the order.

    Raises:
        ConfigError: none is left; the message says why.
    """
    own = baseline(run)
    batches = settings.global_batch_size or _around(own.global_batch_size, 2)
    rates = settings.learning_rate or tuple(float(f"{own.learning_rate * share:.2g}") for share in (1 / 3, 1, 3))
    ranks = settings.rank or _around(own.rank, 2)
    found = [Candidate(*values, own.seed) for values in product(batches, rates, ranks)]
    random.Random(order_seed).shuffle(found)
    kept, refused = [], []
    for candidate in dict.fromkeys([own, *found]):
        if reason := _refusal(candidate, run, settings, rows, shape, memory_bytes):
            refused.append(f"{candidate}: {reason}")
        else:
            kept.append(candidate)
    if not kept:
        raise ConfigError(f"no candidate of tuning.quality can be trained: {refused[0]}")
    return kept, refused


def _refusal(
    candidate: Candidate,
    run: TrainingConfig,
    settings: QualityConfig,
    rows: int,
    shape: ModelShape,
    memory_bytes: int | None,
) -> str | None:
    """Why a candidate cannot be trained; None if it can."""
    workers = run.workers.count
    if candidate.global_batch_size < workers:
        return f"its step has fewer rows than the {workers} workers"
    if candidate.global_batch_size * settings.evaluations > rows:
        return (
            f"{rows} rows are fewer than {settings.evaluations} of its steps, one for each of "
            "tuning.quality.evaluations: raise tuning.quality.rows"
        )
    try:
        applied = candidate.apply(run)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    if memory_bytes is None or not run.workers.gpus:
        return None
    chosen = run.batch.activation_checkpointing
    shards = workers if run.workers.strategy == "sharded" else 1
    needed = needed_bytes(applied, shape, MODES[-1] if chosen == "auto" else chosen, shards)
    if needed > memory_bytes:
        return f"it needs {size(needed)} by arithmetic and the GPU has {size(memory_bytes)}: lower tuning.quality.rank"
    return None


def _around(value: int, factor: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((max(1, value // factor), value, value * factor)))
