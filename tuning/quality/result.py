"""What a search for quality leaves: an overlay for training configurations, and JSON with every curve."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from training.config import TrainingConfig
from training.profile import PROFILE_FORMAT, Conditions
from tuning.machines import Machine
from tuning.quality.candidates import SECTIONS, Candidate, Curve
from tuning.quality.study import QualityStudy
from tuning.result import commit, gpu_name, write_files

HEADERS = ("settings", "held out", "of each language", "trained", "rows", "seconds", "outcome")


class QualityResult(BaseModel):
    """A study of quality as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = PROFILE_FORMAT
    kind: Literal["quality"] = "quality"
    gpu: str
    model: str
    conditions: Conditions
    """settings of the run; its rank is that of its own settings, not of the chosen ones"""
    workers: int
    rows: int
    """that each candidate was trained on"""
    device: str | None
    driver: str | None
    versions: dict[str, str]
    commit: str
    date: str
    command: str
    chosen: dict[str, Any] | None
    """the candidate"""
    settings: dict[str, float | int] | None
    """of the training configuration, that make it"""
    why: str
    ended: str | None
    """why the search was over; None where it was not"""
    own: dict[str, Any]
    """the candidate of the run's own settings"""
    noise: float | None
    """standard deviation of the own settings' last loss between seeds, nats"""
    curves: list[Curve]
    refused: list[str]
    """candidates that were not trained, and why"""

    @property
    def stem(self) -> str:
        """Of its files: no GPU's name is in front, for `training run --profile auto` takes batches alone."""
        return f"quality-{self.model}".lower()

    @property
    def languages(self) -> list[str]:
        """Tags of all languages that were measured."""
        return sorted({tag for curve in self.curves for last in curve.evaluations for tag in last.languages})

    def curve_of(self, candidate: Mapping[str, Any] | None) -> Curve | None:
        """The whole curve of a candidate."""
        found = (curve for curve in self.curves if curve.candidate == candidate and curve.outcome == "measured")
        return next(found, None)

    def line(self, seconds: float) -> str:
        """For a person, when the search has ended."""
        if self.chosen is None:
            return f"result    {self.gpu}: {self.why}"
        what = f"{Candidate(**self.chosen)}: {self.why}"
        return f"result    {self.gpu}: {what} ({len(self.curves)} trials, {seconds / 60:.1f} min)"


def make_result(
    study: QualityStudy,
    machine: Machine,
    run: TrainingConfig,
    model: str,
    rows: int,
    versions: Mapping[str, str],
    command: str,
    refused: list[str],
) -> QualityResult:
    """The study, written out."""
    choice = study.choice()
    best = choice[0] if choice else None
    return QualityResult(
        gpu=gpu_name(machine),
        model=model,
        conditions=Conditions.of(run),
        workers=run.workers.count,
        rows=rows,
        device=machine.device or (best.device if best else None),
        driver=machine.driver,
        versions=dict(versions),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        command=command,
        chosen=best.candidate if best else None,
        settings=best.where.settings(run) if best else None,
        why=choice[1] if choice else f"no candidate was trained to its end: {study.over or 'it was interrupted'}",
        ended=study.over,
        own=vars(study.own),
        noise=study.noise,
        curves=list(study.journal.trials),
        refused=refused,
    )


def write_result(result: QualityResult, folder: Path) -> Path:
    """Write the JSON of a study, and its overlay where a candidate was chosen; returns the path of the JSON."""
    return write_files(result, overlay(result) if result.settings is not None else None, result.stem, folder)


def overlay(result: QualityResult) -> str:
    """The chosen settings as TOML, with comments that say where they come from."""
    assert result.settings is not None
    lines = [
        f"# {result.model}: rows of a step, learning rate and rank with the {result.why}.",
        f"# Trained on {result.rows} rows each, {result.date}: {result.device or result.gpu}, torch "
        f"{result.versions.get('torch', '?')}, commit {result.commit}.",
        f"# {result.command}",
    ]
    tables: dict[str, list[str]] = {}
    for name, value in result.settings.items():
        tables.setdefault(SECTIONS[name], []).append(f"{name} = {value!r}")
    for table, settings in tables.items():
        lines += ["", f"[{table}]", *settings]
    return "\n".join(lines) + "\n"


def ordered(result: QualityResult) -> list[Curve]:
    """Curves, the lowest loss first, those that were ended early after them, and those without a loss last."""

    def place(curve: Curve) -> tuple[bool, int, float]:
        losses = [each.loss for each in curve.evaluations]
        return curve.outcome != "measured", -len(losses), losses[-1] if losses else 0.0

    return sorted(result.curves, key=place)


def cells(curve: Curve, result: QualityResult) -> tuple[str, ...]:
    """A curve as a row of `HEADERS`."""
    last = curve.evaluations[-1] if curve.evaluations else None
    seed = "" if curve.where.seed == result.own["seed"] else f", seed {curve.where.seed}"
    return (
        f"{curve.where}{seed}",
        f"{last.loss:.4f}" if last else "",
        " · ".join(f"{tag} {loss:.4f}" for tag, loss in last.languages.items()) if last else "",
        f"{last.trained:.4f}" if last and last.trained is not None else "",
        f"{last.rows:,}" if last else "",
        f"{curve.seconds:.0f}",
        curve.outcome.replace("_", " ") + (f": {curve.reason}" if curve.reason else ""),
    )


def table(result: QualityResult) -> str:
    """A result for the terminal: what was chosen and why, and every curve, the best first."""
    where = f"{result.device or result.gpu}, {result.rows} rows of {result.conditions.sequence_length} tokens"
    lines = [f"quality of {result.model}: {where} ({result.date}, commit {result.commit})"]
    chosen = f"chosen: {Candidate(**result.chosen)}" if result.chosen else "nothing chosen"
    lines.append(f"  {chosen}: {result.why}")
    rows = [HEADERS, *(cells(curve, result) for curve in ordered(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [f"  not trained: {reason}" for reason in result.refused]
    return "\n".join(lines)
