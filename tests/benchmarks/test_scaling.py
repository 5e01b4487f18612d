"""The benchmark of many GPUs runs on a CPU too: there the same steps are taken by one, two and four processes.

Speeds of a few steps say nothing and are not looked at; losses, gradients, adapters and bytes are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import GIB
from cluster.memory import step_gather_bytes
from tests.benchmarks.record import RESULTS
from tests.benchmarks.scaling import end, options_of, wait_for
from tests.benchmarks.scaling_points import POINTS, recipe_of, settings_of, shape_of
from tests.benchmarks.scaling_rows import AIM, MUST, reaches, row_of
from tests.benchmarks.scaling_worker import Setting

pytestmark = pytest.mark.cluster

KEPT = sorted(RESULTS.glob("scaling-*.json"))
TINY = ("--model", "raysoner-demo", "--sequence-length", "160", "--micro-batch-size", "1", "--steps", "2")
SETTING = Setting(
    model="gpt-oss-20b",
    workers=2,
    shards=2,
    packed=True,
    global_micro_batches=2,
    micro_batch_size=8,
    sequence_length=2048,
    checkpointing="none",
    compiled=True,
    chunk_tokens=2048,
    rank=8,
    compared_steps=2,
    steps=3,
)


def measured(folder: Path, workers: int, points: str, *flags: str, code: int = 0) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--workers", str(workers), "--points", points]
    command += [*TINY, "--out", str(folder), *flags]
    # As where there is no GPU: two processes on two cores, whatever this machine has.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert finished.returncode == code, finished.stderr[-3000:]
    (result,) = folder.glob(f"scaling-raysoner-demo-{workers}xcpu*.json")
    rows = json.loads(result.read_text())["rows"]
    assert [json.loads(line) for line in finished.stdout.splitlines()] == rows
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    ("workers", "points"),
    [
        pytest.param(2, "one_gpu,data_parallel,sharded_mxfp4,sharded_bf16", marks=pytest.mark.long),
        pytest.param(4, "one_gpu,sharded_mxfp4", marks=pytest.mark.long),
    ],
)
def test_several_processes_take_the_steps_of_one(tmp_path: Path, workers: int, points: str) -> None:
    rows = measured(tmp_path, workers, points)
    assert list(rows) == points.split(",")
    for name, row in rows.items():
        assert row["holds"] is True, row
        assert row["workers"] == (1 if name == "one_gpu" else workers)
        if name != "one_gpu":
            assert len(row["losses"]) == 3
            assert row["largest_loss_difference"] <= 1e-5
            assert row["largest_gradient_difference"] <= 1e-5
            assert row["adapters_identical"] is True
    packed = rows["sharded_mxfp4"]
    assert packed["gathers"] == 2 * shape_of("raysoner-demo").num_hidden_layers
    assert packed["gathered_over_arithmetic"] == 1
    if dense := rows.get("sharded_bf16"):
        assert dense["gathered_gb"] > 2 * packed["gathered_gb"]


@pytest.mark.long
def test_a_point_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """Adapters of rank 0 are refused; both processes of the second point are ended, and the reason is kept."""
    rows = measured(tmp_path, 2, "one_gpu,data_parallel", "--rank", "0", code=1)
    for name, row in rows.items():
        assert row["name"] == name
        assert "rank" in row["not measured"]
        assert "step_seconds" not in row


def test_points_of_a_model_have_one_micro_batch_that_fits_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two GPUs of 80 GB the 20b takes eight rows in each, and the 120b recomputes its layers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    options = options_of([])
    found = settings_of(options, int(79.1 * GIB))
    assert list(found) == list(POINTS)
    rows = {name: setting.micro_batch_size for name, setting in found.items() if setting}
    assert rows == dict.fromkeys(POINTS, 8) | {"sharded_mxfp4_one_row": 1, "sharded_bf16_one_row": 1}
    modes = {name: setting.checkpointing for name, setting in found.items() if setting}
    assert modes == dict.fromkeys(POINTS, "none") | {"sharded_120b": "full"}
    smaller = settings_of(options, 45 * GIB)
    assert smaller["sharded_120b"] is None
    assert smaller["one_gpu"] is not None
    assert smaller["sharded_bf16"] is not None
    assert smaller["one_gpu"].micro_batch_size == smaller["sharded_bf16"].micro_batch_size == 8
    assert smaller["sharded_bf16"].checkpointing == "full"
    least = settings_of(options, 20 * GIB)
    assert least["sharded_bf16"] is None
    assert least["one_gpu"] is not None
    assert (least["one_gpu"].micro_batch_size, least["one_gpu"].checkpointing) == (4, "full")


@pytest.mark.parametrize("words", [["--points", "one_gpu,many"], ["--gpus", "1"]])
def test_what_there_is_not_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(words)
    assert words[0] in capsys.readouterr().err


def shell(command: str) -> BaseProcess:
    """A process that becomes a shell, at the head of a group of its own."""

    def become() -> None:
        os.setsid()
        os.execvp("sh", ["sh", "-c", command])

    process = multiprocessing.get_context("fork").Process(target=become)
    process.start()
    return process


def test_processes_that_take_too_long_are_ended_with_what_they_started(tmp_path: Path) -> None:
    """A shell and its child, as a rank and its compiler."""
    process = shell(f"sleep 300 & echo $! > {tmp_path}/writing; mv {tmp_path}/writing {tmp_path}/child; wait")
    while not (tmp_path / "child").is_file():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    assert wait_for([process], tmp_path, limit_seconds=0.2) == "took longer than 0 s"
    end(process)
    assert process.exitcode == -signal.SIGKILL
    while is_running(child):  # until its new parent has seen it off
        time.sleep(0.01)


def test_the_first_error_is_the_reason(tmp_path: Path) -> None:
    """Another process that has not ended is not waited for."""
    waiting = shell("sleep 300")
    failed = shell(f"echo rank 1: out of memory > {tmp_path}/error-1.txt; exit 1")
    assert wait_for([waiting, failed], tmp_path, limit_seconds=60) == "rank 1: out of memory\n"
    (tmp_path / "error-1.txt").unlink()
    killed = shell("kill -9 $$")
    assert wait_for([waiting, killed], tmp_path, limit_seconds=60) == "rank 1: exit code -9"
    for process in (waiting, failed, killed):
        end(process)


def is_running(process: int) -> bool:
    """Not gone, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def figures(seconds: list[float], **more: Any) -> dict[str, Any]:
    losses = {"losses": [12.0, 11.5], "gradient_norms": [2.0, 1.0]}
    known = {"peak_memory_bytes": [None, None], "trainable_parameters": 1, "adapters_identical": True}
    return {"seconds": seconds, **losses, **known, **more}


