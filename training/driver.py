"""Runs a fine-tuning run on a Ray cluster: preflight, Ray Train, and the adapter that comes out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.artifacts import MANIFEST, publish, write_manifest
from cluster.config import ConfigError
from training.callbacks import CHECKPOINT_FOLDER
from training.config import TrainingConfig
from training.data.documents import require_trained_tokens
from training.data.places import absolute
from training.data.prepare import prepare, read_prepared
from training.worker import train_loop

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""with Ray's print patch every line of a worker reaches the driver twice; expandable segments keep the allocator from
losing memory between the large matrices that come and go in each layer"""
PACKAGES = ("ray", "torch", "transformers", "trl", "peft")
RESUMABLE = frozenset(
    {("run", "logging_steps"), ("run", "keep_checkpoints"), ("run", "tracker"), ("workers", "retries")}
)
"""settings that may differ when a run is resumed; any other would make two halves of one run disagree"""


def run(config: TrainingConfig) -> Path:
    """Train, or resume the run of this name, and return the folder of the finished adapter.

    Raises:
        ConfigError: the cluster lacks what the run asks for, the storage cannot be written, or the name belongs to a
            run with other settings.
        ray.train.TrainingFailedError: a worker failed more often than `workers.retries`.
    """
    config = locate(config)
    folder = Path(config.run.storage) / config.run.name
    adapter = folder / "adapter"
    with _writing(config.run.storage):
        _claim(folder, config)
    if (adapter / MANIFEST).is_file():
        return adapter
    connect()
    check_resources(config, ray.cluster_resources())
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(mode="json"), **prepare_data(config)},
        scaling_config=ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=config.workers.gpus > 0,
            resources_per_worker=resources_per_worker(config),
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=config.run.storage,
            failure_config=FailureConfig(max_failures=config.workers.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=config.run.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError("the run ended without a checkpoint")
    with result.checkpoint.as_directory() as checkpoint, publish(adapter) as scratch:
        for name in ADAPTER_FILES:
            pyarrow.fs.copy_files(str(Path(checkpoint) / CHECKPOINT_FOLDER / name), str(scratch / name))
        details = {"config": config.model_dump(mode="json"), "metrics": result.metrics, "versions": _versions()}
        write_manifest(scratch, "adapter", config.model.path, details)
    return adapter


def prepare_data(config: TrainingConfig) -> dict[str, str | None]:
    """Folders of shards for `train` and `evaluation`, made by a Ray Data job or found; None where there is no data.

    Raises:
        DataError: a record is broken, or no token of the data is trained.
    """
    folders: dict[str, str | None] = {}
    for name in ("train", "evaluation"):
        path = getattr(config.data, name)
        folders[name] = None
        if path is not None:
            with _writing(config.run.storage):
                folder = prepare(path, config.data, config.model.path, config.run.storage, config.run.seed)
            require_trained_tokens(path, read_prepared(folder).counts, config.data)
            folders[name] = str(folder)
    return folders


def locate(config: TrainingConfig) -> TrainingConfig:
    """The configuration with paths that hold in every process.

    Storage becomes absolute. Inside a Ray job every process stands in its copy of the working directory, so the
    others may stay relative; elsewhere they become absolute too.

    Raises:
        ConfigError: storage is a URI, or relative inside a job.
    """
    storage = config.run.storage
    if "://" in storage:
        raise ConfigError(
            f"run.storage = {storage!r} is a storage URI, and runs live in folders: give one that every node reaches"
        )
    expanded = Path(storage).expanduser()
    if inside_job() and not expanded.is_absolute():
        raise ConfigError(
            f"run.storage = {storage!r} would lie in the job's copy of the working directory, which goes away with it: "
            "give an absolute folder that every node reaches"
        )
    run = config.run.model_copy(update={"storage": str(expanded.absolute())})
    if inside_job():
        return config.model_copy(update={"run": run})
    data = {
        name: absolute(path) for name in ("train", "evaluation") if (path := getattr(config.data, name)) is not None
    }
    return config.model_copy(
        update={
            "run": run,
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
        }
    )


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of this job, or start one on this machine that ends with this process."""
    if ray.is_initialized():
        return
    ray.init(runtime_env={} if inside_job() else {"env_vars": import_paths()}, logging_level=logging.WARNING)


def import_paths() -> dict[str, str]:
    """The environment with which every worker finds this project, and whatever this process was told to find."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))}


def inside_job() -> bool:
    """This process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resources_per_worker(config: TrainingConfig) -> dict[str, float]:
    """What Ray reserves for each worker."""
    gpus = {"GPU": float(config.workers.gpus)} if config.workers.gpus else {}
    return {"CPU": float(config.workers.cpus), **gpus}


def check_resources(config: TrainingConfig, cluster: dict[str, float]) -> None:
    """Say what the cluster lacks, instead of waiting for it without end.

    Raises:
        ConfigError: the workers together need more CPUs or GPUs than all nodes have.
    """
    for kind, each in resources_per_worker(config).items():
        needed, there = each * config.workers.count, cluster.get(kind, 0.0)
        if needed > there:
            raise ConfigError(
                f"workers.count = {config.workers.count} with {each:g} {kind} each needs {needed:g} {kind}, and the "
                f"cluster has {there:g}: start more nodes, or lower workers.count or workers.{kind.lower()}s"
            )


@contextmanager
def _writing(storage: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.storage = {storage!r} cannot be written ({error}): give a folder that every node may write to"
        ) from None


def _claim(folder: Path, config: TrainingConfig) -> None:
    """Save the resolved configuration, or hold it against the one that the run of this name began with."""
    path = folder / "config.json"
    wanted = config.model_dump(mode="json")
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    began = json.loads(path.read_text(encoding="utf-8"))
    for section, values in wanted.items():
        for key, value in values.items():
            before = began.get(section, {}).get(key)
            if before != value and (section, key) not in RESUMABLE:
                raise ConfigError(
                    f"the run {config.run.name} in {config.run.storage} began with {section}.{key} = {before!r}, not "
                    f"{value!r}: give another run.name, or remove {folder} to begin again"
                )


def _versions() -> dict[str, Any]:
    return {package: version(package) for package in PACKAGES}
