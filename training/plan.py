"""What a run will do, worked out on the driver before anything is booked. No torch, no ray."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.artifacts import ArtifactError, check_checkpoint
from cluster.config import ConfigError
from cluster.harmony import Codec
from cluster.memory import MARGIN, MODES, size, step_gather_bytes
from cluster.model import Checkpointing, ModelShape
from cluster.storage import without_secrets
from training.config import TrainingConfig
from training.data.documents import Counts, require_documents, require_trained_tokens
from training.data.names import is_hub_id
from training.data.prepare import PART_BYTES, packed_rows
from training.data.sources import parts
from training.memory import memory_of, needed_bytes, recipe_of, trainable_parameters
from training.strategy import check_experts, describe

OPTIONAL_TRACKERS = ("trackio", "wandb", "mlflow")
"""trackers whose package, of the same name, this project does not install"""


@dataclass(frozen=True)
class Plan:
    """Counts and sizes of a run. `shape` is None for a hub model that the driver has not downloaded."""

    config: TrainingConfig
    data: Counts | None
    rows: int | None
    steps: int | None
    shape: ModelShape | None
    trainable_parameters: int | None

    def __str__(self) -> str:
        """Lines for a person."""
        config, workers = self.config, self.config.workers
        checkpoints = f"{without_secrets(config.run.storage)}/{config.run.name}/checkpoints"
        device = f"{workers.gpus} {workers.gpu_type or 'GPU'}" if workers.gpus else f"{workers.cpus} CPU"
        lines = [
            f"run       {config.run.name} in {without_secrets(config.run.storage)}",
            f"workers   {workers.count} × {device}",
            f"batch     {config.global_batch_size} rows a step: {_shares(config)} {workers.count} workers",
            f"saving    every {config.run.saving_steps} steps below {checkpoints}: the last "
            f"{config.run.keep_checkpoints}"
            + (" and the best" if config.run.keep_best and config.data.evaluation else ""),
        ]
        if self.shape:
            lines.append(
                f"model     {config.model.path}: {self.shape.parameters / 1e6:,.1f} M parameters, "
                f"{self.shape.active_parameters / 1e6:,.1f} M active, experts in {config.model.base_precision}, "
                f"the rest in {config.model.precision}"
            )
            lines += _memory_lines(config, self.shape)
        else:
            lines.append(f"model     {config.model.path}, fetched from the hub by the workers")
        if self.trainable_parameters:
            lines.append(
                f"adapters  rank {config.lora.rank}: {self.trainable_parameters / 1e6:.2f} M trainable parameters"
            )
        if self.data and self.rows:
            trained = self.data.trained(config.data.train_on)
            lines.append(
                f"data      {self.data['conversations']} conversations, {self.data['tokens']:,} tokens, "
                f"{trained / self.data['tokens']:.0%} of them trained, longest {self.data['longest']}"
            )
            room = self.rows * config.data.sequence_length
            shape = (
                f"of {config.data.sequence_length} tokens, {self.data['tokens'] / room:.1%} full"
                if config.data.packing
                else "of one conversation each, padded to the longest of a batch"
            )
            lost = "".join(f", {self.data[what]} {what}" for what in ("split", "dropped") if self.data[what])
            lines.append(f"rows      {self.rows} {shape}{lost}")
        elif self.config.data.train:
            lines.append(f"data      {config.data.train}: counted when the run prepares it")
        if self.steps:
            lines.append(f"steps     {self.steps}")
        return "\n".join(lines)


def make_plan(config: TrainingConfig) -> Plan:
    """Read model and data as the workers will, and count.

    Raises:
        ArtifactError, DataError, ConfigError, ValueError: something that would stop the run, in one sentence.
    """
    tracker = config.run.tracker
    if tracker in OPTIONAL_TRACKERS and importlib.util.find_spec(tracker) is None:
        raise ConfigError(f"run.tracker = {tracker!r} needs the package {tracker}: pip install {tracker}")
    if not Path(config.model.path).is_dir():
        return Plan(config, None, None, config.run.maximum_steps, None, None)
    shape = check_checkpoint(config.model.path)
    check_experts(config, shape)
    codec = _codec(config.model.path)
    if config.data.evaluation:
        _count(config, config.data.evaluation, codec)
    data, rows = _count(config, config.data.train, codec)
    steps = config.run.maximum_steps if rows is None else _steps(config, rows)
    return Plan(config, data, rows, steps, shape, trainable_parameters(config, shape))


def _count(config: TrainingConfig, path: str, codec: Codec) -> tuple[Counts | None, int | None]:
    """What the data amounts to and its rows; None for both where the data is too large to be read twice.

    Raises:
        DataError: a record is broken, or nothing would be trained.
    """
    pieces = parts(path, PART_BYTES)
    if len(pieces) > 1 or is_hub_id(path):
        return None, None
    counts = Counts()
    rows = sum(1 for _ in packed_rows(pieces[0], 0, config.data, codec, config.run.seed, counts))
    require_documents(path, counts)
    require_trained_tokens(path, counts, config.data)
    return counts, rows


def _codec(folder: str) -> Codec:
    try:
        return Codec.from_folder(folder)
    except ValueError as error:
        raise ArtifactError(f"{Path(folder) / 'tokenizer.json'}: {error}") from None


def _steps(config: TrainingConfig, rows: int) -> int:
    """Optimizer steps, as `training.data.order` makes them: an epoch's last step may have fewer rows."""
    per_epoch = math.ceil(rows / config.global_batch_size)
    return config.run.maximum_steps or math.ceil(per_epoch * config.run.epochs)


