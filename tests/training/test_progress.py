"""What a run sends to Ray and prints: which worker sends which gauge, when all report, and how the line reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train import CheckpointUploadMode
from transformers import TrainerControl, TrainerState, TrainingArguments

from cluster.local import LocalRay
from cluster.metrics import TRAINING, TRAINING_METRICS
from tests.conftest import run_python
from tests.training.reporting import LINES
from training import progress
from training.progress import REPORT_SECONDS, Metrics, Progress
from training.throughput import Meter

LINE = {"loss": 2.5, "grad_norm": 0.75, "learning_rate": 1e-4, "epoch": 0.1, "num_tokens": 900, "skipped_steps": 1}


class FakeGauges:
    """In place of `cluster.metrics.Gauges`, which wants Ray."""

    def __init__(self, prefix: str, descriptions: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self.made_with = (prefix, descriptions, tags)
        self.lines: list[dict[str, float]] = []
        self.closed = False

    def set(self, values: Mapping[str, float]) -> None:
        assert values.keys() <= TRAINING_METRICS.keys()
        self.lines.append(dict(values))

    def close(self) -> None:
        self.closed = True


class Run:
    """A run's callbacks, called as the trainer calls them."""

    def __init__(self, *callbacks: Any, steps: int = 100) -> None:
        self.callbacks = callbacks
        self.state = TrainerState(max_steps=steps, is_world_process_zero=True)

    def call(self, event: str, **keywords: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(object.__new__(TrainingArguments), self.state, TrainerControl(), **keywords)

    def log(self, step: int, **logs: Any) -> None:
        self.state.global_step = step
        self.call("on_log", logs=logs)


class Turned:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Turned:
    return Turned()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was reported to Ray Train."""
    made: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], **keywords: Any) -> None:
        assert keywords == {"checkpoint_upload_mode": CheckpointUploadMode.ASYNC}
        made.append(metrics)

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(progress, "Gauges", FakeGauges)
    return made


def begun(clock: Turned, rank: int) -> tuple[Run, Metrics, Any]:
    metrics = Metrics(Meter(torch.device("cpu"), 1.0, None, clock), "a-run", rank)
    run = Run(metrics)
    run.call("on_train_begin")
    return run, metrics, metrics.gauges


def test_rank_0_sends_the_runs_gauges(clock: Turned, reports: list[dict[str, Any]]) -> None:
    run, metrics, gauges = begun(clock, 0)
    assert gauges.made_with == (TRAINING, TRAINING_METRICS, {"run": "a-run", "rank": "0"})
    clock.now += 2
    run.log(4, **LINE, **metrics.meter.figures(100, 4), note="text")
    (sent,) = gauges.lines
    expected = {"step": 4, "loss": 2.5, "gradient_norm": 0.75, "learning_rate": 1e-4, "skipped_steps": 1}
    expected |= {"tokens_per_second": 50, "step_seconds": 0.5, "data_wait": 0}
    assert {name: value for name, value in sent.items() if name != "memory_gib"} == expected
    assert sent["memory_gib"] == metrics.meter.own["memory_gib"] > 0
    run.log(4, eval_loss=1.5, eval_runtime=3.0)
    assert gauges.lines[1]["evaluation_loss"] == 1.5
    run.call("on_train_end")
    assert gauges.closed


def test_another_rank_sends_its_own_memory_and_wait(clock: Turned, reports: list[dict[str, Any]]) -> None:
    run, metrics, gauges = begun(clock, 1)
    assert gauges.made_with[2] == {"run": "a-run", "rank": "1"}
    clock.now += 2
    figures = metrics.meter.figures(100, 4)
    run.log(4, **LINE, **{**figures, "data_wait": 0.75, "memory_gib": 99.0})
    assert gauges.lines == [{"memory_gib": metrics.meter.own["memory_gib"], "data_wait": 0.0}]
    run.call("on_train_end")


def test_the_memory_and_wait_of_rank_0_are_its_own_too(clock: Turned, reports: list[dict[str, Any]]) -> None:
    run, metrics, gauges = begun(clock, 0)
    clock.now += 2
    run.log(4, **{**metrics.meter.figures(100, 4), "data_wait": 0.75, "memory_gib": 99.0})
    assert gauges.lines[0]["data_wait"] == 0.0
    assert gauges.lines[0]["memory_gib"] == metrics.meter.own["memory_gib"]
    run.call("on_train_end")


def test_every_rank_reports_at_the_same_lines(clock: Turned, reports: list[dict[str, Any]]) -> None:
    """By training time, and with the newest value of everything."""
    lines_reported = []
    for rank in (0, 1):
        run, metrics, _ = begun(clock, rank)
        reported = []
        for step in range(1, 8):
            clock.now += REPORT_SECONDS / 2
            before = len(reports)
            run.log(step, loss=10.0 - step, **metrics.meter.figures(10, step))
            run.log(step, eval_loss=20.0 - step)
            reported += [step] * (len(reports) - before)
        lines_reported.append(reported)
        run.call("on_train_end")
    assert lines_reported == [[1, 3, 5, 7]] * 2
    assert (reports[1]["step"], reports[1]["loss"], reports[1]["eval_loss"]) == (3, 7.0, 18.0)
    assert type(reports[1]["step"]) is int


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch, clock: Turned) -> Run:
    monkeypatch.setattr("training.progress.time.perf_counter", clock)
    run = Run(Progress())
    run.call("on_train_begin")
    return run


FIGURES = {"tokens_per_second": 26443.9, "memory_gib": 55.09, "data_wait": 0.1}


def test_the_line(bar: Run, clock: Turned, capsys: pytest.CaptureFixture[str]) -> None:
    clock.now += 30
    bar.log(1, loss=2.34567, **FIGURES)
    clock.now += 6
    bar.log(3, loss=2.0, **FIGURES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 1/100 [{'·' * 20}] loss 2.3457, 26,444 tokens/s, 55.1 GiB, 49:30 left"
    # The first step's 30 s are not taken for what a step takes.
    assert lines[1] == f"step 3/100 [{'·' * 20}] loss 2.0000, 26,444 tokens/s, 55.1 GiB, 4:51 left"
    expected = r"step (\d+)/100 \[[█·]{20}\] loss [\d.]+, [\d,]+ tokens/s, [\d.]+ GiB, \d+:\d\d left"
    assert all(re.fullmatch(expected, line) for line in lines)


def test_the_line_says_what_limits(bar: Run, clock: Turned, capsys: pytest.CaptureFixture[str]) -> None:
    clock.now += 1
    bar.log(50, loss=2.0, **{**FIGURES, "mfu": 0.394, "data_wait": 0.256})
    end = "0:01 left, 39% of peak, waiting for data 26%\n"
    assert capsys.readouterr().out == (
        f"step 50/100 [{'█' * 10}{'·' * 10}] loss 2.0000, 26,444 tokens/s, 55.1 GiB, {end}"
    )


def test_an_evaluations_line_has_the_loss_of_each_language(bar: Run, capsys: pytest.CaptureFixture[str]) -> None:
    bar.log(0, eval_loss=4.0, eval_loss_fr=4.5, eval_loss_de=3.5)
    assert capsys.readouterr().out == f"step 0/100 [{'·' * 20}] held-out loss 4.0000, de 3.5000 · fr 4.5000\n"


def test_an_evaluations_line_has_the_figures_before_it(
    bar: Run, clock: Turned, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.log(0, eval_loss=4.0)
    assert capsys.readouterr().out == f"step 0/100 [{'·' * 20}] held-out loss 4.0000\n"
    clock.now += 10
    bar.log(10, loss=2.0, **FIGURES)
    clock.now += 500
    bar.log(10, eval_loss=3.0, eval_runtime=500.0)
    line = capsys.readouterr().out.splitlines()[1]
    assert line == f"step 10/100 [██{'·' * 18}] held-out loss 3.0000, 26,444 tokens/s, 55.1 GiB, 1:30 left"
    clock.now += 20
    bar.log(20, loss=2.0, **FIGURES)
    assert "1:10 left" not in (last := capsys.readouterr().out)
    assert "69:20 left" in last  # evaluations take their time in what is left, too


def test_other_ranks_and_other_lines_print_nothing(bar: Run, capsys: pytest.CaptureFixture[str]) -> None:
    bar.log(3, train_runtime=3.0)
    bar.log(3)
    bar.state.is_world_process_zero = False
    bar.log(4, loss=2.0, **FIGURES)
    assert capsys.readouterr().out == ""


@pytest.mark.long
@pytest.mark.cluster
def test_two_workers_on_a_real_ray(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """The controller takes a report every two seconds, and the workers do not wait for that."""
    every_two_seconds = ray_cluster.environment | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2"}
    ray = dataclasses.replace(ray_cluster, environment=every_two_seconds)
    done = run_python(ray, "-m", "tests.training.reporting", tmp_path)
    assert done.code == 0, done.output
    reports = json.loads((tmp_path / "reports.json").read_text(encoding="utf-8"))
    assert [[report["step"] for report in each] for each in reports] == [[n, n] for n in range(1, LINES + 1)]
    assert [each[0]["loss"] for each in reports] == [float(n) for n in range(1, LINES + 1)]
    assert reports[-1][0]["seconds"] < 2.0 * (LINES - 3)  # what a worker that waited would have taken at the least
    gauges = [line.rsplit(" ", 1) for line in (tmp_path / "gauges.txt").read_text(encoding="utf-8").splitlines()]
    found = {(name.split("{")[0], re.search(r'rank="(\d)"', name)[1]): float(value) for name, value in gauges}  # type: ignore[index]
    assert {name for name, rank in found if rank == "1"} == {
        "ray_raysoner_training_memory_gib",
        "ray_raysoner_training_data_wait",
    }
    assert found["ray_raysoner_training_loss", "0"] == LINES
    assert all('run="reporting"' in name for name, _ in gauges)
