"""What a run will do, worked out on the driver before anything is booked. No torch, no ray."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from cluster.artifacts import ArtifactError, check_checkpoint
from cluster.config import ConfigError
from cluster.harmony import Codec
from cluster.model import ModelShape
from training.config import TrainingConfig
from training.data.rows import RowCount, count_rows, read_rows

OPTIONAL_TRACKERS = ("trackio", "wandb", "mlflow")
"""trackers whose package, of the same name, this project does not install"""
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Plan:
    """Counts and sizes of a run. `shape` is None for a hub model that the driver has not downloaded."""

    config: TrainingConfig
    data: RowCount | None
    steps: int | None
    shape: ModelShape | None
    trainable_parameters: int | None

    def __str__(self) -> str:
        """Lines for a person."""
        config, workers = self.config, self.config.workers
        device = f"{workers.gpus} GPU" if workers.gpus else f"{workers.cpus} CPU"
        lines = [
            f"run       {config.run.name} in {config.run.storage}",
            f"workers   {workers.count} × {device}",
            f"batch     {config.batch.micro_batch_size} × {config.batch.accumulation_steps} accumulated × "
            f"{workers.count} workers = {config.global_batch_size} conversations a step",
        ]
        if self.shape:
            weights = self.shape.parameters * BYTES[config.model.precision] / 2**30
            lines.append(
                f"model     {config.model.path}: {self.shape.parameters / 1e6:,.1f} M parameters, "
                f"{self.shape.active_parameters / 1e6:,.1f} M active, {weights:.2f} GiB a worker in "
                f"{config.model.precision}"
            )
        else:
            lines.append(f"model     {config.model.path}, fetched from the hub by the workers")
        if self.trainable_parameters:
            lines.append(
                f"adapters  rank {config.lora.rank}: {self.trainable_parameters / 1e6:.2f} M trainable parameters"
            )
        if self.data:
            lines.append(
                f"data      {self.data.conversations} conversations, {self.data.tokens:,} tokens, "
                f"{self.data.trained_tokens / self.data.tokens:.0%} of them trained, longest {self.data.longest}"
            )
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
        return Plan(config, None, config.run.maximum_steps, None, None)
    shape = check_checkpoint(config.model.path)
    codec = _codec(config.model.path)
    data = count_rows(read_rows(config.data.train, codec, config.data))
    if config.data.evaluation:
        count_rows(read_rows(config.data.evaluation, codec, config.data))
    return Plan(config, data, _steps(config, data.conversations), shape, _trainable(config, shape))


def _codec(folder: str) -> Codec:
    try:
        return Codec.from_folder(folder)
    except ValueError as error:
        raise ArtifactError(f"{Path(folder) / 'tokenizer.json'}: {error}") from None


def _steps(config: TrainingConfig, conversations: int) -> int:
    """Optimizer steps, counted as transformers' Trainer does: a last, smaller batch of an epoch is a step too."""
    passes = math.ceil(math.ceil(conversations / config.workers.count) / config.batch.micro_batch_size)
    per_epoch = math.ceil(passes / config.batch.accumulation_steps)
    return config.run.maximum_steps or math.ceil(per_epoch * config.run.epochs)


def _trainable(config: TrainingConfig, shape: ModelShape) -> int:
    layers = config.lora.expert_layers
    beyond = [layer for layer in layers if layers != "all" and int(layer) >= shape.num_hidden_layers]
    if beyond:
        last = shape.num_hidden_layers - 1
        raise ConfigError(f"lora.expert_layers names layer {beyond[0]}, and {config.model.path} has layers 0 to {last}")
    count = shape.num_hidden_layers if layers == "all" else len(layers)
    return shape.lora_parameters(config.lora.rank, config.lora.attention, count)
