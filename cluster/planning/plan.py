"""Which strategy and batch a model takes on some GPUs, and how long its data takes there, by arithmetic.

No torch, no ray. A plan weighs each strategy with each micro-batch and mode of activation checkpointing whose memory
(`cluster.memory`) and margin fit, and takes the one with most tokens a second (`cluster.step_time`,
`cluster.scaling`). GPUs of several types that train together have the same batch, so the slowest sets the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from cluster.config import Config, ConfigError
from cluster.hardware import GpuProfile
from cluster.memory import MARGIN, MODES, Recipe, size, training_memory
from cluster.model import ModelShape
from cluster.planning.gpus import GpuGroup
from cluster.scaling import Layout, Links, Prediction, Strategy, Work, layouts, layouts_of, predict
from cluster.step_time import DOCUMENT_TOKENS, MEASURED, measured_step, step_seconds

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROWS_A_GPU = 16
"""of a step, where no global batch is named; the shipped configurations have as many"""
CHUNK_TOKENS = 2048
"""of the loss, as `training` has them by default"""

Source = Literal["measured", "from a measured step", "predicted", "guessed"]


@dataclass(frozen=True)
class Job:
    """What is to be trained."""

    model: str
    shape: ModelShape
    rows: int | None = None
    """of packed data, once through; None where the data is not known"""
    epochs: float = 1.0
    sequence_length: int = 2048
    document_tokens: int = DOCUMENT_TOKENS
    global_batch_size: int | None = None
    """rows of an optimizer step; None for `ROWS_A_GPU` on each GPU"""
    rank: int = 8
    base_precision: Literal["mxfp4", "bf16"] = "mxfp4"


class Choice(Config):
    """One way to train a job, and what it comes to."""

    gpus: dict[str, int]
    """number by type"""
    strategy: Strategy
    shards: int
    """workers that share one copy of the base"""
    workers: int
    hosts: int
    micro_batch_size: int
    accumulation_steps: int
    activation_checkpointing: str
    memory_bytes: int
    """of a GPU at the peak of a step, with the margin"""
    memory_limit_bytes: int
    """of the smallest GPU"""
    step_seconds: float
    tokens_per_second: float
    """of all GPUs"""
    efficiency: float
    """tokens a second and GPU over those of one GPU alone"""
    gathered_bytes: int
    """that a GPU receives of others' shares of the base in a step"""
    averaged_bytes: int
    """that a GPU receives of gradients in a step"""
    network_bytes: int
    """of both, those that come over a host's network in a step"""
    network_share: float
    """of the step in which the network is busy with them; near 1 it is what the step waits for"""
    steps: int | None
    hours: float | None
    source: Source
    """of the step: one GPU's `measured`, with exchanges added by arithmetic (`from a measured step`), or all by
    arithmetic, on a GPU type that was measured (`predicted`) or on one that was not (`guessed`)"""


class Refusal(Config):
    """GPUs on which a job does not fit."""

    gpus: dict[str, int]
    reason: str


class Plan(Config):
    """All ways to train a job on the GPUs that were named."""

    model: str
    recommended: Choice
    """most tokens a second"""
    choices: list[Choice]
    """the best micro-batch of each strategy, for each GPU type and for all together"""
    refusals: list[Refusal]
    scaling: list[Choice]
    """the recommended GPU type in other numbers"""


def make_plan(job: Job, groups: Sequence[GpuGroup], gpus_per_host: int, network_gbit: float, up_to: int = 0) -> Plan:
    """The plan of a job.

    Args:
        job: to be trained.
        groups: of GPUs, each type once.
        gpus_per_host: GPUs of a host, all of one type; fewer where there are fewer of a type.
        network_gbit: 10⁹ bits a second of a host's network, all its adapters together.
        up_to: GPUs of the recommended type that `scaling` goes up to; 0 for none.

    Raises:
        ConfigError: the job fits none of the GPUs that were named, or its global batch cannot be dealt evenly to any.
    """
    sets = [[group] for group in groups] + ([list(groups)] if len(groups) > 1 else [])
    choices: list[Choice] = []
    refusals: list[Refusal] = []
    for each in sets:
        try:
            choices += choices_of(job, each, gpus_per_host, network_gbit)
        except ConfigError as error:
            refusals.append(Refusal(gpus=_counts(each), reason=str(error)))
    best = max(choices, key=lambda choice: choice.tokens_per_second, default=None)
    if best is None:
        raise ConfigError("; ".join(dict.fromkeys(refusal.reason for refusal in refusals)))
    scaling: list[Choice] = []
    if up_to:
        fastest = max(groups, key=lambda group: (group.profile.name in best.gpus, group.profile.bf16_flops))
        scaling = list(_scaled(job, fastest.profile, gpus_per_host, network_gbit, up_to))
    return Plan(model=job.model, recommended=best, choices=choices, refusals=refusals, scaling=scaling)


def choices_of(job: Job, groups: Sequence[GpuGroup], gpus_per_host: int, network_gbit: float) -> list[Choice]:
    """The best micro-batch of each strategy that fits these GPUs, all of them training together.

    Raises:
        ConfigError: none fits, or the global batch cannot be dealt evenly.
    """
    workers = sum(group.count for group in groups)
    within = min(gpus_per_host, *(group.count for group in groups), workers)
    ways = layouts_of(workers, within)
    best = [_best(job, groups, layout, network_gbit) for layout in ways]
    found = [choice for choice in best if choice is not None]
    if found:
        return found
    smallest = min(group.profile.memory_bytes for group in groups)
    needs = min(
        _needed(job, _recipe(job, workers, layout.shards, 1, "full", min(CHUNK_TOKENS, job.sequence_length)))
        for layout in ways
    )
    raise ConfigError(
        f"{job.model} needs {size(needs)} of a GPU at micro-batch 1 with everything recomputed"
        f"{' and its layers shared by all' if workers > 1 else ''}, and {' + '.join(map(str, groups))} have "
        f"{size(smallest)}: take more GPUs, larger ones, or a shorter "
        f"--sequence-length than {job.sequence_length}"
    )


