"""One real search: the demo model on two CPU workers, from the command line to the profile."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cluster.local import LocalRay
from tests.cluster.demo_work import assert_searched, search
from tests.conftest import DEMO, run_python

pytestmark = pytest.mark.cluster


@pytest.mark.long
def test_a_search_for_quality_from_the_command_line(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Two learning rates, of which one is far too high, by the losses of whole small runs in nine languages."""
    paths = {}
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("train", slice(32)), ("evaluation", slice(32, 50))):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(lines[part]), encoding="utf-8")
    profiles = tmp_path / "profiles"
    flags = {
        "objective": "quality",
        "data.train": paths["train"],
        "data.evaluation": paths["evaluation"],
        "run.storage": tmp_path / "runs",
        "run.maximum_steps": 4,
        "workers.count": 1,
        "tuning.storage": tmp_path / "journals",
        "tuning.profiles": profiles,
        "tuning.quality.evaluations": 2,
        "tuning.quality.repeats": 0,
        "tuning.quality.global_batch_size": 8,
        "tuning.quality.rank": 8,
    }
    words = ["-m", "tuning", "search", "--config", DEMO, *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    rates = ("--tuning.quality.learning_rate", 2e-3, "--tuning.quality.learning_rate", 5.0)
    done = run_python(ray_cluster, *words, *rates)
    assert done.code == 0, done.output
    assert "search    CPU: 2 trainings of 32 rows each" in done.output
    found = json.loads((profiles / "quality-demo-model.json").read_text())
    assert found["chosen"]["learning_rate"] == 2e-3
    best = next(curve for curve in found["curves"] if curve["candidate"] == found["chosen"])
    assert [(each["step"], each["rows"]) for each in best["evaluations"]] == [(2, 16), (4, 32)]
    spoken = {json.loads(line)["reasoning_language"] for line in paths["evaluation"].read_text().splitlines()}
    assert set(best["evaluations"][-1]["languages"]) == spoken
    assert best["evaluations"][1]["loss"] < best["evaluations"][0]["loss"]
    other = next(curve for curve in found["curves"] if curve is not best)
    assert (
        other["outcome"] in ("stopped", "failed") or other["evaluations"][-1]["loss"] > best["evaluations"][1]["loss"]
    )
    written = tomllib.loads((profiles / "quality-demo-model.toml").read_text())
    assert written == {
        "batch": {"global_batch_size": 8},
        "optimizer": {"learning_rate": 2e-3},
        "lora": {"rank": 8, "alpha": 16.0},
    }


@pytest.mark.long
def test_a_search_from_the_command_line(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Two micro-batch sizes, measured by the worker's own code over gloo; cluster/test_monitored_work searches one."""
    done = run_python(ray_cluster, *search(tmp_path, 4, 8))
    assert done.code == 0, done.output
    assert "search    CPU: 2 points" in done.output
    assert_searched(tmp_path, 4, 8)
