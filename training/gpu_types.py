"""Which GPU type of a cluster a run takes: a step waits for its slowest worker, so one type, or shares by speed.

No torch, no ray. Speeds are those of tuning profiles at the run's micro-batch where each type has one, else those of
`cluster.step_time` for all types, so that guesses are only held against guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ConfigError
from cluster.hardware import PROFILES, GpuProfile
from cluster.model import ModelShape
from cluster.placement import GpuNode, describe_nodes, workers_per_node
from cluster.step_time import step_seconds
from training.config import TrainingConfig
from training.memory import recipe_of
from training.profile import profiled_tokens_per_second
from training.strategy import choose_strategy

DOCUMENT_TOKENS = 512
"""mean length of a document, for speeds by arithmetic"""


@dataclass(frozen=True)
class Chosen:
    """The type that all workers run on, as Ray calls it, and a sentence; None where nothing is to be chosen."""

    accelerator_type: str | None
    why: str | None = None

    def among(self, nodes: Iterable[GpuNode]) -> list[GpuNode]:
        """The nodes of this type, or all."""
        return [node for node in nodes if self.accelerator_type in (None, node.accelerator_type)]


@dataclass(frozen=True)
class Offer:
    """What a type would come to."""

    name: str
    workers: int
    tokens_per_second: float
    """of all workers"""
    source: str


def choose_type(config: TrainingConfig, nodes: Sequence[GpuNode]) -> Chosen:
    """The type for a run: the one that is set, the only one, or that on which it is expected to end first.

    Args:
        config: of the run.
        nodes: the cluster's, with GPUs.

    Raises:
        ConfigError: the type that is set is not there; or there are several, and none that is known has room for all
            workers and memory for the model.
    """
    workers = config.workers
    types = sorted({node.accelerator_type or "" for node in nodes})
    if not workers.gpus or not nodes:
        return Chosen(None)
    if workers.gpu_type is not None:
        return _named(config, workers.gpu_type, nodes)
    if len(types) == 1:
        return Chosen(None)
    if workers.mixed == "proportional":
        return Chosen(None, 'all types, as workers.mixed = "proportional" says; the workers deal the micro-batches')
    offers, refusals = _offers(config, nodes)
    if not offers:
        raise ConfigError(
            f"the cluster has GPUs of several types ({describe_nodes(nodes)}), and none alone is enough: "
            f"{'; '.join(refusals)}; lower workers.count, name one with workers.gpu_type, or set workers.mixed = "
            '"proportional", which takes all and deals each its share of a step'
        )
    best = max(offers, key=lambda offer: offer.tokens_per_second)
    others = [
        f"{offer.tokens_per_second:,.0f} on {offer.workers} × {offer.name}" for offer in offers if offer is not best
    ] + refusals
    return Chosen(
        best.name,
        f"{best.name} alone, on which {best.workers} workers are expected to reach {best.tokens_per_second:,.0f} "
        f"tokens/s ({best.source}; {'; '.join(others)}); workers.gpu_type takes another, and workers.mixed = "
        '"proportional" all, each with its share of a step',
    )


def _named(config: TrainingConfig, wanted: str, nodes: Sequence[GpuNode]) -> Chosen:
    """The type of that name, in Ray's spelling; sizes of a GPU that Ray does not tell apart go by the name of all."""
    known = {profile.name.casefold(): profile.accelerator_type for profile in PROFILES}
    there = {node.accelerator_type.casefold(): node.accelerator_type for node in nodes if node.accelerator_type}
    found = there.get(wanted.casefold()) or there.get(known.get(wanted.casefold(), "").casefold())
    if found is None:
        raise ConfigError(
            f'workers.gpu_type = "{wanted}", and the cluster has {describe_nodes(nodes)}: name a type that is there, '
            "or start nodes of this one"
        )
    room = sum(node.gpus // config.workers.gpus for node in nodes if node.accelerator_type == found)
    if room < config.least_workers:
        raise ConfigError(
            f'workers.gpu_type = "{wanted}" has room for {room} of {config.least_workers} workers (the cluster has '
            f"{describe_nodes(nodes)}): lower workers.count, or start more nodes of this type"
        )
    return Chosen(found, "as workers.gpu_type says")


def _offers(config: TrainingConfig, nodes: Sequence[GpuNode]) -> tuple[list[Offer], list[str]]:
    """Of each type that has room for the run, and why the others do not come into question."""
    found: list[tuple[GpuProfile, list[GpuNode], int]] = []
    refusals = []
    shape = ModelShape.from_folder(config.model.path) if Path(config.model.path).is_dir() else None
    for name in sorted({node.accelerator_type or "" for node in nodes}):
        own = [node for node in nodes if (node.accelerator_type or "") == name]
        room = sum(node.gpus // config.workers.gpus for node in own)
        profile = _profile(name)
        if profile is None:
            refusals.append(f"the speed of {name or 'GPUs of unknown type'} is not known")
        elif room < config.least_workers:
            refusals.append(f"{name} has room for {room} of {config.least_workers} workers")
        elif shape and not _fits(config.with_workers(min(room, config.workers.count)), shape, profile, own):
            refusals.append(f"{name} has not the memory")
        else:
            found.append((profile, own, min(room, config.workers.count)))
    speeds = _speeds(config, shape, found)
    return [
        Offer(profile.accelerator_type, workers, workers * speed, source)
        for (profile, _, workers), (speed, source) in zip(found, speeds, strict=True)
    ], refusals


def _speeds(
    config: TrainingConfig, shape: ModelShape | None, types: Sequence[tuple[GpuProfile, list[GpuNode], int]]
) -> list[tuple[float, str]]:
    """Tokens a second of a GPU of each type, and where that is from."""
    profiled = [profiled_tokens_per_second(config, profile) for profile, _, _ in types]
    if all(profiled):
        return [(found[0], f"{found[1]}, by its tuning profile") for found in profiled if found]
    if shape is None:  # a model of the hub: the order of their peaks
        return [
            (profile.bf16_flops / 1e10, "guessed from its peak, for the model is not here") for profile, _, _ in types
        ]
    found = []
    for profile, own, workers in types:
        run = _with_rows(config.with_workers(workers), shape, profile, own)
        strategy = choose_strategy(run, shape, _together(config, own), profile.memory_bytes)
        recipe = recipe_of(run, shape, strategy.checkpointing, strategy.shards)
        seconds = step_seconds(shape, recipe, profile, min(DOCUMENT_TOKENS, recipe.sequence_length))
        found.append((recipe.tokens / seconds, "by arithmetic"))
    return found


def _with_rows(
    config: TrainingConfig, shape: ModelShape, profile: GpuProfile, nodes: Sequence[GpuNode]
) -> TrainingConfig:
    """The run with a number for its micro-batch: where it is auto, the largest of a few that fits."""
    if config.batch.micro_batch_size != "auto":
        return config
    for rows in (16, 8, 4, 2):
        run = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_size": rows})})
        if _fits(run, shape, profile, nodes):
            return run
    return config


def _fits(config: TrainingConfig, shape: ModelShape, profile: GpuProfile, nodes: Sequence[GpuNode]) -> bool:
    try:
        choose_strategy(config, shape, _together(config, nodes), profile.memory_bytes)
    except ConfigError:
        return False
    return True


def _together(config: TrainingConfig, nodes: Sequence[GpuNode]) -> int:
    return workers_per_node(nodes, config.workers.count, config.workers.gpus)


def _profile(accelerator_type: str) -> GpuProfile | None:
    """Of the largest GPU that Ray calls so."""
    own = [profile for profile in PROFILES if profile.accelerator_type == accelerator_type]
    return max(own, key=lambda profile: profile.memory_bytes, default=None)
