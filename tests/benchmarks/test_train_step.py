"""The benchmark of a training step runs on a CPU too, and there its rows are comparable: one model, one loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_all_rows_take_the_same_step(tmp_path: Path) -> None:
    """Adapters begin as nothing: ours and the others' first losses are the base's, read from one checkpoint."""
    checkpoint = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "tests.benchmarks.train_step", "--model", "raysoner-demo", "--one-document"]
    command += ["--steps", "1", "--warmup", "1", "--sequence-length", "64", "--out", str(tmp_path)]
    command += ["--checkpoint", str(checkpoint)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (result,) = tmp_path.glob("*.json")
    record = json.loads(result.read_text())
    assert record["command"].startswith("python -m tests.benchmarks.train_step --model raysoner-demo")
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["raysoner", "seed", "transformers-peft"]
    for row in rows.values():
        assert row["first_loss"] == pytest.approx(rows["seed"]["first_loss"], abs=2e-4)
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_gb"] is None
    ours, stock = rows["raysoner"], rows["transformers-peft"]
    assert ours["trainable_parameters"] == stock["trainable_parameters"] > rows["seed"]["trainable_parameters"]


@pytest.mark.long
def test_a_row_that_fails_is_kept_as_not_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.train_step", "--model", "raysoner-demo", "--rows", "raysoner"]
    command += ["--rank", "0", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 1
    (result,) = tmp_path.iterdir()
    assert json.loads(result.read_text())["rows"] == [{"name": "raysoner", "not measured": "exit code 1"}]
