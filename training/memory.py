"""Does a run fit its GPU? The choice of activation checkpointing by arithmetic. No torch, no ray."""

from __future__ import annotations

from cluster.config import ConfigError
from cluster.memory import MARGIN, MODES, Recipe, TrainingMemory, size, training_memory
from cluster.model import Checkpointing, ModelShape
from training.config import TrainingConfig
from training.exchange import shared_experts_memory


def choose_checkpointing(
    config: TrainingConfig, shape: ModelShape, memory_bytes: int | None, shards: int = 1
) -> tuple[Checkpointing, str]:
    """What `batch.activation_checkpointing` comes to on a worker, and a sentence that says why.

    A mode that is set is taken as it is. `auto` is "none" without a GPU, else the first of none, experts and full whose
    memory and margin fit.

    Args:
        config: of the run.
        shape: of its model.
        memory_bytes: of the worker's GPU, as CUDA reports the total; None without a GPU.
        shards: workers that share one copy of the base; see `training.strategy`.

    Raises:
        ConfigError: `auto`, and not even "full" fits; or `lora.expert_layers` names a layer that the model lacks.
        ValueError: `auto` on a GPU whose memory is not given.
    """
    chosen = config.batch.activation_checkpointing
    if chosen != "auto":
        return (
            chosen,
            f"{chosen}: as batch.activation_checkpointing says{_against(config, shape, chosen, memory_bytes, shards)}",
        )
    if config.workers.gpus == 0:
        return "none", "none: there is no GPU to fit"
    if memory_bytes is None:
        raise ValueError("activation_checkpointing = auto needs the memory of the GPU")
    for mode in MODES:
        if needed_bytes(config, shape, mode, shards) <= memory_bytes:
            return mode, f"{mode}: auto{_against(config, shape, mode, memory_bytes, shards)}"
    raise ConfigError(_does_not_fit(config, shape, memory_bytes, shards))


def memory_of(config: TrainingConfig, shape: ModelShape, mode: Checkpointing, shards: int = 1) -> TrainingMemory:
    """Memory of one worker's step by the run's settings, with activation checkpointing `mode`.

    Raises:
        ConfigError: `lora.expert_layers` names a layer that the model does not have.
    """
    recipe, workers = recipe_of(config, shape, mode, shards), config.expert_workers
    if workers == 1:
        return training_memory(shape, recipe)
    of_experts = shape.lora_parameters(config.lora.rank, False, adapted_expert_layers(config, shape))
    return shared_experts_memory(shape, recipe, of_experts, workers)


def recipe_of(config: TrainingConfig, shape: ModelShape, mode: Checkpointing, shards: int = 1) -> Recipe:
    """The run's settings in the terms of `cluster.memory`.

    Raises:
        ConfigError: as `memory_of`.
    """
    eager = config.model.attention == "eager" or (config.model.attention == "auto" and config.workers.gpus == 0)
    return Recipe(
        base_precision=config.model.base_precision,
        precision=config.model.precision,
        rank=config.lora.rank,
        trainable_parameters=trainable_parameters(config, shape),
        rows=config.batch.rows,
        sequence_length=config.data.sequence_length,
        checkpointing=mode,
        chunk_tokens=config.loss.chunk_tokens,
        merged_expert_layers=None if config.model.experts == "grouped_lora" else adapted_expert_layers(config, shape),
        eager_attention=eager,
        offload=config.batch.activation_offload,
        workers=config.workers.count,
        shards=shards,
    )


def needed_bytes(config: TrainingConfig, shape: ModelShape, mode: Checkpointing, shards: int = 1) -> int:
    """Memory that a worker's GPU must have: `memory_of` and the margin."""
    return round(memory_of(config, shape, mode, shards).total * (1 + MARGIN))


def trainable_parameters(config: TrainingConfig, shape: ModelShape) -> int:
    """Parameters of the run's adapters.

    Raises:
        ConfigError: as `memory_of`.
    """
    return shape.lora_parameters(config.lora.rank, config.lora.attention, adapted_expert_layers(config, shape))


def adapted_expert_layers(config: TrainingConfig, shape: ModelShape) -> int:
    """Number of layers whose experts are adapted.

    Raises:
        ConfigError: as `memory_of`.
    """
    layers = config.lora.expert_layers
    if layers == "all":
        return shape.num_hidden_layers
    beyond = [layer for layer in layers if layer >= shape.num_hidden_layers]
    if beyond:
        last = shape.num_hidden_layers - 1
        raise ConfigError(f"lora.expert_layers names layer {beyond[0]}, and {config.model.path} has layers 0 to {last}")
    return len(layers)


def _against(
    config: TrainingConfig, shape: ModelShape, mode: Checkpointing, memory_bytes: int | None, shards: int
) -> str:
    if memory_bytes is None:
        return ""
    needed = needed_bytes(config, shape, mode, shards)
    verdict = "" if needed <= memory_bytes else ", which does not fit by arithmetic"
    return f", {size(needed)} of {size(memory_bytes)}{verdict}"


def remedies(
    config: TrainingConfig, shape: ModelShape, memory_bytes: int, shards: int = 1
) -> tuple[dict[str, int], bool]:
    """Settings that lower a worker's memory, with what each needs then: those that are enough if any is, else all.

    The second value says whether they are enough.
    """
    model, batch, data = config.model, config.batch, config.data
    packed = {"base_precision": "mxfp4", "experts": "grouped_lora"}
    others = {}
    if model.base_precision != "mxfp4":
        others['model.base_precision = "mxfp4"'] = _with(config, "model", **packed)
    if batch.rows > 1:
        others["batch.micro_batch_size = 1"] = _with(config, "batch", micro_batch_size=1)
    half = max(1, data.sequence_length // 2)
    others[f"data.sequence_length = {half}"] = _with(config, "data", sequence_length=half)
    needs = {setting: needed_bytes(other, shape, "full", shards) for setting, other in others.items()}
    enough = {setting: needed for setting, needed in needs.items() if needed <= memory_bytes}
    return (enough, True) if enough else (needs, False)


def _does_not_fit(config: TrainingConfig, shape: ModelShape, memory_bytes: int, shards: int) -> str:
    """The sentence, with what each remedy would come to."""
    model, batch, data = config.model, config.batch, config.data
    settings, enough = remedies(config, shape, memory_bytes, shards)
    shared = f" and its layers shared by {shards} workers" if shards > 1 else ""
    shared += f" and its experts by {config.expert_workers} workers" if config.expert_workers > 1 else ""
    offers = " or ".join(f"{setting} ({size(needed)})" for setting, needed in settings.items())
    return (
        f"{model.path} needs {size(needed_bytes(config, shape, 'full', shards))} even with activation_checkpointing = "
        f'"full"{shared}, and the GPU has '
        f"{size(memory_bytes)} ({memory_of(config, shape, 'full', shards)}, and {MARGIN:.0%} of margin, with "
        f'model.base_precision = "{model.base_precision}", batch.micro_batch_size = {batch.micro_batch_size} and '
        f"data.sequence_length = {data.sequence_length}): "
        + (f"set {offers}, or use" if enough else f"{offers} would not be enough either, so use")
        + " a GPU with more memory"
    )


def _with(config: TrainingConfig, section: str, **fields: object) -> TrainingConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})
