"""What a search leaves: a profile, an overlay for training configurations, and JSON with all that led to it."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.artifacts import publish_file
from cluster.config import ConfigError
from cluster.memory import size
from cluster.model import ModelShape
from training.config import TrainingConfig
from training.memory import choose_checkpointing
from training.profile import PROFILE_FORMAT, Conditions
from tuning.journal import Trial, point_fields
from tuning.machines import Machine
from tuning.space import SECTIONS, Point, configured_point
from tuning.study import Study

SEED_TABLE = {"H100": (8, 2)}
"""micro-batch and accumulation that the recipe Raysoner grew from has for a GPU type, with layers recomputed"""
ROOT = Path(__file__).resolve().parents[1]


class Result(BaseModel):
    """A study as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = PROFILE_FORMAT
    kind: Literal["measured", "predicted"]
    gpu: str
    """name of the GPU's profile, or its type as Ray calls it, or CPU"""
    model: str
    shape: dict[str, Any]
    """of the model"""
    conditions: Conditions
    """settings of a run that the profile is for"""
    workers: int
    memory_bytes: int | None
    device: str | None
    driver: str | None
    versions: dict[str, str]
    commit: str
    date: str
    command: str
    source: str = ""
    """where a profile comes from that no search wrote"""
    chosen: dict[str, Any] | None
    """the point"""
    why: str
    """it was chosen, or there is none"""
    ended: str | None
    """why the search was over; None where it was not"""
    configured: dict[str, Any] | None = None
    """the point of the run's own settings"""
    seed: dict[str, Any] | None = None
    """the point of the seed's fixed table"""
    trials: list[Trial]
    expected: dict[str, float] = {}
    """tokens a second of each point of the space by arithmetic, by the point as text"""
    dropped: list[dict[str, Any]] = []
    """points that memory ruled out, with `needed_bytes` and `reason`"""

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"{self.gpu}-{self.model}".lower()

    def trial_of(self, point: Mapping[str, Any] | None) -> Trial | None:
        """The trial of a point that has a speed."""
        found = (t for t in self.trials if t.point == point and t.tokens_per_second is not None)
        return next(found, None)

    def gain_over(self, point: Mapping[str, Any] | None) -> float | None:
        """Speed of the chosen point as a multiple of another's; None where one of the two has none."""
        best, other = self.trial_of(self.chosen), self.trial_of(point)
        if not best or not other or not best.tokens_per_second or not other.tokens_per_second:
            return None
        return best.tokens_per_second / other.tokens_per_second

    def line(self, seconds: float) -> str:
        """For a person, when the search has ended."""
        best = self.trial_of(self.chosen)
        if best is None:
            return f"result    {self.gpu}: {self.why}"
        gains = [("the run's own settings", self.gain_over(self.configured)), ("the seed's", self.gain_over(self.seed))]
        compared = "".join(f", {gain:.2f} × {what}" for what, gain in gains if gain is not None)
        return (
            f"result    {self.gpu}: {best.where}, {best.tokens_per_second:,.0f} tokens/s, {size(best.peak_bytes or 0)}"
            f"{compared}: {self.why} ({len(self.trials)} trials, {seconds / 60:.1f} min)"
        )


def make_result(
    study: Study,
    machine: Machine,
    run: TrainingConfig,
    shape: ModelShape,
    model: str,
    versions: Mapping[str, str],
    command: str,
) -> Result:
    """The study, written out."""
    choice = study.choice()
    memory = machine.memory_bytes(study.settings.memory_gib)
    own = configured_or_none(run, shape, memory)
    return Result(
        kind="measured",
        gpu=gpu_name(machine),
        model=model,
        shape=asdict(shape),
        conditions=Conditions.of(run),
        workers=run.workers.count,
        memory_bytes=memory,
        device=machine.device or (choice.trial.device if choice else None),
        driver=machine.driver,
        versions=dict(versions),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        command=command,
        chosen=choice.trial.point if choice else None,
        why=choice.why if choice else f"no point was measured: {study.over or 'the search was interrupted'}",
        ended=study.over,
        configured=point_fields(own) if own else None,
        seed=point_fields(seed) if (seed := seed_point(machine.name, run)) else None,
        trials=list(study.journal.trials),
        expected={str(point): round(speed, 1) for point, speed in study.expected.items()},
        dropped=[
            {"point": point_fields(drop.point), "needed_bytes": drop.needed_bytes, "reason": drop.reason}
            for drop in study.space.dropped
        ],
    )


