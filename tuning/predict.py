"""`python -m tuning predict`: the batch that arithmetic expects to be fastest on a GPU that is not at hand."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path

from cluster.config import ConfigError
from cluster.hardware import PROFILES, GpuProfile
from cluster.memory import size
from cluster.model import ModelShape
from training.config import TrainingConfig
from training.profile import Conditions
from tuning.config import SearchConfig, TuningConfig
from tuning.expected import expected_speed
from tuning.journal import point_fields
from tuning.model import model_name, model_shape
from tuning.result import Result, commit, read_result, write_result
from tuning.space import configured_point, make_space

MARGIN = 0.10
"""share of the arithmetic's memory that a prediction leaves free: measured peaks are met within a tenth"""
DOUBT = "speeds by this arithmetic may be off by a third where nothing was measured"


def predict(config: SearchConfig, command: str) -> list[Result]:
    """A prediction for each of `tuning.gpu_types`, which are names of `cluster.hardware` here; all takes every one.

    Raises:
        ConfigError: a name is not known, or the model does not fit the GPU.
    """
    wanted, run = config.tuning.gpu_types, config.training
    known = {profile.name: profile for profile in PROFILES}
    names = list(known) if wanted == "all" else list(wanted)
    for name in names:
        if name not in known:
            raise ConfigError(f"tuning.gpu_types names {name}, which is not known: it may be {', '.join(known)}")
    shape = model_shape(run.model.path)
    return [predict_one(known[name], run, config.tuning, shape, command) for name in names]


def predict_one(
    gpu: GpuProfile, run: TrainingConfig, settings: TuningConfig, shape: ModelShape, command: str
) -> Result:
    """The prediction for a GPU: of the points that fit with `MARGIN` the one that is expected to be fastest.

    Of points that are expected to be as fast, by `tuning.tie`, it is the one that needs least memory.
    """
    memory = settings.memory_gib * 2**30 if settings.memory_gib else gpu.memory_bytes
    margin = max(MARGIN, settings.margin)
    try:
        space = make_space(run, settings.space, shape, round(memory), margin)
    except ConfigError as error:
        raise ConfigError(f"{gpu.name}: {error}") from None
    expected = {point: expected_speed(point, run, shape, gpu) for point in space.points}
    fastest = max(expected.values())
    equal = [point for point, speed in expected.items() if speed >= fastest * (1 - settings.tie)]
    chosen = min(equal, key=lambda point: space.predicted_bytes[point])
    return Result(
        kind="predicted",
        gpu=gpu.name,
        model=model_name(run.model.path),
        shape=asdict(shape),
        conditions=Conditions.of(run),
        workers=run.workers.count,
        memory_bytes=round(memory),
        device=None,
        driver=None,
        versions={},
        commit=commit(),
        date=datetime.date.today().isoformat(),
        command=command,
        chosen=point_fields(chosen),
        why=(
            f"arithmetic expects {expected[chosen]:,.0f} tokens/s and a peak of "
            f"{size(space.predicted_bytes[chosen])} of {size(memory)}; it leaves {margin:.0%} of margin, and {DOUBT}"
        ),
        ended=None,
        configured=point_fields(configured_point(run)),
        expected={str(point): round(speed, 1) for point, speed in expected.items()},
        trials=[],
        dropped=[
            {"point": point_fields(drop.point), "needed_bytes": drop.needed_bytes, "reason": drop.reason}
            for drop in space.dropped
        ],
    )


def write_predictions(results: list[Result], folder: Path) -> None:
    """Write profiles where no measured one is there."""
    for result in results:
        path = folder / f"{result.stem}.json"
        if path.is_file() and read_result(path).kind == "measured":
            print(f"kept      {path}, which was measured")
        else:
            print(f"written   {write_result(result, folder)}")
