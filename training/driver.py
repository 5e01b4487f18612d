"""Runs a fine-tuning run on a Ray cluster: preflight, Ray Train, and the adapter that comes out."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.config import ConfigError
from cluster.imports import importing
from cluster.joining import join
from cluster.model import ModelShape
from cluster.placement import GpuNode, describe_nodes, gpu_nodes, room, workers_per_node
from cluster.storage import Storage, below, is_uri, without_secrets
from training.claim import claim
from training.config import TrainingConfig
from training.data.documents import require_trained_tokens
from training.data.places import absolute
from training.data.prepare import MANIFEST as PREPARED
from training.data.prepare import Prepared, prepare, read_prepared
from training.elastic import ElasticPolicy, ElasticTrainer
from training.folders import exported, run_folder
from training.gpu_types import Chosen, choose_type
from training.scratch import scratch_folder
from training.stopping import stopping_by_signal
from training.strategy import choose_strategy
from training.waiting import Watch, await_cluster

WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""with Ray's print patch every line of a worker reaches the driver twice; expandable segments keep the allocator from
losing memory between the large matrices that come and go in each layer"""


class RunFailed(RuntimeError):  # noqa: N818
    """The run ended on something that another try would meet again; the message is one sentence."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    adapter: str | None
    """where the finished adapter lies; None when the run was stopped before its end"""
    step: int = 0
    """that was saved last, where it was stopped"""
    exit_code: int = 0
    """130 or 143 after a signal"""


def run(config: TrainingConfig) -> Outcome:
    """Train, or go on with the run of this name.

    Raises:
        ConfigError: the cluster lacks what the run asks for, the storage cannot be written, or the name belongs to a
            run with other settings.
        RunFailed: the workers met an error that one sentence tells.
        ray.train.TrainingFailedError: a worker failed more often than `workers.retries`.
    """
    config = locate(config)
    storage = run_folder(config)
    with _writing(config.run.storage):
        Storage.at(config.run.storage).probe()
        config = claim(storage, config)
        if adapter := exported(storage):
            return Outcome(adapter)
    connect()
    each = resources_per_worker(config)
    chosen = await_cluster(config.workers.wait_seconds, each, config.least_workers, lambda: _find_place(config))
    if chosen.why:
        print(f"GPUs      {chosen.why}", flush=True)
    check_memory(config, chosen.among(gpu_nodes(ray.nodes())))
    with stopping_by_signal() as stop:
        data = prepare_data(config)
        trainer = _trainer(config, chosen.accelerator_type, stop.request)(
            train_loop,
            train_loop_config={"config": config.model_dump(mode="json"), **data},
            scaling_config=scaling(config, chosen.accelerator_type),
            run_config=RunConfig(
                name=config.run.name,
                storage_path=ray_folder(config.run.storage),
                failure_config=FailureConfig(max_failures=config.workers.retries),
                logging_config=LoggingConfig(log_level="WARNING"),
                worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
                callbacks=[stop.callback],
            ),
        )
        end = stop.run(trainer.fit, Watch(config, each, stop.request)).return_value
    if end["error"]:
        raise RunFailed(end["error"])
    if end["stopped"]:
        return Outcome(None, end["step"], stop.exit_code)
    with _writing(config.run.storage):
        return Outcome(_export(storage, config, data))


def _trainer(config: TrainingConfig, accelerator_type: str | None, request: Any) -> Callable[..., TorchTrainer]:
    """Ray Train's trainer, or for a run that may have fewer workers than all one that shrinks and grows."""
    trainer: Callable[..., TorchTrainer] = TorchTrainer
    if config.least_workers == config.workers.count:
        return trainer
    policy = ElasticPolicy(scaling(config, accelerator_type), config.workers.growth_seconds, request)
    return partial(ElasticTrainer, policy=policy)


def train_loop(raw: dict[str, Any]) -> dict[str, Any]:
    """`training.worker.train_loop`, whose libraries take seconds to import: the driver and Ray's controller do not."""
    with importing():
        from training import worker

    return worker.train_loop(raw)


def _export(storage: Storage, config: TrainingConfig, data: dict[str, Any]) -> str:
    with importing():
        from training.checkpoints.store import open_store
        from training.export import export_adapter

    return export_adapter(storage, open_store(config), config, data_of(data))


def ray_folder(storage: str) -> str:
    """Where Ray Train keeps what little it writes itself, for checkpoints are ours: it tries a storage only once."""
    return str(Path(tempfile.gettempdir()) / f"ray-train-{os.getuid()}") if is_uri(storage) else storage


def prepare_data(config: TrainingConfig) -> dict[str, Any]:
    """Places of the shards for `train` and `evaluation`, made by a Ray Data job or found, None where there is no data;
    and under `prepared` and `prepared_evaluation` their manifests.

    Raises:
        DataError: a record is broken, or no token of the data is trained.
    """
    places: dict[str, Any] = {}
    for name in ("train", "evaluation"):
        path = getattr(config.data, name)
        places[name] = None
        if path is None:
            continue
        with _writing(config.run.storage):
            places[name], prepared = _prepared(path, config)
        require_trained_tokens(path, prepared.counts, config.data)
        places["prepared" if name == "train" else f"prepared_{name}"] = prepared.model_dump(mode="json")
    return places


def data_of(prepared: dict[str, Any]) -> dict[str, Prepared]:
    """What was prepared for `train` and, where there is such data, for `evaluation`, of `prepare_data`."""
    found = {"train": prepared.get("prepared"), "evaluation": prepared.get("prepared_evaluation")}
    return {name: Prepared.model_validate(manifest) for name, manifest in found.items() if manifest}


