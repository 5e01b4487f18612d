"""The points of a search: what a step can look like on a GPU type, and which of them memory rules out. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from pydantic import ValidationError

from cluster.config import ConfigError
from cluster.memory import MODES, size
from cluster.model import Checkpointing, ModelShape
from training.config import TrainingConfig
from training.memory import memory_of, remedies
from tuning.config import SpaceConfig

SECTIONS = {
    "micro_batch_size": "batch",
    "accumulation_steps": "batch",
    "activation_checkpointing": "batch",
    "base_precision": "model",
    "attention": "model",
    "experts": "model",
    "compile": "model",
    "strategy": "workers",
}
"""tables of the training configuration that a point's settings belong to"""


Dimension = Literal["activation_checkpointing", "base_precision", "attention", "experts", "compile", "strategy"]
DIMENSIONS: tuple[Dimension, ...] = (
    "activation_checkpointing",
    "base_precision",
    "attention",
    "experts",
    "compile",
    "strategy",
)
"""settings of a point beside its batch, in the order in which they are tried"""


@dataclass(frozen=True)
class Point:
    """One way to make a step; nothing is left to be decided on the worker."""

    micro_batch_size: int
    accumulation_steps: int
    activation_checkpointing: Checkpointing
    base_precision: str
    attention: str
    experts: str
    compile: str
    strategy: str

    @property
    def kind(self) -> Point:
        """The point without its batch: what a compiled step and a loaded base have in common."""
        return replace(self, micro_batch_size=1, accumulation_steps=1)

    def settings(self) -> dict[str, dict[str, Any]]:
        """As tables of a training configuration."""
        tables: dict[str, dict[str, Any]] = {}
        for name, value in asdict(self).items():
            tables.setdefault(SECTIONS[name], {})[name] = value
        return tables

    def apply(self, config: TrainingConfig) -> TrainingConfig:
        """The run with this point's settings.

        Raises:
            ValidationError: they contradict each other or the rest of the configuration.
        """
        raw = config.model_dump()
        raw["batch"]["global_batch_size"] = None
        for section, values in self.settings().items():
            raw[section] |= values
        return TrainingConfig.model_validate(raw)

    def __str__(self) -> str:
        """Like `8 × 2 none`, and what else differs from the usual."""
        usual = {"base_precision": "mxfp4", "experts": "grouped_lora", "strategy": "data_parallel"}
        parts = [f"{self.micro_batch_size} × {self.accumulation_steps}", self.activation_checkpointing]
        parts += [value for name, value in asdict(self).items() if name in usual and value != usual[name]]
        if self.attention == "eager":
            parts.append("eager attention")
        parts += ["uncompiled"] if self.compile == "off" else []
        return " ".join(parts)


@dataclass(frozen=True)
class Dropped:
    """A point that is not tried, and why."""

    point: Point
    needed_bytes: int
    reason: str


@dataclass(frozen=True)
class Space:
    """What a search may try on one GPU type, and what memory ruled out."""

    points: tuple[Point, ...]
    dropped: tuple[Dropped, ...]
    predicted_bytes: dict[Point, int]
    """peak of a step by arithmetic, without a margin"""


def configured_point(config: TrainingConfig, mode: Checkpointing | None = None) -> Point:
    """What a run's own settings come to, with `mode` where activation checkpointing is left to the arithmetic."""
    gpu = config.workers.gpus > 0
    attention, chosen = config.model.attention, config.batch.activation_checkpointing
    strategy = config.workers.strategy
    return Point(
        micro_batch_size=config.batch.rows,
        accumulation_steps=config.accumulation,
        activation_checkpointing=chosen if chosen != "auto" else mode or "none",
        base_precision=config.model.base_precision,
        attention=attention if attention != "auto" else "flex_attention" if gpu else "eager",
        experts=config.model.experts,
        compile="on" if config.compiled else "off",
        strategy=strategy if strategy != "auto" else "data_parallel",
    )


