"""A run that is stopped or killed in every way, or loses a node, ends where one that nothing disturbed does."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.local import PORT_FLAGS, STARTED, LocalRay, free_ports, local_ray, stop_tree

from .conftest import WHOLE, Whole
from .running import RESUMED, STEP, Run, assert_same_run, start, train_workers, wait_for_workers

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS = WHOLE["run__maximum_steps"]


def test_a_run_is_stopped_and_killed_in_every_way(whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    def again(number: int) -> Run:
        # No retry: a worker that is told to go is no failure.
        return start(ray_cluster, tmp_path, "short", tmp_path / str(number), workers__retries=0, **WHOLE)

    run = again(1)
    seen = run.wait_for(STEP.pattern)
    wait_for_workers(ray_cluster, 2)[1].terminate()
    seen = run.wait_for(RESUMED.pattern, seen)
    saved = int(RESUMED.findall(run.output)[-1])
    assert f"step {saved}/{STEPS} saved" in run.output
    run.wait_for(STEP.pattern, seen)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.tail
    stopped = int(re.findall(r"stopped   at step (\d+), which is saved; the same command goes on", run.output)[0])
    assert f"step {stopped}/{STEPS} saved" in run.output

    run = again(2)
    seen = run.wait_for(f"resuming  from step {stopped}\n")
    run.wait_for(STEP.pattern, seen)
    run.kill()

    run = again(3)
    assert run.end() == 0, run.tail
    assert_same_run(whole.folder, tmp_path / "short")


@pytest.mark.long
def test_a_node_is_lost_and_replaced(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 5}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    with local_ray(1, dashboard=False) as head:
        with node(head, tmp_path / "node-1") as lost:
            run = start(head, tmp_path, "short", tmp_path / "log", workers__retries=3, **WHOLE)
            run.wait_for(rf"step 6/{STEPS} saved")
            victims = [psutil.Process(lost.pid), *psutil.Process(lost.pid).children(recursive=True)]
            assert len([one for one in train_workers(head) if one in victims]) == 1
            seen = len(run.output)
            for victim in victims:
                victim.kill()
        with node(head, tmp_path / "node-2"):
            run.wait_for(RESUMED.pattern, seen)
            assert run.end() == 0, run.tail
    assert_same_run(whole.folder, tmp_path / "short")


@contextmanager
def node(head: LocalRay, log: Path, drain_seconds: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Another node of one CPU, with a raylet of its own, which on a SIGTERM gives its actors so long to leave."""
    environment = {**head.environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_seconds)}
    ports = dict(zip(PORT_FLAGS[3:], free_ports(len(PORT_FLAGS[3:])), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", head.address, "--block"]
    command += ["--num-cpus", "1", "--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"]
    command += [f"{flag}={port}" for flag, port in ports.items()]
    for tries_left in (2, 1, 0):  # Ray gives a node 30 s to come up, which a busy machine may not
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            if is_up(process, log) or not tries_left:
                assert process.poll() is None, log.read_text()
                yield process
                return
        finally:
            stop_tree(process)


def is_up(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the node has joined, or has given up."""
    while STARTED not in log.read_text(errors="replace"):
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return True
