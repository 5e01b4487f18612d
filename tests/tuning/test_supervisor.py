"""What becomes of a trial's processes, whatever they do; and the trial itself, by the worker's own code on a CPU."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from cluster.config import load_files
from cluster.hardware import GIB
from training.config import TrainingConfig
from training.data.prepare import prepare, read_prepared
from tuning.journal import Trial
from tuning.processes import COMMAND
from tuning.space import configured_point
from tuning.supervisor import noise, run_trial
from tuning.trial import whole_steps

DEMO = "training/configs/demo.toml"
STEP = (
    '{"event": "step", "step": %d, "seconds": 0.5, "tokens_per_second": %d, "peak_bytes": %d, "loss": 2.5, "rank": 0}'
)
PREAMBLE = f"""
import json, os, signal, sys, time
order = json.loads(sys.stdin.readline())
def say(text):
    os.write(order["events"], text.encode() + b"\\n")
def steps(count):
    for step in range(1, count + 1):
        say('{STEP}' % (step, 1000 + 10 * step, step * 2**20))
say('{{"event": "begun", "device": "test"}}')
"""


def job(**settings: Any) -> dict[str, Any]:
    config = load_files(TrainingConfig, DEMO)
    one = config.model_copy(update={"workers": config.workers.model_copy(update={"count": settings.pop("workers", 1)})})
    usual = {"data": {"train": "", "prepared": {}}, "warmup_steps": 1, "steps": 3, "trial_seconds": 60.0}
    return {"config": one.model_dump(mode="json"), "limit_bytes": None, **usual, **settings}


def trial(work: dict[str, Any], script: str | None = None) -> tuple[Trial, list[Trial]]:
    """A trial of the demo's own point, by a script or, without one, by the worker's code; and what was reported."""
    reports: list[Trial] = []
    command = COMMAND if script is None else (sys.executable, "-c", PREAMBLE + script)
    point = configured_point(TrainingConfig.model_validate(work["config"]))
    return run_trial(point, work, reports.append, command), reports


def test_warm_up_is_left_out_and_each_measured_step_is_reported() -> None:
    done, reports = trial(job(), 'steps(4); say(\'{"event": "done"}\'); time.sleep(60)')
    assert done.outcome == "measured"
    assert done.speeds == [1020, 1030, 1040]
    assert (done.tokens_per_second, done.peak_bytes, done.loss, done.device) == (1030, 4 * 2**20, 2.5, "test")
    assert done.step_seconds == [0.5] * 3
    assert [(report.outcome, report.speeds) for report in reports] == [("slow", [1020, 1030])]
    assert done.seconds < 50


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        (
            'steps(2); say(\'{"event": "out_of_memory", "reason": "20 GiB"}\'); time.sleep(60)',
            "out_of_memory",
            "20 GiB",
        ),
        ('say(\'{"event": "error", "reason": "ValueError: no"}\'); sys.exit(1)', "failed", "ValueError: no"),
        ("steps(2); os.kill(os.getpid(), signal.SIGKILL)", "died", "a process of the trial ended by signal 9"),
        ("sys.exit('CUDA says no')", "died", "ended with exit code 1; the last it said: CUDA says no"),
        ("sys.exit(0)", "died", "with exit code 0"),
    ],
)
def test_every_end_is_a_result(script: str, outcome: str, reason: str) -> None:
    done, _ = trial(job(), script)
    assert done.outcome == outcome
    assert reason in done.reason
    assert done.tokens_per_second is None


@pytest.mark.fault
@pytest.mark.parametrize("how", ["time.sleep(600)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_trial_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"
    script = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
{how}
"""
    done, _ = trial(job(trial_seconds=1.5), script)
    assert done.outcome == "hung"
    assert done.reason == "it was not done after 0.025 minutes, as tuning.trial_minutes says"
    own, child = map(int, pids.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(own, 0)
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    assert time.monotonic() < until


def test_of_several_workers_one_that_ends_ends_the_trial() -> None:
    script = "steps(2)\nif order['rank']:\n    os._exit(3)\ntime.sleep(1)"
    done, _ = trial(job(workers=2), script)
    assert done.outcome == "died"
    assert "exit code 3" in done.reason


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's training data, as a run's driver prepares it."""
    config = load_files(TrainingConfig, DEMO)
    storage = str(tmp_path_factory.mktemp("rows"))
    folder = prepare("training/demo/data/train.jsonl", config.data, config.model.path, storage, 0, spread=False)
    return {"train": str(folder), "prepared": read_prepared(folder).model_dump(mode="json")}


@pytest.mark.cluster
def test_memory_that_runs_out_is_a_result(prepared: dict[str, Any]) -> None:
    """The system refuses the process what a step of the worker's code asks for."""
    done, _ = trial(job(data=prepared, limit_bytes=GIB // 8, trial_seconds=300.0))
    assert done.outcome == "out_of_memory", done.reason
    assert done.tokens_per_second is None


def test_a_step_is_whole() -> None:
    rows = Dataset.from_dict({"n": list(range(10))})
    assert whole_steps(rows, 4)["n"][:] == list(range(8))
    assert whole_steps(rows, 10)["n"][:] == list(range(10))
    assert whole_steps(rows, 24)["n"][:] == [*range(10), *range(10), *range(4)]


def test_noise_is_the_medians_standard_error() -> None:
    assert noise([1.0, 1.0]) == 0.0
    assert noise([100.0] * 8) == 0.0
    assert noise([99.0, 100.0, 101.0, 102.0, 103.0, 104.0, 105.0]) == pytest.approx(
        1.2533 * 1.4826 * 2 / 7**0.5 / 102, rel=1e-3
    )