def _shares(config: TrainingConfig) -> str:
    if config.batch.micro_batch_size == "auto":
        return "micro-batches of as many as fit, which the workers find out, on each of"
    if config.workers.mixed == "proportional":
        return f"micro-batches of up to {config.batch.micro_batch_size}, dealt by what each GPU takes for one to"
    return f"{config.accumulation} × up to {config.batch.micro_batch_size} on each of"


def _memory_lines(config: TrainingConfig, shape: ModelShape) -> list[str]:
    """What a worker's device must hold, by arithmetic. Which GPU it will have, the driver cannot know."""
    chosen = config.batch.activation_checkpointing
    decided = chosen if chosen != "auto" else "none" if config.workers.gpus == 0 else None
    known = _known_shards(config)
    mode, shards, who = decided or MODES[0], known or 1, "a worker" if known else "a worker with the whole base"
    parts = f"          with {mode}: {memory_of(config, shape, mode, shards)}"
    needs = {mode: size(needed_bytes(config, shape, mode, shards)) for mode in MODES}
    offers = ", ".join(f"{need} with {mode}" for mode, need in needs.items())
    needed = (
        f"memory    {who} needs {needs[decided]} for model and step, with a margin of {MARGIN:.0%}"
        if decided
        else f"memory    {who} needs {offers}: activation_checkpointing auto takes the first that its GPU has"
    )
    return [needed, parts, _strategy_line(config, shape, decided or MODES[-1])]


def _known_shards(config: TrainingConfig) -> int | None:
    """Workers that share a copy of the base, where that depends on neither the GPU nor the nodes."""
    workers = config.workers
    if workers.strategy == "sharded":
        return workers.count
    if (
        workers.count == 1
        or workers.strategy in ("data_parallel", "expert_parallel")
        or (workers.strategy, workers.gpus) == ("auto", 0)
    ):
        return 1
    return None


def _strategy_line(config: TrainingConfig, shape: ModelShape, mode: Checkpointing) -> str:
    """What becomes of the base, or what each choice would come to; how many workers a node has is the cluster's to say.

    Args:
        config: of the run.
        shape: of its model.
        mode: of activation checkpointing with which the choices are weighed.
    """
    asked, known = config.workers.strategy, _known_shards(config)
    if known is not None:
        name = asked if asked != "auto" else "data_parallel"
        why = "" if asked != "auto" else ", as auto is " + ("with one worker" if config.workers.gpus else "on a CPU")
        sharing = max(known, config.expert_workers)
        over = f" over {sharing} workers" if sharing > 1 else ""
        return f"strategy  {name}{over}{why}: {describe(config, shape, known)}"
    whole = [] if asked == "hybrid" else [f"{size(needed_bytes(config, shape, mode))} with the whole base"]
    shared = [
        _shared_need(config, shape, mode, shards)
        for shards in range(2, config.workers.count + 1)
        if config.workers.count % shards == 0 and config.can_shard
    ]
    rule = (
        "hybrid shares it among the workers of a node"
        if asked == "hybrid"
        else "auto takes the first that its GPU has of data_parallel, hybrid (shared by the workers of a node) and "
        "sharded (by all)"
    )
    return f"strategy  with {mode} a worker needs {', '.join(whole + shared)}: {rule}"


def _shared_need(config: TrainingConfig, shape: ModelShape, mode: Checkpointing, shards: int) -> str:
    gathered = step_gather_bytes(shape, recipe_of(config, shape, mode, shards), config.accumulation)
    needed = size(needed_bytes(config, shape, mode, shards))
    return f"{needed} with one shared by {shards} ({size(gathered)} gathered a step)"
