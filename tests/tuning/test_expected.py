"""What arithmetic expects of points, against steps and grids that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import correlation

import pytest

from cluster.config import load_files
from cluster.hardware import PROFILES, profile_of
from cluster.model import GPT_OSS_20B, GPT_OSS_120B, ModelShape
from cluster.scaling import Layout, Links, Work, predict
from cluster.step_time import PREDICTED_WITHIN, step_seconds
from tests.benchmarks.record import RESULTS
from tests.benchmarks.tuning import read_grid
from tests.tuning.landscape import configured, landscape, regret, replay
from tests.tuning.test_space import point
from training.config import TrainingConfig
from training.memory import recipe_of
from tuning.expected import NETWORK_GBIT, expected_seconds, expected_speed
from tuning.searchers import ascent

H100 = PROFILES[0]


@pytest.mark.parametrize(
    ("file", "shape", "micro", "mode"),
    [
        ("train_step-gpt-oss-20b-h100", GPT_OSS_20B, 8, "none"),
        ("train_step_smallest-gpt-oss-20b-h100", GPT_OSS_20B, 1, "full"),
        ("train_step-gpt-oss-120b-h100", GPT_OSS_120B, 2, "full"),
    ],
)
def test_steps_of_an_h100_are_met(file: str, shape: ModelShape, micro: int, mode: str) -> None:
    row = json.loads((RESULTS / f"{file}.json").read_text())["rows"][0]
    assert (row["micro_batch_size"], row["activation_checkpointing"]) == (micro, mode)
    single = replace(point(micro, mode), accumulation_steps=1)
    seconds = expected_seconds(single, configured(), shape, H100, document_tokens=683)
    assert seconds == pytest.approx(row["step_seconds"], rel=PREDICTED_WITHIN / 2)


@pytest.mark.parametrize("strategy", ["data_parallel", "sharded"])
def test_a_search_and_a_plan_expect_the_same(strategy: str) -> None:
    """One arithmetic: `cluster.step_time` for the step, `cluster.scaling` for what two workers exchange."""
    two = configured(workers={"count": 2})
    where = point(8, strategy=strategy)
    recipe = recipe_of(where.apply(two), GPT_OSS_20B, "none", 2 if strategy == "sharded" else 1)
    alone = step_seconds(GPT_OSS_20B, recipe, H100, 700, 2)
    work = Work(GPT_OSS_20B, recipe, 2, alone, H100.bandwidth_bytes_per_second)
    planned = predict(work, Layout(2, 2, recipe.shards), Links.of(H100, NETWORK_GBIT))
    seconds = expected_seconds(where, two, GPT_OSS_20B, H100, 700)
    assert seconds == pytest.approx(planned.step_seconds, rel=1e-12)
    assert expected_speed(where, two, GPT_OSS_20B, H100, 700) == pytest.approx(2 * 16 * 2048 / seconds)


def test_what_costs_more_is_expected_to() -> None:
    land = landscape("H100")
    usual = land.expected(point(8))
    assert usual > land.expected(point(8, "experts")) > land.expected(point(8, "full"))
    assert usual > land.expected(point(8, compile="off"))
    assert usual > land.expected(point(8, attention="eager"))
    stock = land.expected(point(8, base_precision="bf16", experts="grouped_mm"))
    assert usual > land.expected(point(8, base_precision="bf16"))
    assert usual > stock > land.expected(point(8, base_precision="bf16", experts="eager"))
    assert usual > land.expected(point(1))
    assert landscape("H200").expected(point(8)) > usual > landscape("A100").expected(point(8))


RECORDED = sorted(RESULTS.glob("tuning_grid-*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_order_of_a_recorded_grid(path: Path) -> None:
    """Today's arithmetic, not what it expected when the grid was recorded: the ascent by it, and the ranks."""
    points, truth, _ = read_grid(path)
    record = json.loads(path.read_text(encoding="utf-8"))
    gpu = profile_of(record["device"])
    if gpu is None:
        config = load_files(TrainingConfig, "training/configs/demo.toml")
        config = config.model_copy(update={"workers": config.workers.model_copy(update={"count": 1})})
        shape = ModelShape.from_folder(config.model.path)
    else:
        config, shape = configured(), GPT_OSS_20B
    expected = {where: expected_speed(where, config, shape, gpu) for where in points}
    asked = replay(points, truth, expected, ascent, len(points))
    assert regret(asked, truth) <= 0.02
    assert len(asked) <= len(points) / 3
    known = [where for where in points if truth[where] is not None]
    ranks = [sorted(known, key=lambda where: values[where] or 0) for values in (truth, expected)]
    assert correlation(*([order.index(where) for where in known] for order in ranks)) > 0.8


GPU_GRIDS = sorted(RESULTS.glob("tuning_grid-gpt-oss-*.json"))


@pytest.mark.parametrize("path", GPU_GRIDS, ids=lambda path: path.stem)
def test_the_memory_of_every_measured_point_is_met_within_a_tenth(path: Path) -> None:
    """Of points that ran out of memory the arithmetic must have asked for at least nine tenths of the GPU."""
    record = json.loads(path.read_text(encoding="utf-8"))
    gpu = profile_of(record["device"])
    assert gpu is not None
    for row in record["rows"]:
        if row["outcome"] == "out_of_memory":
            assert row["predicted_gb"] * 1e9 >= 0.9 * gpu.memory_bytes, row["name"]
        elif row["peak_gb"] is not None:
            assert row["predicted_gb"] == pytest.approx(row["peak_gb"], rel=0.1), row["name"]
