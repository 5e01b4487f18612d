"""A run that is asked to stop saves in the same step on all workers: by signals to real processes of a real Ray."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from cluster.local import LocalRay, local_ray, stop_tree
from tests.conftest import SECONDS
from training.stopping import POLL_SECONDS, Preempted, Stop, Wish, leave

Event = dict[str, Any]


class Run:
    """A driver of `tests.training.stoppable`, and what its workers have written."""

    def __init__(self, ray: LocalRay, folder: Path, *words: str, **environment: str) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.training.stoppable", str(folder), *words],
                env={**ray.environment, **environment},
                stdout=output,
                stderr=output,
            )

    def events(self, rank: int, kind: str) -> list[Event]:
        path = self.folder / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def both(self, kind: str) -> list[Event]:
        """The last such event of each rank; empty unless both have one."""
        found = [self.events(rank, kind)[-1:] for rank in (0, 1)]
        return [event for events in found for event in events] if all(found) else []

    def wait_until(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        end = time.monotonic() + seconds
        while not (met := condition()):
            assert time.monotonic() < end, self.output
            time.sleep(0.02)
        return met

    def wait_for_steps(self) -> None:
        self.wait_until(lambda: len(self.events(0, "step")) > 10 and len(self.events(1, "step")) > 10)

    def end(self, seconds: float = SECONDS) -> int:
        assert self.process.wait(timeout=seconds) is not None
        return self.process.returncode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def runs(ray_cluster: LocalRay, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs in one folder, and ends those that a failed test leaves behind."""
    started: list[Run] = []

    def start(*words: str) -> Run:
        started.append(Run(ray_cluster, tmp_path, *words))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.wait()


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_a_worker_that_is_terminated_has_all_save_and_go_on_elsewhere(runs: Callable[..., Run]) -> None:
    """No failure is allowed, and this is none."""
    run = runs("--steps", "150")
    run.wait_for_steps()
    before = run.both("start")
    os.kill(before[1]["pid"], signal.SIGTERM)
    sent = time.time()
    stops = run.wait_until(lambda: run.both("stop"))
    assert max(stop["time"] for stop in stops) - sent < 3
    assert {stop["wish"] for stop in stops} == {"LEAVE"}
    step = stops[0]["step"]
    assert stops[1]["step"] == step
    assert run.end() == 0, run.output
    for rank in (0, 1):
        assert [event["step"] for event in run.events(rank, "step")] == list(range(1, 151))
        assert [event["step"] for event in run.events(rank, "start")] == [0, step]
    assert {event["pid"] for event in before}.isdisjoint(event["pid"] for event in run.both("start"))
    assert "asked False, finished True" in run.output


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_a_signal_to_the_driver_saves_and_the_same_command_resumes(runs: Callable[..., Run]) -> None:
    """test_faults_stops sends a SIGINT to a run that trains."""
    run = runs()
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    sent = time.time()
    assert run.end() == 143, run.output
    stops = run.both("stop")
    assert max(stop["time"] for stop in stops) - sent < POLL_SECONDS + 4
    assert [stop["wish"] for stop in stops] == ["END", "END"]
    step = stops[0]["step"]
    assert stops[1]["step"] == step
    assert "stopping  after this step, when it is saved; a second signal aborts at once" in run.output
    assert "asked True, finished False" in run.output
    assert "Traceback" not in run.output
    again = runs("--steps", str(step + 5))
    assert again.end() == 0, again.output
    assert [event["step"] for event in again.events(1, "step")] == list(range(1, step + 6))


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_a_second_signal_aborts_at_once(runs: Callable[..., Run]) -> None:
    run = runs("--deaf")
    run.wait_for_steps()
    workers = [event["pid"] for event in run.both("start")]
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: "a second signal aborts" in run.output)
    time.sleep(2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end(seconds=90) == 130, run.output
    run.wait_until(lambda: not any(map(psutil.pid_exists, workers)), seconds=90)


@pytest.mark.cluster
def test_a_run_that_waits_for_its_workers_is_ended_by_one_signal(runs: Callable[..., Run]) -> None:
    run = runs("--workers", "9")
    run.wait_until(lambda: "fitting" in run.output)
    time.sleep(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(seconds=90) == 143, run.output
    assert "stopped   no worker has begun" in run.output


def command(ray: LocalRay, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        env=ray.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_ray_job_stop_saves(ray_cluster: LocalRay, tmp_path: Path) -> None:
    address = ("--address", ray_cluster.dashboard)
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    job = ("--submission-id", "counting", "--no-wait", "--working-dir", ".", "--runtime-env-json", patience)
    command(
        ray_cluster, "job", "submit", *address, *job, "--", "python", "-m", "tests.training.stoppable", str(tmp_path)
    )
    run = object.__new__(Run)
    run.folder, run.log = tmp_path, tmp_path / "log"
    run.log.touch()
    run.wait_for_steps()
    command(ray_cluster, "job", "stop", *address, "counting")
    assert [stop["wish"] for stop in run.both("stop")] == ["END", "END"]
    assert "asked True, finished False" in command(ray_cluster, "job", "logs", *address, "counting")


@contextmanager
def second_node(ray: LocalRay, cpus: int) -> Iterator[str]:
    """Another node on this machine; its id."""
    words = [
        "start",
        "--address",
        ray.address,
        "--block",
        "--num-cpus",
        str(cpus),
        "--object-store-memory",
        "100000000",
    ]
    environment = {key: value for key, value in ray.environment.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    script = "import ray, json; ray.init(logging_level='ERROR'); print(json.dumps([n['NodeID'] for n in ray.nodes() "
    script += "if n['Alive'] and not n['Resources'].get('node:__internal_head__')]))"
    try:
        end = time.monotonic() + 60
        while True:
            done = subprocess.run([sys.executable, "-c", script], env=ray.environment, capture_output=True, text=True)
            if ids := json.loads(done.stdout.splitlines()[-1]):
                break
            assert time.monotonic() < end
        yield ids[0]
    finally:
        stop_tree(process)


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_a_node_that_is_drained_has_all_save_and_go_on_elsewhere(tmp_path: Path) -> None:
    with local_ray(2, dashboard=False) as ray, second_node(ray, cpus=2) as node:
        run = Run(ray, tmp_path, "--steps", "300", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5")
        run.wait_for_steps()
        drain = ["drain-node", "--address", ray.address, "--node-id", node, "--deadline-remaining-seconds", "120"]
        command(ray, *drain, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        sent = time.time()
        stops = run.wait_until(lambda: run.both("stop"))
        assert max(stop["time"] for stop in stops) - sent < 5
        assert [stop["wish"] for stop in stops] == ["LEAVE", "LEAVE"]
        assert stops[0]["step"] == stops[1]["step"]
        assert run.end() == 0, run.output
        for rank in (0, 1):
            assert [event["step"] for event in run.events(rank, "step")] == list(range(1, 301))
        begun = run.both("start")
        assert max(event["time"] for event in begun) - sent < 60  # and not when the node's time is over


def test_preemption_is_charged_to_its_own_budget() -> None:
    error = UserExceptionWithTraceback(pickle.loads(pickle.dumps(Preempted(7))), "a traceback")
    status = WorkerGroupPollStatus({0: WorkerStatus(running=False, error=error), 1: WorkerStatus(running=True)})
    policy = DefaultFailurePolicy(FailureConfig(max_failures=0))
    for _ in range(3):
        assert policy.make_decision(status.get_worker_group_error()) == FailureDecision.RETRY
    assert status.has_preempted_worker()
    assert isinstance(Preempted(7), RuntimeError)
    assert str(Preempted(7)) == "preempted at step 7; the run goes on from there"


def test_only_who_goes_on_elsewhere_leaves_by_an_error() -> None:
    leave(Wish.NONE, 3)
    leave(Wish.END, 3)
    with pytest.raises(Preempted, match="at step 3"):
        leave(Wish.LEAVE, 3)


def test_the_second_termination_is_the_last() -> None:
    script = (
        "import time; from training.stopping import catch_termination, wish\n"
        "catch_termination(); import training.stopping as s; s._in_worker.clear(); print(wish().name, flush=True)\n"
        "while wish().name == 'NONE': time.sleep(0.01)\n"
        "print(wish().name, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for name in ("NONE", "LEAVE"):
        assert process.stdout.readline().strip() == name
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == -signal.SIGTERM


def test_work_gives_back_what_it_returns_or_raises() -> None:
    stop = Stop(request=None)
    assert stop.run(lambda: threading.current_thread().name) == "driver"
    assert (stop.asked, stop.exit_code) == (False, 128)
    with pytest.raises(TimeoutError, match="its own"):
        stop.run(lambda: exec("raise TimeoutError('its own')"))


def test_a_signal_before_the_work_keeps_it_from_starting(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Stop(request=None)
    stop.receive(signal.SIGTERM, None)
    with pytest.raises(SystemExit, match="143"):
        stop.run(lambda: pytest.fail("started"))
    assert "the same command resumes the run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="143"):
        stop.receive(signal.SIGINT, None)
