"""The benchmark of sharding, data parallelism, checkpoints and resumption: its rows in a tiny form, and the kept ones.

Speeds of a few steps say nothing and are not looked at; bytes are counted, and must be what they must be.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.distributed import CPU_ROWS, GPU_ROWS, MUST, judged
from tests.benchmarks.record import RESULTS

KEPT = sorted(RESULTS.glob("distributed-*.json"))
TINY = ("--turns", "1", "--turn-steps", "2", "--rounds", "1", "--checkpoint-steps", "2", "--rows-of-worker", "1")


def measured(folder: Path, rows: str, *flags: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.benchmarks.distributed", "--rows", rows, *TINY, *flags]
    command += ["--model", "raysoner-demo", "--sequence-length", "32", "--out", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (result,) = folder.glob("distributed-raysoner-demo-*.json")
    return {row["name"]: row for row in json.loads(result.read_text())["rows"]}


def check_form(row: dict[str, Any]) -> None:
    assert row["must"] == MUST[row["name"]]
    assert all(isinstance(row[figure], int | float) and row[figure] == row[figure] for figure in row["must"])
    assert row["holds"] is judged(row["name"], row)["holds"]


@pytest.mark.long
def test_workers_take_turns_and_checkpoints_are_written_meanwhile(tmp_path: Path) -> None:
    rows = measured(tmp_path, "data_parallel,checkpoints")
    assert list(rows) == ["data_parallel", "checkpoints"]
    for row in rows.values():
        check_form(row)
    assert rows["data_parallel"]["turns"] == 1
    assert rows["checkpoints"]["checkpoint_mb"] > 5
    assert 0 < rows["checkpoints"]["blocked_seconds"] < rows["checkpoints"]["synchronous_blocked_seconds"] * 2
    assert {kind: len(windows) for kind, windows in rows["checkpoints"]["windows"].items()} == {
        "none": 1,
        "asynchronous": 1,
        "synchronous": 1,
    }


@pytest.mark.long
def test_packed_gathers_move_less_than_a_third(tmp_path: Path) -> None:
    row = measured(tmp_path, "sharded_gathers")["sharded_gathers"]
    check_form(row)
    assert 0.25 < row["bytes_ratio"] <= 0.30
    assert 0.25 < row["gpt_oss_20b_on_8_workers"]["bytes_ratio"] <= 0.30


@pytest.mark.long
def test_the_sharded_path_over_one_worker_takes_the_same_steps(tmp_path: Path) -> None:
    """On a GPU the comparison is of speed; that the two are one computation shows here."""
    flags = ("--steps", "1", "--warmup", "1", "--saves", "2", "--micro-batch-size", "1", "--repeats", "1")
    rows = measured(tmp_path, ",".join(GPU_ROWS), *flags)
    for row in rows.values():
        check_form(row)
    assert rows["sharded_one_rank"]["first_losses_equal"]
    assert rows["sharded_one_rank"]["largest_loss_difference"] == 0
    blocking = rows["checkpoint_blocking"]
    assert blocking["copied_gb"] == pytest.approx(12e-9 * blocking["trainable_parameters"], abs=1e-3)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_rows_state_what_they_must_and_whether_it_holds(path: Path) -> None:
    record = json.loads(path.read_text())
    names = [row["name"] for row in record["rows"]]
    assert names == list(CPU_ROWS if "cpu" in path.stem else GPU_ROWS)
    for row in record["rows"]:
        if "not measured" in row:
            assert row["not measured"]
        else:
            check_form(row)


def test_a_row_holds_when_all_its_figures_do() -> None:
    figures = {"bytes_ratio": 0.29, "gather_seconds_ratio": 1.0}
    assert judged("sharded_gathers", figures)["holds"] is True
    assert judged("sharded_gathers", figures | {"bytes_ratio": 0.31})["holds"] is False
    assert judged("data_parallel", {"tokens_ratio": 1.69})["holds"] is False