def make_space(
    config: TrainingConfig, choices: SpaceConfig, shape: ModelShape, memory_bytes: int | None, margin: float
) -> Space:
    """All points that fit, smallest micro-batch first.

    Args:
        config: of the run; what is not searched is taken from it.
        choices: what is.
        shape: of the model.
        memory_bytes: of the GPU, as CUDA reports the total; None drops nothing.
        margin: share of the arithmetic's sum that must be free beside it.

    Raises:
        ConfigError: no point is left; the message says which constraint kills the last one.
    """
    points, dropped, predicted = [], [], {}
    refused = ""
    for point in _all_points(config, choices):
        try:
            applied = point.apply(config)
        except ValidationError as error:
            refused = error.errors()[0]["msg"].removeprefix("Value error, ")
            continue
        total = memory_of(applied, shape, point.activation_checkpointing, shards_of(point, config)).total
        needed = round(total * (1 + margin))
        if memory_bytes is not None and needed > memory_bytes:
            reason = (
                f"needs {size(needed)} by arithmetic with {margin:.0%} of margin, and there are {size(memory_bytes)}"
            )
            dropped.append(Dropped(point, needed, reason))
        else:
            points.append(point)
            predicted[point] = total
    if not points:
        raise ConfigError(_why_nothing_is_left(config, shape, dropped, memory_bytes, refused))
    return Space(tuple(points), tuple(dropped), predicted)


def shards_of(point: Point, config: TrainingConfig) -> int:
    """Workers that share one copy of the base's layers."""
    return config.workers.count if point.strategy == "sharded" else 1


def at_least_as_hungry(one: Point, other: Point) -> bool:
    """Whether `one` surely needs no less memory than `other`: the same kind, or one that recomputes less."""
    same = replace(one.kind, activation_checkpointing=other.activation_checkpointing) == other.kind
    keeps = MODES.index(one.activation_checkpointing) <= MODES.index(other.activation_checkpointing)
    return same and keeps and one.micro_batch_size >= other.micro_batch_size


def batches(config: TrainingConfig, choices: SpaceConfig) -> list[tuple[int, int]]:
    """Micro-batch sizes with their accumulation, smallest first.

    Without a range each makes steps of exactly the run's rows. In a range it is the accumulation whose step is nearest
    to the run's, the larger of two that are equally near.

    Raises:
        ConfigError: none makes such a step.
    """
    rows, workers = config.global_batch_size, config.workers.count
    wanted = choices.global_batch_tokens
    length = config.data.sequence_length
    least, most = (-(-wanted[0] // length), wanted[1] // length) if wanted else (rows, rows)
    found = []
    for micro in sorted(set(choices.micro_batch_size)) or range(1, most // workers + 1):
        each = micro * workers
        steps = range(-(-least // each), most // each + 1)
        if fitting := [count for count in steps if count > 0]:
            found.append((micro, min(fitting, key=lambda count: (abs(count * each - rows), -count))))
    if not found:
        span = f"{least} to {most} rows of {length} tokens" if wanted else f"{rows} rows"
        setting = "tuning.space.global_batch_tokens" if wanted else "batch.global_batch_size"
        raise ConfigError(
            f"no micro-batch size on {workers} workers makes a step of {span}: change {setting}, or "
            "tuning.space.micro_batch_size"
        )
    return found


def _all_points(config: TrainingConfig, choices: SpaceConfig) -> Iterator[Point]:
    own = configured_point(config)
    values: dict[str, Iterable[Any]] = {
        name: tuple(dict.fromkeys(getattr(choices, name))) or (getattr(own, name),) for name in DIMENSIONS
    }
    if config.workers.count == 1:
        values["strategy"] = ("data_parallel",)
    for micro, accumulation in batches(config, choices):
        for combination in product(*values.values()):
            yield Point(micro, accumulation, **dict(zip(values, combination, strict=True)))


def _why_nothing_is_left(
    config: TrainingConfig, shape: ModelShape, dropped: list[Dropped], memory_bytes: int | None, refused: str
) -> str:
    if not dropped or memory_bytes is None:
        return f"no point of tuning.space can be run: {refused}"
    least = min(dropped, key=lambda drop: drop.needed_bytes)
    lacking = size(least.needed_bytes - memory_bytes)
    smallest = least.point.apply(config)
    settings, enough = remedies(smallest, shape, memory_bytes, shards_of(least.point, config))
    offers = " or ".join(f"{setting} ({size(needed)})" for setting, needed in settings.items())
    return (
        f"memory rules out all {len(dropped)} points of tuning.space: the smallest, {least.point}, {least.reason}, "
        f"{lacking} too little: "
        + (f"set {offers} with activation_checkpointing full, or use" if enough else "use")
        + " a GPU with more memory"
    )
