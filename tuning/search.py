"""Searches for the fastest batch on every GPU type of a cluster at once, with Ray Tune."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.config import ConfigError
from cluster.environment import environment
from cluster.hardware import GIB
from cluster.memory import size
from cluster.model import ModelShape
from cluster.placement import gpu_nodes
from training.config import TrainingConfig
from training.data.prepare import Prepared
from training.driver import check_resources, connect, inside_job, locate, prepare_data
from tuning.config import SearchConfig, TuningConfig
from tuning.expected import expected_speed
from tuning.journal import Journal, Trial, short_hash
from tuning.machines import CPU, Machine, find_machines, probe
from tuning.metrics import SearchMetrics, standing
from tuning.model import base_identity, model_name, model_shape
from tuning.result import Result, configured_or_none, make_result, seed_point
from tuning.space import Space, make_space
from tuning.studies import MedianOfType, Studies, Watchful
from tuning.study import Study
from tuning.supervisor import measure

VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "ray")
GRACE_SECONDS = 60.0
Measure = Callable[[dict[str, Any], dict[str, Any]], None]


def search(
    config: SearchConfig, command: str, trial: Measure = measure, grace_seconds: float = GRACE_SECONDS
) -> list[Result]:
    """Search on every GPU type that is wanted, on all of them at once; every trial is kept in a journal.

    Args:
        config: of the run and the search.
        command: that the user typed, for the record.
        trial: what Ray Tune runs on a type's node, `tuning.supervisor.measure` but in tests.
        grace_seconds: how long all nodes of a type may be gone before the search goes on without it.

    Raises:
        ConfigError: the cluster lacks a type, no point of the space fits it, or the model cannot be read.
        KeyboardInterrupt: the user's; all that had ended is in the journals.
    """
    began = time.monotonic()
    settings, run = config.tuning, locate(config.training)
    check_folders(settings)
    shape, name = model_shape(run.model.path), model_name(run.model.path)
    machines = find_there(run, settings)
    for machine in machines:  # before the data is prepared, which may take long
        _space(machine, run, settings, shape)
    data = prepare_data(run.model_copy(update={"data": run.data.model_copy(update={"evaluation": None})}))
    counts = Prepared.model_validate(data["prepared"]).counts
    documents = max(1, round(counts["tokens"] / max(1, counts["documents"])))
    versions = versions_here()
    folder = Path(settings.storage).expanduser().absolute()
    studies = {}
    for machine in machines:
        identity = identity_of(machine, run, settings, versions, data)
        path = folder / f"{machine.name}-{name}-{short_hash(identity)}.jsonl"
        studies[machine.name] = make_study(machine, run, settings, shape, Journal(path, identity, Trial), documents)
        _announce(studies[machine.name], machine, path)
    if any(study.over is None for study in studies.values()):
        job = make_job(run, settings, data)
        with SearchMetrics(name, studies, standing) as metrics:
            _run(studies, machines, run, settings, job, folder / "tune", trial, grace_seconds, metrics)
    results = []
    for machine in machines:
        result = make_result(studies[machine.name], machine, run, shape, name, versions, command)
        results.append(result)
        print(result.line(time.monotonic() - began), flush=True)
    return results


def check_folders(settings: TuningConfig) -> None:
    """See that what is written outlives a job.

    Raises:
        ConfigError: a folder is relative inside a job.
    """
    for key in ("storage", "profiles"):
        if inside_job() and not Path(getattr(settings, key)).expanduser().is_absolute():
            raise ConfigError(
                f"tuning.{key} = {getattr(settings, key)!r} would lie in the job's copy of the working directory, "
                "which goes away with it: give an absolute folder"
            )


def find_there(run: TrainingConfig, settings: TuningConfig) -> list[Machine]:
    """The wanted machines of the cluster, which is joined or started, with what their drivers say.

    Raises:
        ConfigError: as `find_machines`, `check_resources` and `probe`.
    """
    connect()
    machines = find_machines(run, settings.gpu_types, ray.nodes())
    if not run.workers.gpus:
        check_resources(run, ray.cluster_resources())
    return probe(machines)


def versions_here() -> dict[str, str]:
    """Of Python and of the packages that decide speed and numbers."""
    return {"python": platform.python_version(), **{package: version(package) for package in VERSIONS}}


def make_job(run: TrainingConfig, settings: TuningConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What all trials have in common, as plain data."""
    limit = settings.memory_gib if run.workers.gpus == 0 else None
    return {
        "config": run.model_dump(mode="json"),
        "data": {"train": data["train"], "prepared": data["prepared"]},
        "warmup_steps": settings.warmup_steps,
        "steps": settings.steps,
        "trial_seconds": settings.trial_minutes * 60,
        "limit_bytes": None if limit is None else round(limit * GIB),
    }


