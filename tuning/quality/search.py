"""Searches rows of a step, learning rate and rank by whole runs, of which those that do worse end early."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cluster.config import ConfigError
from cluster.hardware import GIB
from training.config import TrainingConfig
from training.driver import locate, prepare_data
from tuning.config import SearchConfig, TuningConfig
from tuning.journal import Journal, short_hash
from tuning.machines import Machine
from tuning.metrics import SearchMetrics, standing_of_quality
from tuning.model import base_identity, model_name, model_shape
from tuning.quality.candidates import Candidate, Curve, baseline, make_candidates
from tuning.quality.result import QualityResult, make_result
from tuning.quality.study import QualityStudy
from tuning.quality.supervisor import measure
from tuning.search import GRACE_SECONDS, Measure, check_folders, find_there, tune_all, types_there, versions_here
from tuning.studies import Studies, Watchful

METRIC = "held_out_loss"
SEARCHED = {"optimizer": {"learning_rate"}, "lora": {"rank", "alpha"}, "batch": {"global_batch_size"}}
"""settings of a run that candidates differ in, by table"""


def search(
    config: SearchConfig, command: str, trial: Measure = measure, grace_seconds: float = GRACE_SECONDS
) -> QualityResult:
    """Search on one GPU type of the cluster; every candidate's curve is kept in a journal.

    Args:
        config: of the run and the search.
        command: that the user typed, for the record.
        trial: what Ray Tune runs on a node, `tuning.quality.supervisor.measure` but in tests.
        grace_seconds: how long all nodes of the type may be gone before the search ends.

    Raises:
        ConfigError: there is no held-out data, several GPU types are meant, or no candidate can be trained.
        KeyboardInterrupt: the user's; all that had ended is in the journal.
    """
    began = time.monotonic()
    settings, run = config.tuning, locate(config.training)
    if run.data.evaluation is None:
        raise ConfigError(
            "tuning.objective = quality needs data.evaluation, the held-out conversations whose loss decides: name a "
            "file of them"
        )
    check_folders(settings)
    shape, name = model_shape(run.model.path), model_name(run.model.path)
    machine = _one(find_there(run, settings))
    memory = machine.memory_bytes(settings.memory_gib)
    data = prepare_data(run)
    rows = settings.quality.rows or rows_of(run, data["prepared"]["rows"])
    candidates, refused = make_candidates(run, settings.quality, rows, shape, memory, settings.seed)
    versions, folder = versions_here(), Path(settings.storage).expanduser().absolute()
    identity = identity_of(machine, run, settings, versions, data, rows)
    path = folder / f"quality-{machine.name}-{name}-{short_hash(identity)}.jsonl"
    journal = Journal(path, identity, Curve)
    if settings.again:
        journal.clear()
    study = QualityStudy(machine.name, candidates, baseline(run), settings, journal, machine.slots)
    study.begin()
    _announce(study, refused, rows, path)
    if study.over is None:
        job = make_job(run, settings, data, rows)
        with SearchMetrics(name, {study.name: study}, standing_of_quality) as metrics:
            _run(study, machine, run, job, folder / "tune", trial, grace_seconds, metrics)
    result = make_result(study, machine, run, name, rows, versions, command, refused)
    print(result.line(time.monotonic() - began), flush=True)
    return result


def _run(
    study: QualityStudy,
    machine: Machine,
    run: TrainingConfig,
    job: dict[str, Any],
    folder: Path,
    trial: Measure,
    grace_seconds: float,
    metrics: SearchMetrics,
) -> None:
    def told(name: str, curve: Curve) -> None:
        print(progress(study, curve), flush=True)
        metrics.told(name, curve)

    asking = Studies({study.name: study}, told)
    rule = Halving(asking, study, there=types_there, grace_seconds=grace_seconds)
    tune_all(asking, rule, [machine], run, tune.with_parameters(trial, job=job), folder)


class Halving(Watchful, AsyncHyperBandScheduler):
    """Ray Tune's ASHA, which knows what a journal holds and leaves the run's own settings alone.

    Args:
        studies: as Watchful's.
        study: of the candidates.
        others: as Watchful's.
    """

    def __init__(self, studies: Studies, study: QualityStudy, **others: Any) -> None:
        settings = study.settings.quality
        super().__init__(
            studies,
            time_attr="evaluation",
            metric=METRIC,
            mode="min",
            grace_period=1,
            max_t=settings.evaluations,
            reduction_factor=settings.reduction,
            **others,
        )
        self.study = study
        for number, curve in enumerate(study.journal.trials):
            if curve.where.seed == study.own.seed:
                self._replay(f"before-{number}", curve)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Tune's decision; a trial's last report is none to decide on, and other seeds are none to compare with."""
        candidate = Candidate(**trial.config["point"])
        if "partial" not in result or candidate.seed != self.study.own.seed:
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision != TrialScheduler.STOP or self.study.whole(candidate):
            return str(TrialScheduler.CONTINUE)
        self.studies.stopped.add(trial.trial_id)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Nothing: every evaluation but the last was decided on as it came."""

    def _replay(self, name: str, curve: Curve) -> None:
        past: Any = SimpleNamespace(trial_id=name)
        self.on_trial_add(None, past)
        for number, evaluation in enumerate(curve.evaluations, start=1):
            if number < self.study.settings.quality.evaluations:
                AsyncHyperBandScheduler.on_trial_result(
                    self, None, past, {"evaluation": number, METRIC: evaluation.loss}
                )


def rows_of(run: TrainingConfig, rows: int) -> int:
    """Rows that the run trains on, of data of so many."""
    if run.run.maximum_steps is not None:
        return run.run.maximum_steps * run.global_batch_size
    return math.ceil(rows * run.run.epochs)


def make_job(run: TrainingConfig, settings: TuningConfig, data: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What all candidates have in common, as plain data."""
    limit = settings.memory_gib if run.workers.gpus == 0 else None
    return {
        "config": run.model_dump(mode="json"),
        "data": {name: data[name] for name in ("train", "evaluation", "prepared")},
        "rows": rows,
        "evaluations": settings.quality.evaluations,
        "trial_seconds": settings.quality.minutes * 60,
        "limit_bytes": None if limit is None else round(limit * GIB),
    }