def gathering(seconds: list[float], **more: Any) -> dict[str, Any]:
    moved = step_gather_bytes(shape_of(SETTING.model), recipe_of(SETTING), 1)
    alone = {"seconds": 0.2, "seconds_without_links": 0.05, "step_seconds_without_links": 1.02}
    return figures(seconds, gathered_bytes=moved, gathers=48, gathers_alone=alone, **more)


def test_what_is_hidden_and_how_fast_follow_from_the_steps() -> None:
    """Medians of 1.0, 1.01 and 1.05 s: of 0.2 s of gathers 0.04 are not hidden, of 0.15 s on the links 0.03."""
    one = Setting(**{**vars(SETTING), "workers": 1, "shards": 1})
    whole = Setting(**{**vars(SETTING), "shards": 1})
    others = {
        "one_gpu": (one, figures([0.9, 1.0, 1.1])),
        "data_parallel": (whole, figures([1.01, 1.01, 1.01])),
    }
    row = row_of("sharded_mxfp4", SETTING, gathering([1.05, 1.05, 1.05]), others)
    assert row["efficiency"] == pytest.approx(1 / 1.05, abs=1e-4)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(8 * 2048 / 1.05, abs=0.1)
    assert row["hidden"] == pytest.approx(0.8)
    assert row["links_hidden"] == pytest.approx(0.8)
    assert row["link_gb_per_second"] == pytest.approx(row["gathered_gb"] / 0.15, rel=1e-3)
    assert row["gathered_over_arithmetic"] == 1


def test_points_of_another_micro_batch_are_not_compared() -> None:
    other = Setting(**{**vars(SETTING), "workers": 1, "shards": 1, "micro_batch_size": 4})
    row = row_of("sharded_mxfp4", SETTING, gathering([1.05]), {"one_gpu": (other, figures([1.0]))})
    assert "efficiency" not in row
    assert row["holds"] is False


def test_losses_that_differ_do_not_hold() -> None:
    one = Setting(**{**vars(SETTING), "workers": 1, "shards": 1})
    apart = gathering([1.0], losses=[12.0, 11.9])
    row = row_of("sharded_mxfp4", SETTING, apart, {"one_gpu": (one, figures([1.0]))})
    assert row["largest_loss_difference"] == pytest.approx(0.4)
    assert row["holds"] is False


def test_limits_are_inclusive_and_a_missing_figure_fails() -> None:
    assert reaches({"efficiency": 0.8}, {"efficiency": ">= 0.8"})
    assert not reaches({"efficiency": 0.79}, {"efficiency": ">= 0.8"})
    assert not reaches({}, {"efficiency": ">= 0.8"})
    assert reaches({}, {})


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_rows_state_what_they_must_and_whether_it_holds(path: Path) -> None:
    for row in json.loads(path.read_text())["rows"]:
        assert row["name"] in POINTS
        if "step_seconds" not in row:
            assert row["not measured"]
            continue
        assert row["holds"] is reaches(row, row["must"])
        if "cpu" not in path.stem:
            assert row["must"] == MUST[row["name"]]
            assert row.get("aim", {}) == AIM.get(row["name"], {})
