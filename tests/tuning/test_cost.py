"""Seconds by arithmetic against steps that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.hardware import PROFILES, profile_of
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from tests.benchmarks.record import RESULTS
from tests.tuning.landscape import configured, landscape
from tests.tuning.test_space import point
from tuning.cost import step_seconds

H100 = PROFILES[0]


@pytest.mark.parametrize(
    ("file", "shape", "micro", "mode"),
    [
        ("train_step-gpt-oss-20b-h100", GPT_OSS_20B, 8, "none"),
        ("train_step_smallest-gpt-oss-20b-h100", GPT_OSS_20B, 1, "full"),
        ("train_step-gpt-oss-120b-h100", GPT_OSS_120B, 2, "full"),
    ],
)
def test_steps_of_an_h100_are_met_within_a_tenth(file: str, shape: object, micro: int, mode: str) -> None:
    row = json.loads((RESULTS / f"{file}.json").read_text())["rows"][0]
    assert (row["micro_batch_size"], row["activation_checkpointing"]) == (micro, mode)
    one = point(micro, mode)
    single = type(one)(**{**vars(one), "accumulation_steps": 1})
    seconds = step_seconds(single, configured(), shape, H100)  # type: ignore[arg-type]
    assert seconds == pytest.approx(row["step_seconds"], rel=0.1)


def test_what_costs_more_is_expected_to() -> None:
    land = landscape("H100")
    usual = land.expected(point(8))
    assert usual > land.expected(point(8, "experts")) > land.expected(point(8, "full"))
    assert usual > land.expected(point(8, compile="off"))
    assert usual > land.expected(point(8, attention="eager"))
    bf16 = land.expected(point(8, base_precision="bf16"))
    assert bf16 > usual > land.expected(point(8, base_precision="bf16", experts="grouped_mm"))
    assert usual > land.expected(point(1))
    assert landscape("H200").expected(point(8)) > usual > landscape("A100").expected(point(8))


GRIDS = sorted(RESULTS.glob("tuning_grid-gpt-oss-*.json"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
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
