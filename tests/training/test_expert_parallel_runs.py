"""A run whose workers share out the experts, on a real Ray: it ends where others do, and they go on from each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.local import LocalRay
from tests.conftest import run_python, short_run

from .conftest import WHOLE, Whole
from .running import RESUMED, largest_differences, start, wait_for_workers

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS = WHOLE["run__maximum_steps"]
EXPERTS: dict[str, Any] = {**WHOLE, "workers__strategy": "expert_parallel"}


def figures(run: Path) -> list[tuple[float, float]]:
    """Gradient norm and load of the busiest expert of each step."""
    newest = max((run / "checkpoints").glob("step-*"))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(line["grad_norm"], line["expert_load_max"]) for line in history if "loss" in line]


def moments_apart(whole: Path, other: Path) -> dict[str, float]:
    """Norm of the difference of the optimizer's moments in the last checkpoints, over that of the moments."""
    own, others = (
        load_file(max((run / "checkpoints").glob("step-*")) / "optimizer.safetensors") for run in (whole, other)
    )
    assert own.keys() == others.keys()
    found = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        names = [name for name in own if name.endswith(f".{kind}")]
        squares = [(float((own[n] - others[n]).square().sum()), float(own[n].square().sum())) for n in names]
        found[kind] = math.sqrt(sum(apart for apart, _ in squares) / sum(all_of for _, all_of in squares))
    return found


@pytest.mark.long
def test_it_goes_on_from_others_from_itself_and_they_from_it(
    whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    """Two workers with all experts, two that share them out, of which one is killed and then the driver, and one."""
    whole.fork(tmp_path, step=6)
    run = start(ray_cluster, tmp_path, "short", tmp_path / "log", **EXPERTS)
    seen = run.wait_for(rf"step 12/{STEPS} saved")
    assert "resuming  from step 6\n" in run.output
    assert "strategy  expert_parallel over 2 workers: as workers.strategy says; a worker holds " in run.output
    assert ", 4 of each layer's 8 experts and their adapters, and receives " in run.output
    wait_for_workers(ray_cluster, 2)[1].kill()
    seen = run.wait_for(RESUMED.pattern, seen)
    run.wait_for(rf"step 18/{STEPS} saved", seen)
    run.kill()
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__count=1, **WHOLE))
    assert done.code == 0, done.output
    assert "strategy  data_parallel" in done.output
    loss, adapters = largest_differences(whole.folder, tmp_path / "short")
    assert loss < 1e-5
    assert adapters < 1e-5
    assert max(moments_apart(whole.folder, tmp_path / "short").values()) < 3e-5
    for found, expected in zip(figures(tmp_path / "short")[:18], figures(whole.folder), strict=False):
        assert found == pytest.approx(expected, rel=1e-4)
