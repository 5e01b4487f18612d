"""The settings that a run began with: kept in its folder, and held against those that it goes on with."""

from __future__ import annotations

import json
from typing import Any

from cluster.config import ConfigError
from cluster.storage import Storage
from training.config import TrainingConfig

FILE = "config.json"

SAFE: dict[str, frozenset[str]] = {
    "model": frozenset({"attention", "compile"}),
    "batch": frozenset(
        {
            "micro_batch_size",
            "accumulation_steps",
            "global_batch_size",
            "activation_checkpointing",
            "activation_offload",
        }
    ),
    "loss": frozenset({"chunk_tokens"}),
    "workers": frozenset(
        {
            "count",
            "gpus",
            "cpus",
            "retries",
            "strategy",
            "gpu_type",
            "mixed",
            "minimum",
            "growth_seconds",
            "wait_seconds",
        }
    ),
    "optimizer": frozenset({"tolerated_skips"}),
    "run": frozenset(
        {
            "storage",
            "logging_steps",
            "saving_steps",
            "evaluation_steps",
            "evaluation_answers",
            "answer_tokens",
            "best_metric",
            "patience",
            "minimum_improvement",
            "keep_checkpoints",
            "keep_best",
            "export",
            "tracker",
        }
    ),
}
"""settings that may differ when a run goes on, by section: they say where and how fast it computes, not what. Any other
would make two halves of one run disagree"""


def claim(storage: Storage, config: TrainingConfig) -> TrainingConfig:
    """Save the settings of a new run, or take up the run that began in `storage`.

    Returns the settings to go on with: rows of a step are those that the run began with, on however many workers.

    Raises:
        ConfigError: the run of this name began with other settings; the message names all of them, and those that may
            change.
        StorageError: the storage cannot be read or written.
    """
    if not storage.exists(FILE):
        settled = _with_global_batch(config, config.global_batch_size)
        text = json.dumps(settled.model_dump(mode="json"), indent=2) + "\n"
        storage.write(FILE, text.encode())
        return settled
    began = _read(storage)
    rows = began.get("batch", {}).get("global_batch_size")
    asked = config.batch.global_batch_size
    settled = config if asked or not rows else _with_global_batch(config, rows)
    differing = [
        f"{section}.{key} = {began.get(section, {}).get(key)!r}, not {value!r}"
        for section, values in settled.model_dump(mode="json").items()
        for key, value in values.items()
        if began.get(section, {}).get(key) != value and key not in SAFE.get(section, ())
    ]
    if asked and rows and asked != rows:
        differing.append(f"batch.global_batch_size = {rows}, not {asked}")
    if differing:
        safe = ", ".join(f"{section}.{key}" for section, keys in SAFE.items() for key in sorted(keys))
        raise ConfigError(
            f"the run {config.run.name} in {config.run.storage} began with {'; '.join(differing)}: give another "
            f"run.name, or remove {storage} to begin again (what may change in a run is {safe})"
        )
    return settled


def _with_global_batch(config: TrainingConfig, rows: int) -> TrainingConfig:
    return config.model_copy(update={"batch": config.batch.model_copy(update={"global_batch_size": rows})})


def _read(storage: Storage) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(storage.read(FILE))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{storage}/{FILE} is no JSON object: restore it, or remove {storage} to begin again")
    return found
