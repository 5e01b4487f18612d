"""Runs whose workers share out the experts, on a real Ray: they end where the others do, and go on from each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.local import LocalRay
from tests.conftest import run_python, short_run

from .conftest import WHOLE, Whole
from .running import largest_differences, start

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS = WHOLE["run__maximum_steps"]
EXPERTS: dict[str, Any] = {**WHOLE, "workers__strategy": "expert_parallel"}


def figures(run: Path) -> list[tuple[float, float]]:
    """Gradient norm and load of the busiest expert of each step."""
    newest = max((run / "checkpoints").glob("step-*"))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(line["grad_norm"], line["expert_load_max"]) for line in history if "loss" in line]


def assert_close(whole: Path, other: Path) -> None:
    loss, adapters = largest_differences(whole, other)
    assert loss < 1e-5
    assert adapters < 1e-5


def test_a_killed_run_goes_on_and_ends_where_a_data_parallel_one_does(
    whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    run = start(ray_cluster, tmp_path, "short", tmp_path / "log", **EXPERTS)
    run.wait_for(rf"step 12/{STEPS} saved")
    run.kill()
    done = run_python(ray_cluster, *short_run(tmp_path, "short", **EXPERTS))
    assert done.code == 0, done.output
    assert "strategy  expert_parallel over 2 workers: as workers.strategy says; a worker holds " in done.output
    assert ", 4 of each layer's 8 experts and their adapters, and receives " in done.output
    assert_close(whole.folder, tmp_path / "short")
    for found, expected in zip(figures(tmp_path / "short"), figures(whole.folder), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_it_goes_on_from_data_parallel_workers_and_they_from_it(
    whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    """Two workers with all experts, two that share them out, and one."""
    whole.fork(tmp_path, step=6)
    run = start(ray_cluster, tmp_path, "short", tmp_path / "log", **EXPERTS)
    run.wait_for(rf"step 12/{STEPS} saved")
    run.kill()
    assert "resuming  from step 6\n" in run.output
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__count=1, **WHOLE))
    assert done.code == 0, done.output
    assert "strategy  data_parallel" in done.output
    assert_close(whole.folder, tmp_path / "short")