def identity_of(
    machine: Machine,
    run: TrainingConfig,
    settings: TuningConfig,
    versions: Mapping[str, str],
    data: Mapping[str, Any],
    rows: int,
) -> dict[str, Any]:
    """What must be the same for a curve of another search to count in this one."""
    from training.agreement import code_hash

    fixed = run.model_dump(mode="json", exclude={"run", "data", "workers"})
    for table, names in SEARCHED.items():
        for setting in names:
            fixed[table].pop(setting)
    fixed["model"].pop("path")
    own = baseline(run)
    judged = {"metric": run.run.best_metric, "answers": run.run.evaluation_answers, "tokens": run.run.answer_tokens}
    return {
        **(judged if run.run.best_metric != "eval_loss" else {}),
        "objective": "quality",
        "gpu_type": machine.name,
        "device": machine.device,
        "versions": dict(versions),
        "code": code_hash(),
        "base": base_identity(run.model.path),
        "run": fixed,
        "own": str(own),
        "scale": run.lora.alpha / run.lora.rank,
        "seed": own.seed,
        "workers": run.workers.count,
        "data": [str(data[name]).rpartition("/")[2] for name in ("train", "evaluation")],
        "weights": run.data.loss_weights,
        "rows": rows,
        "evaluations": settings.quality.evaluations,
    }


def progress(study: QualityStudy, curve: Curve) -> str:
    """A line about a candidate that has ended."""
    number = f"{len(study.journal.trials)}/{min(study.settings.trials, len(study.order))}"
    start = f"{study.name:<9} {number:>6}  {curve.where!s:<32}"
    if not curve.evaluations or curve.outcome not in ("measured", "stopped"):
        return f"{start} {curve.outcome.replace('_', ' ')} after {curve.seconds:.0f} s: {curve.reason}"
    last = curve.evaluations[-1]
    spoken = " · ".join(f"{tag} {loss:.4f}" for tag, loss in last.languages.items())
    ended = f"  ended early, after {last.rows} rows" if curve.outcome == "stopped" else ""
    seed = "" if curve.where.seed == study.own.seed else f"  seed {curve.where.seed}"
    best = "  best so far" if study.measured[:1] == [curve] else ""
    return f"{start} {last.loss:.4f}  {spoken}  {curve.seconds:.0f} s{ended}{seed}{best}"


def _one(machines: list[Machine]) -> Machine:
    if len(machines) > 1:
        names = ", ".join(machine.name for machine in machines)
        raise ConfigError(
            f"tuning.objective = quality is searched on one GPU type, for losses are the same on all, and there are "
            f"{names}: name one with --gpu-type"
        )
    return machines[0]


def _announce(study: QualityStudy, refused: list[str], rows: int, path: Path) -> None:
    left_out = f", {len(refused)} more left out ({refused[0]})" if refused else ""
    known = f"; {len(study.journal.trials)} trials are known from {path}" if study.journal.trials else ""
    print(f"search    {study.name}: {len(study.order)} trainings of {rows} rows each{left_out}{known}", flush=True)
    if study.over is not None:
        print(f"search    {study.name}: nothing to train, {study.over}", flush=True)
