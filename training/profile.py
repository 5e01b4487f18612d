"""Which batch profile a run takes: what `python -m tuning search` found for the GPU, by type and model. No torch.

A profile is an overlay, `tuning/profiles/<gpu>-<model>.toml`, with JSON beside it that says what it is for. It goes on
top of the configuration files; flags win over it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cluster.config import ConfigError
from cluster.hardware import PROFILES, GpuProfile, ask_driver, profile_of
from cluster.model import ModelShape
from training.config import TrainingConfig

FOLDER = Path(__file__).resolve().parents[1] / "tuning" / "profiles"
PROFILE_FORMAT = 1
"""of profiles; one of another format is for another version of the engine"""


class Conditions(BaseModel):
    """Settings of a run that decide its speed and memory beside those that a profile sets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_length: int
    packing: bool
    precision: str
    rank: int

    @classmethod
    def of(cls, config: TrainingConfig) -> Conditions:
        """Those of a run."""
        return cls(
            sequence_length=config.data.sequence_length,
            packing=config.data.packing,
            precision=config.model.precision,
            rank=config.lora.rank,
        )


@dataclass(frozen=True)
class Taken:
    """The profile that a run takes, and a line that says why; or none, and why not."""

    path: Path | None
    why: str


def choose_profile(config: TrainingConfig, wanted: str, gpus: Sequence[GpuProfile], folder: Path = FOLDER) -> Taken:
    """The profile for a run.

    Args:
        config: of the run, without a profile.
        wanted: "auto", "none", or the path of a profile, which is taken unless it is for another version.
        gpus: that the run's GPUs may be, the likeliest first; see `detected_gpus`. They matter for "auto".
        folder: of the profiles.

    Raises:
        ConfigError: a path that does not exist.
    """
    if wanted == "none":
        return Taken(None, "none, as --profile says")
    if wanted != "auto":
        path = Path(wanted)
        if not path.is_file():
            raise ConfigError(f"--profile {wanted}: there is no such file; give a path, auto or none")
        stale = _other_version(path, _about(path))
        return Taken(None, stale) if stale else Taken(path, f"{path}, as --profile says")
    if not config.workers.gpus:
        return Taken(None, "none: workers.gpus = 0, and profiles are for GPUs")
    if not gpus:
        return Taken(None, "none: the GPU is of no type that is known; python -m tuning search measures it")
    found = next(((gpu, *profile) for gpu in gpus for profile in _of_gpu(folder, gpu, config)), None)
    if found is None:
        names = " or ".join(gpu.name for gpu in gpus)
        return Taken(None, f"none: {folder} has none for {names} and this model; python -m tuning search makes one")
    gpu, path, about = found
    if problem := _other_version(path, about) or _other_conditions(path, about, config):
        return Taken(None, problem)
    kind = "measured" if about.get("kind") == "measured" else "predicted, never measured,"
    return Taken(path, f"{path.name}: {kind} for {gpu.name} and this model")


def profiled_tokens_per_second(
    config: TrainingConfig, gpu: GpuProfile, folder: Path = FOLDER
) -> tuple[float, Literal["measured", "predicted"]] | None:
    """Tokens a second of one such GPU at the run's micro-batch, by its profile; None where no profile has it. Where the
    run's is auto, of the micro-batch that is fastest.

    Args:
        config: of the run.
        gpu: the type.
        folder: of the profiles.
    """
    rows = r"\d+" if config.batch.micro_batch_size == "auto" else str(config.batch.rows)
    for path, about in _of_gpu(folder, gpu, config):
        if _other_version(path, about) or _other_conditions(path, about, config):
            continue
        measured = [
            trial["tokens_per_second"] / about.get("workers", 1)
            for trial in about.get("trials", ())
            if trial.get("outcome") == "measured" and re.fullmatch(rows, str(trial["point"]["micro_batch_size"]))
        ]
        if measured:
            return max(measured), "measured"
        expected = [speed for name, speed in about.get("expected", {}).items() if re.match(rf"{rows} × \d+ ", name)]
        if about.get("kind") == "predicted" and expected:
            return max(expected), "predicted"
    return None


def detected_gpus(config: TrainingConfig) -> list[GpuProfile]:
    """What the run's GPUs are: those of the cluster that it will join, or else of this machine.

    Ray tells sizes of one type apart no more than it tells SXM from PCIe: such a type gives several, that with the
    least memory first. On a cluster of several types they are of the one that the run takes; where it takes all, none.

    Raises:
        ConfigError: the run can take none of the cluster's types.
    """
    if os.environ.get("RAY_ADDRESS") or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        import ray

        from cluster.placement import gpu_nodes
        from training.driver import connect
        from training.gpu_types import choose_type

        connect()
        nodes = gpu_nodes(ray.nodes())
        chosen = choose_type(config, nodes).accelerator_type
        types = {node.accelerator_type for node in nodes} if chosen is None else {chosen}
        own = [profile for profile in PROFILES if types == {profile.accelerator_type}]
        return sorted(own, key=lambda profile: profile.memory_bytes)
    found = {profile_of(name) for (name,) in ask_driver("name")}
    only = found.pop() if len(found) == 1 else None
    return [only] if only else []


def _of_gpu(folder: Path, gpu: GpuProfile, config: TrainingConfig) -> list[tuple[Path, dict[str, Any]]]:
    """Profiles for the GPU whose model is the run's, each with what it says of itself: by the model's shape where the
    checkpoint is here, else by its name."""
    path = Path(config.model.path)
    shape: dict[str, Any] | None = None
    if path.is_dir():
        try:
            shape = _weights_of(asdict(ModelShape.from_folder(path)))
        except ValueError:
            return []
    found = []
    for file in sorted(folder.glob(f"{gpu.name.lower()}-*.toml")):
        about = _about(file)
        if about.get("gpu") != gpu.name:
            continue
        same = _weights_of(about.get("shape", {})) == shape if shape else about["model"] == path.name
        if same:
            found.append((file, about))
    return found


def _weights_of(shape: dict[str, Any]) -> dict[str, Any]:
    """A shape without how its experts are stored: in memory they are as the run says."""
    return {name: value for name, value in shape.items() if name != "packed"}


def _about(profile: Path) -> dict[str, Any]:
    """The JSON beside a profile; empty where there is none that can be read."""
    try:
        found = json.loads(profile.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _other_version(profile: Path, about: dict[str, Any]) -> str | None:
    if about and about.get("format") != PROFILE_FORMAT:
        return (
            f"none: {profile} is of format {about.get('format')} and this version's is {PROFILE_FORMAT}; "
            "python -m tuning search writes it anew"
        )
    return None


def _other_conditions(profile: Path, about: dict[str, Any], config: TrainingConfig) -> str | None:
    own, theirs = Conditions.of(config).model_dump(), about.get("conditions", {})
    differing = [
        f"{name} = {theirs.get(name)}, not {value}" for name, value in own.items() if theirs.get(name) != value
    ]
    return f"none: {profile.name} is for {', '.join(differing)}" if differing else None