def _prepared(path: str, config: TrainingConfig) -> tuple[str, Prepared]:
    """Where the shards of `path` lie, and their manifest. For a storage other than a folder they are made here."""
    storage, arguments = config.run.storage, (path, config.data, config.model.path)
    if not is_uri(storage):
        folder = prepare(*arguments, storage, config.run.seed)
        return str(folder), read_prepared(folder)
    with scratch_folder() as scratch:
        folder = prepare(*arguments, str(scratch), config.run.seed, spread=False)
        there = Storage.at(storage).child("prepared").child(folder.name)
        files = sorted(folder.iterdir(), key=lambda file: (file.name == PREPARED, file.name))
        if not there.exists(PREPARED):
            for file in files:
                there.write(file.name, file.read_bytes())
        return below(storage, f"prepared/{folder.name}"), read_prepared(folder)


def locate(config: TrainingConfig) -> TrainingConfig:
    """The configuration with paths that hold in every process.

    Storage becomes absolute. Inside a Ray job every process stands in its copy of the working directory, so the
    others may stay relative; elsewhere they become absolute too.

    Raises:
        ConfigError: storage is relative inside a job, or no storage at all.
    """
    storage = config.run.storage
    if not is_uri(storage):
        expanded = Path(storage).expanduser()
        if inside_job() and not expanded.is_absolute():
            raise ConfigError(
                f"run.storage = {storage!r} would lie in the job's copy of the working directory, which goes away with "
                "it: give an absolute folder that every node reaches, or a storage URI"
            )
        storage = str(expanded.absolute())
    run = config.run.model_copy(update={"storage": storage})
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
    """Join the cluster of `RAY_ADDRESS` or of this job, or start one on this machine that ends with this process.

    Raises:
        ConfigError: the cluster of `RAY_ADDRESS` does not answer, or does not let this process in.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"runtime_env": {} if inside_job() else {"env_vars": import_paths()}}
    options["logging_level"] = logging.WARNING
    address = os.environ.get("RAY_ADDRESS")
    if address:
        join(address, "RAY_ADDRESS", **options)
    else:
        ray.init(**options)


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


def scaling(config: TrainingConfig, accelerator_type: str | None) -> ScalingConfig:
    """What Ray Train starts: all workers, or from the fewest to the most, on one GPU type where one is given."""
    least, most = config.least_workers, config.workers.count
    return ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu=config.workers.gpus > 0,
        resources_per_worker=resources_per_worker(config),
        accelerator_type=accelerator_type,
    )


def check_resources(config: TrainingConfig, cluster: dict[str, float]) -> None:
    """Say what the cluster lacks, instead of waiting for it without end.

    Raises:
        ConfigError: the workers, or the fewest that may be, together need more CPUs or GPUs than all nodes have.
    """
    name = "workers.count" if config.workers.minimum is None else "workers.minimum"
    for kind, each in resources_per_worker(config).items():
        needed, there = each * config.least_workers, cluster.get(kind, 0.0)
        if needed > there:
            raise ConfigError(
                f"{name} = {config.least_workers} with {each:g} {kind} each needs {needed:g} {kind}, and the "
                f"cluster has {there:g}: start more nodes, or lower {name} or workers.{kind.lower()}s"
            )


def check_room(config: TrainingConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Say that workers do not fit the nodes, each of which may have too little though all together have enough.

    Args:
        config: of the run.
        nodes: what each has of Ray's resources.

    Raises:
        ConfigError: they do not.
    """
    each = resources_per_worker(config)
    fitting = room(nodes, each)
    if fitting < config.least_workers:
        asked = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items())
        raise ConfigError(
            f"{config.least_workers} workers with {asked} each do not fit the nodes, which have room for {fitting}: a "
            "worker lies on one node; start other nodes, or lower workers.cpus or workers.gpus"
        )


def _find_place(config: TrainingConfig) -> Chosen:
    """The GPU type that the run takes, of a cluster that has enough for it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    check_resources(config, ray.cluster_resources())
    check_room(config, [node["Resources"] for node in nodes])
    return choose_type(config, gpu_nodes(nodes))


def check_memory(config: TrainingConfig, nodes: Sequence[GpuNode]) -> None:
    """Say which strategy the workers will choose, by the types of the cluster's GPUs, as far as they are known.

    Workers decide by the memory that they find. A type that comes in several sizes is taken for the largest here.

    Raises:
        ConfigError: the model does not fit the cluster's GPUs in any way; the message says what would be enough.
    """
    sizes = [node.memory_bytes for node in nodes if node.gpus >= config.workers.gpus]
    if not config.workers.gpus or not Path(config.model.path).is_dir() or None in sizes or not sizes:
        return
    shape = ModelShape.from_folder(config.model.path)
    config = config.with_workers(min(config.workers.count, sum(node.gpus // config.workers.gpus for node in nodes)))
    together = workers_per_node(nodes, config.workers.count, config.workers.gpus)
    try:
        strategy = choose_strategy(config, shape, together, min(filter(None, sizes)))
    except ConfigError as error:
        raise ConfigError(f"{error} (the cluster has {describe_nodes(nodes)})") from None
    print(f"cluster   {describe_nodes(nodes)}: {strategy.reason}", flush=True)


@contextmanager
def _writing(storage: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.storage = {without_secrets(storage)!r} cannot be used ({error}): give a folder that every node may "
            "write to, or the URI of such a storage"
        ) from None
