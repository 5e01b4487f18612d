"""One real search: the demo model on two CPU workers, from the command line to the profile."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cluster.local import LocalRay
from tests.conftest import DEMO, run_python

pytestmark = pytest.mark.cluster


def test_a_search_from_the_command_line(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Two micro-batch sizes, measured by the worker's own code over gloo."""
    profiles = tmp_path / "profiles"
    flags = {
        "tuning.storage": tmp_path / "journals",
        "tuning.profiles": profiles,
        "tuning.steps": 2,
        "tuning.warmup_steps": 1,
        "tuning.space.activation_checkpointing": "none",
        "run.storage": tmp_path / "runs",
    }
    words = ["-m", "tuning", "search", "--config", DEMO, *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    sizes = ("--tuning.space.micro_batch_size", 4, "--tuning.space.micro_batch_size", 8)
    done = run_python(ray_cluster, *words, *sizes)
    assert done.code == 0, done.output
    assert "search    CPU: 2 points" in done.output
    found = json.loads((profiles / "cpu-demo-model.json").read_text())
    assert [trial["outcome"] for trial in found["trials"]] == ["measured", "measured"]
    speeds = {trial["point"]["micro_batch_size"]: trial["tokens_per_second"] for trial in found["trials"]}
    assert set(speeds) == {4, 8}
    assert all(len(trial["speeds"]) == 2 and 0.1 < trial["loss"] < 5 for trial in found["trials"])
    assert all(trial["peak_bytes"] > 2**28 and trial["device"] == "CPU" for trial in found["trials"])
    assert (found["configured"]["micro_batch_size"], found["workers"]) == (8, 2)
    assert found["versions"]["torch"]
    assert tomllib.loads((profiles / "cpu-demo-model.toml").read_text())["batch"] == {
        name: found["chosen"][name] for name in ("micro_batch_size", "accumulation_steps", "activation_checkpointing")
    }
    assert list((tmp_path / "journals" / "tune").rglob("events.out.tfevents*"))  # for TensorBoard