def make_study(
    machine: Machine,
    run: TrainingConfig,
    settings: TuningConfig,
    shape: ModelShape,
    journal: Journal[Trial],
    document_tokens: int,
) -> Study:
    """The study of a GPU type, with what its journal knows; the run's own point and the seed's are measured first."""
    memory, profile = machine.memory_bytes(settings.memory_gib), machine.profile
    if settings.again:
        journal.clear()
    space = _space(machine, run, settings, shape)
    expected = {
        point: expected_speed(point, run, shape, profile, document_tokens, machine.workers_per_node)
        for point in space.points
    }
    own = configured_or_none(run, shape, memory)
    baselines = [point for point in (own, seed_point(machine.name, run)) if point is not None]
    study = Study(machine.name, space, expected, settings, journal, baselines, machine.slots)
    study.begin()
    return study


def identity_of(
    machine: Machine,
    run: TrainingConfig,
    settings: TuningConfig,
    versions: Mapping[str, str],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same for a trial of another search to count in this one."""
    from training.agreement import code_hash

    fixed = run.model_dump(mode="json", exclude={"run", "batch", "data", "optimizer"})
    fixed["model"].pop("path")
    return {
        "gpu_type": machine.name,
        "device": machine.device,
        "driver": machine.driver,
        "versions": dict(versions),
        "code": code_hash(),
        "base": base_identity(run.model.path),
        "run": fixed,
        "offload": run.batch.activation_offload,
        "rows": str(data["train"]).rpartition("/")[2],
        "weights": run.data.loss_weights,
        "steps": [settings.warmup_steps, settings.steps],
        "memory_gib": settings.memory_gib,
    }


def _space(machine: Machine, run: TrainingConfig, settings: TuningConfig, shape: ModelShape) -> Space:
    try:
        return make_space(run, settings.space, shape, machine.memory_bytes(settings.memory_gib), settings.margin)
    except ConfigError as error:
        raise ConfigError(f"{machine.name}: {error}") from None


def _run(
    studies: dict[str, Study],
    machines: list[Machine],
    run: TrainingConfig,
    settings: TuningConfig,
    job: dict[str, Any],
    folder: Path,
    trial: Measure,
    grace_seconds: float,
    metrics: SearchMetrics,
) -> None:
    def told(name: str, done: Trial) -> None:
        print(progress(studies[name], done), flush=True)
        metrics.told(name, done)

    asking = Studies(studies, told)
    rule = MedianOfType(asking, stop_slow=settings.stop_slow, there=types_there, grace_seconds=grace_seconds)
    tune_all(asking, rule, machines, run, tune.with_parameters(trial, job=job), folder)


def tune_all(
    asking: Studies, rule: Watchful, machines: list[Machine], run: TrainingConfig, trial: Any, folder: Path
) -> None:
    """Have Ray Tune run what the studies ask for, until they are over.

    Args:
        asking: the studies.
        rule: that ends trials early.
        machines: that trials are placed on, by name.
        run: whose workers a trial starts.
        trial: what runs on the node.
        folder: for what Tune and TensorBoard write.
    """
    bundles = {machine.name: tune.PlacementGroupFactory(machine.bundles(run), strategy="PACK") for machine in machines}
    trainable = tune.with_resources(trial, lambda config: bundles[config["gpu_type"]])
    slots = sum(machine.slots for machine in machines)
    with environment(TUNE_MAX_PENDING_TRIALS_PG=str(slots), TUNE_DISABLE_SIGINT_HANDLER="1"):
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=asking,
                scheduler=rule,
                num_samples=-1,
            ),
            run_config=tune.RunConfig(name=time.strftime("%Y%m%d-%H%M%S"), storage_path=str(folder), verbose=0),
        )
        tuner.fit()
    if asking.lost:
        print(f"lost      {', '.join(sorted(asking.lost))}: its nodes are gone; the same command goes on", flush=True)


def types_there() -> set[str]:
    """GPU types that the cluster has now, and the CPU."""
    return {CPU, *(node.accelerator_type or "" for node in gpu_nodes(ray.nodes()))}


def _announce(study: Study, machine: Machine, path: Path) -> None:
    device = f" ({machine.device}, driver {machine.driver})" if machine.device else ""
    ruled_out = f", {len(study.space.dropped)} more ruled out by memory" if study.space.dropped else ""
    known = f"; {len(study.journal.trials)} trials are known from {path}" if study.journal.trials else ""
    print(f"search    {study.name}{device}: {len(study.space.points)} points{ruled_out}{known}", flush=True)
    if study.over is not None:
        print(f"search    {study.name}: nothing to measure, {study.over}", flush=True)


def progress(study: Study, trial: Trial) -> str:
    """A line about a trial that has ended."""
    number = f"{len(study.journal.trials)}/{study.settings.trials}"
    start = f"{study.name:<9} {number:>6}  {trial.where!s:<24}"
    if trial.tokens_per_second is None:
        return f"{start} {trial.outcome.replace('_', ' ')} after {trial.seconds:.0f} s: {trial.reason}"
    predicted = f" (arithmetic {size(trial.predicted_bytes)})" if trial.predicted_bytes else ""
    best = study.known.best == trial.where
    ended = "  ended early" if trial.outcome == "slow" else ""
    return (
        f"{start} {trial.tokens_per_second:>10,.0f} tokens/s ± {trial.noise or 0:.1%}  "
        f"{size(trial.peak_bytes or 0)}{predicted}  {trial.seconds:.0f} s{ended}{'  fastest so far' if best else ''}"
    )