def write_result(result: Result, folder: Path) -> Path:
    """Write the JSON of a study, and its profile where it has a point; returns the path of the JSON."""
    return write_files(result, overlay(result) if result.chosen is not None else None, result.stem, folder)


def write_files(result: BaseModel, toml: str | None, stem: str, folder: Path) -> Path:
    """Write a result as JSON, and beside it an overlay where there is one; returns the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    if toml is not None:
        _write(folder / f"{stem}.toml", toml)
    _write(path, result.model_dump_json(indent=1) + "\n")
    return path


def read_result(path: Path) -> Result:
    """A study from its JSON.

    Raises:
        ConfigError: it is no such file, or of another format.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; `python -m tuning search` writes it") from None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no result of a search of this version ({first}): search again") from None


def overlay(result: Result) -> str:
    """The profile as TOML: comments that say where it comes from, and the chosen point's settings."""
    assert result.chosen is not None
    best, conditions = result.trial_of(result.chosen), result.conditions
    device, torch = result.device or "a device without a name", result.versions.get("torch", "?")
    how = {
        "measured": f"Measured on {result.date}: {device}, torch {torch}, commit {result.commit}.",
        "predicted": f"Predicted on {result.date} by arithmetic, at commit {result.commit}: nobody has measured it.",
    }
    lines = [
        f"# {result.gpu}, {result.model}, rows of {conditions.sequence_length} tokens, LoRA rank {conditions.rank}.",
        f"# {how[result.kind]}",
    ]
    if best is not None and result.kind == "measured":
        lines.append(f"# {best.tokens_per_second:,.0f} tokens/s, peak {size(best.peak_bytes or 0)}: {result.why}.")
    else:
        lines.append(f"# {result.why[:1].upper()}{result.why[1:]}.")
    lines.append(f"# {result.source or result.command}")
    tables: dict[str, list[str]] = {}
    for name, value in result.chosen.items():
        if name == "strategy" and result.workers == 1:
            continue
        written = f'"{value}"' if isinstance(value, str) else value
        tables.setdefault(SECTIONS[name], []).append(f"{name} = {written}")
    for table, settings in sorted(tables.items(), key=lambda item: item[0] != "batch"):
        lines += ["", f"[{table}]", *settings]
    return "\n".join(lines) + "\n"


def seed_point(gpu_type: str, run: TrainingConfig) -> Point | None:
    """The seed's batch for a GPU type, in our engine; None where its table has none."""
    if gpu_type not in SEED_TABLE:
        return None
    micro, accumulation = SEED_TABLE[gpu_type]
    own = configured_point(run)
    return replace(own, micro_batch_size=micro, accumulation_steps=accumulation, activation_checkpointing="full")


def configured_or_none(run: TrainingConfig, shape: ModelShape, memory_bytes: int | None) -> Point | None:
    """The point of the run's own settings; None where they do not fit the GPU."""
    if memory_bytes is None or not run.workers.gpus:
        return configured_point(run)
    try:
        return configured_point(run, choose_checkpointing(run, shape, memory_bytes)[0])
    except ConfigError:
        return None


def gpu_name(machine: Machine) -> str:
    """Of a profile's files: the name of the GPU's profile where it is known."""
    return machine.profile.name if machine.profile else machine.name


def commit() -> str:
    """The checked-out commit, with `+` where files differ from it; `RAYSONER_COMMIT` where there is no repository."""
    if given := os.environ.get("RAYSONER_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _write(path: Path, text: str) -> None:
    with publish_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
