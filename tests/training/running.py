"""Training runs in processes of their own, for tests that watch, kill and stop them, and what such a run leaves."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from cluster.local import LocalRay
from tests.conftest import SECONDS, short_run

STEP = re.compile(r"step (\d+)/\d+ \[")
RESUMED = re.compile(r"resuming  from step (\d+)")


@dataclass
class Run:
    """`training run` with the words of `short_run`, its output in `log`; the words `before` it say where it runs."""

    ray: LocalRay
    log: Path
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    before: Sequence[str] = ()

    def __post_init__(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.before, sys.executable, *self.words],
                env=self.ray.environment | self.environment,
                stdout=output,
                stderr=output,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def tail(self) -> str:
        return self.output[-4000:]

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Wait until the output has a match beyond its first `after` characters; returns where it ends."""
        end = time.monotonic() + SECONDS
        while True:
            output = self.output
            if found := re.compile(pattern).search(output, after):
                return found.end()
            assert self.process.poll() is None, f"the run ended without {pattern}:\n{output[-4000:]}"
            assert time.monotonic() < end, f"no {pattern}:\n{output[-4000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int, after: int = 0) -> int:
        """Wait for the line of this step or a later one."""
        while True:
            after = self.wait_for(STEP.pattern, after)
            if int(STEP.findall(self.output[:after])[-1]) >= step:
                return after

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout=SECONDS)

    def kill(self) -> None:
        """kill -9 of the driver."""
        self.process.kill()
        self.process.wait()


def start(ray: LocalRay, storage: Path | str, name: str, log: Path, **settings: object) -> Run:
    """Start a run; see `short_run`."""
    return Run(ray, log, short_run(storage, name, **settings))


def train_workers(ray: LocalRay) -> list[psutil.Process]:
    """Worker processes of this Ray: children of the raylets that run in its folder."""
    found = []
    for raylet in psutil.process_iter(["cmdline"]):
        if str(ray.folder) in " ".join(raylet.info["cmdline"] or []):
            found += [child for child in raylet.children() if "RayTrainWorker" in title(child)]
    return found


def title(process: psutil.Process) -> str:
    """Its command line, empty once it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_for_workers(ray: LocalRay, count: int) -> list[psutil.Process]:
    """The run's workers, once there are `count` of them."""
    end = time.monotonic() + SECONDS
    while len(found := train_workers(ray)) != count:
        assert time.monotonic() < end, f"{len(found)} workers, not {count}"
        time.sleep(0.1)
    return sorted(found, key=lambda process: process.pid)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """Of a finished run."""
    tensors: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return tensors


def losses(run: Path) -> dict[int, float]:
    """Loss by step, in full precision, from the newest checkpoint of a run with logging_steps = 1."""
    newest = max((run / "checkpoints").glob("step-*"))
    history: list[dict[str, Any]] = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line["loss"] for line in history if "loss" in line}


def assert_same_run(whole: Path, other: Path) -> None:
    """Loss of each step and the final adapter are the same to the bit."""
    assert losses(whole) == losses(other)
    expected, found = adapter(whole), adapter(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def largest_differences(whole: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of a step's loss, and norm of the adapters' difference over that of the adapter."""
    expected, found = losses(whole), losses(other)
    assert expected.keys() == found.keys()
    loss = max(abs(found[step] - expected[step]) / abs(expected[step]) for step in expected)
    own, others = adapter(whole), adapter(other)
    assert own.keys() == others.keys()
    apart = math.sqrt(sum(float((own[name].double() - others[name].double()).square().sum()) for name in own))
    return loss, apart / math.sqrt(sum(float(own[name].double().square().sum()) for name in own))