def _best(job: Job, groups: Sequence[GpuGroup], layout: Layout, network_gbit: float) -> Choice | None:
    rows = _rows_a_gpu(job, layout.gpus)
    limit = min(group.profile.memory_bytes for group in groups)
    found = []
    for micro_batch in (each for each in MICRO_BATCHES if rows % each == 0):
        for mode in MODES:
            recipe = _recipe(job, layout.gpus, layout.shards, micro_batch, mode, CHUNK_TOKENS)
            if _needed(job, recipe) <= limit:
                found.append(_choice(job, groups, layout, network_gbit, recipe, rows // micro_batch))
                break  # a mode that recomputes more is slower
    return max(found, key=lambda choice: choice.tokens_per_second, default=None)


def _choice(
    job: Job, groups: Sequence[GpuGroup], layout: Layout, network_gbit: float, recipe: Recipe, accumulation: int
) -> Choice:
    predictions = []
    for profile in (group.profile for group in groups):
        seconds, source = _one_gpu(job, recipe, profile, accumulation)
        work = Work(job.shape, recipe, accumulation, seconds, profile.bandwidth_bytes_per_second)
        predictions.append((predict(work, layout, Links.of(profile, network_gbit)), source))
    slowest, source = max(predictions, key=lambda each: each[0].step_seconds)
    if layout.gpus > 1 and source == "measured":
        source = "from a measured step"
    rows = layout.gpus * recipe.rows * accumulation
    steps = ceil(ceil(job.rows / rows) * job.epochs) if job.rows is not None else None
    network = _network_bytes(slowest)
    network_bytes_per_second = Links.of(groups[0].profile, network_gbit).network_bytes_per_second
    return Choice(
        gpus=_counts(groups),
        strategy=layout.strategy,
        shards=layout.shards,
        workers=layout.gpus,
        hosts=layout.hosts,
        micro_batch_size=recipe.rows,
        accumulation_steps=accumulation,
        activation_checkpointing=recipe.checkpointing,
        memory_bytes=_needed(job, recipe),
        memory_limit_bytes=min(group.profile.memory_bytes for group in groups),
        step_seconds=slowest.step_seconds,
        tokens_per_second=rows * job.sequence_length / slowest.step_seconds,
        efficiency=slowest.efficiency,
        gathered_bytes=slowest.gathered_bytes,
        averaged_bytes=slowest.averaged_bytes,
        network_bytes=network,
        network_share=min(1.0, network / (network_bytes_per_second * slowest.step_seconds)),
        steps=steps,
        hours=steps * slowest.step_seconds / 3600 if steps is not None else None,
        source=source,
    )


def _scaled(job: Job, profile: GpuProfile, gpus_per_host: int, network_gbit: float, up_to: int) -> Iterator[Choice]:
    """Every strategy on 2, 4, 8 … GPUs of a type, where it fits and each GPU has the rows of `ROWS_A_GPU`."""
    each_gpu = replace(job, global_batch_size=None)
    for layout in layouts(gpus_per_host, up_to):
        choice = _best(each_gpu, [GpuGroup(layout.gpus, profile)], layout, network_gbit)
        if choice is not None:
            yield choice


def _one_gpu(job: Job, recipe: Recipe, profile: GpuProfile, accumulation: int) -> tuple[float, Source]:
    if measured := measured_step(profile, job.shape, recipe):
        return accumulation * measured.step_seconds, "measured"
    seconds = step_seconds(job.shape, recipe, profile, min(job.document_tokens, job.sequence_length), accumulation)
    return seconds, "predicted" if any(step.gpu == profile.name for step in MEASURED) else "guessed"


def _recipe(job: Job, workers: int, shards: int, rows: int, mode: str, chunk_tokens: int) -> Recipe:
    return Recipe(
        base_precision=job.base_precision,
        precision="bf16",
        rank=job.rank,
        trainable_parameters=job.shape.lora_parameters(job.rank, True, job.shape.num_hidden_layers),
        rows=rows,
        sequence_length=job.sequence_length,
        checkpointing=mode,  # type: ignore[arg-type]
        chunk_tokens=chunk_tokens,
        workers=workers,
        shards=shards,
    )


def _needed(job: Job, recipe: Recipe) -> int:
    return round(training_memory(job.shape, recipe).total * (1 + MARGIN))


def _rows_a_gpu(job: Job, gpus: int) -> int:
    if job.global_batch_size is None:
        return ROWS_A_GPU
    if job.global_batch_size % gpus:
        raise ConfigError(
            f"--global-batch-size {job.global_batch_size} rows cannot be dealt evenly to {gpus} GPUs: take a multiple "
            f"of {gpus}"
        )
    return job.global_batch_size // gpus


def _network_bytes(prediction: Prediction) -> int:
    """Of a ring over hosts every GPU's bytes pass each host's network once."""
    layout = prediction.layout
    gathered = prediction.gathered_bytes if layout.shards > layout.gpus_per_host else 0
    return gathered + (prediction.averaged_bytes if layout.hosts > 1 else 0)


def _counts(groups: Sequence[GpuGroup]) -> dict[str, int]:
    return {group.profile.name: group.count for group in groups}
