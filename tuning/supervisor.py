"""What Ray Tune runs on the node of a GPU type: it starts the trial's processes, watches them, and sees them end.

The trial itself is `tuning.trial`. Whatever becomes of its processes, this one lives to tell: memory that ran out,
a crash of CUDA, the system's own out-of-memory killer, and a step that never ends are all results.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.exceptions import RayError

from training.config import TrainingConfig
from tuning.journal import Trial, point_fields
from tuning.processes import COMMAND, ROOT, TAIL_CHARACTERS, Workers, lines, start
from tuning.space import Point

LEAST_STEPS = 2
"""measured steps before the first report, of which Tune's schedulers decide"""


def measure(config: dict[str, Any], job: dict[str, Any]) -> None:
    """A trial of Ray Tune: report the speed so far after each measured step, and at the end the `trial` as a whole.

    Args:
        config: `gpu_type` and `point`.
        job: what all trials have in common; see `tuning.search.make_job`.
    """

    # Ray Tune stands in a folder of its own; relative paths are meant from the project, in a job this node's copy.
    os.chdir(ROOT)

    def report(trial: Trial) -> None:
        tune.report(
            {
                "step": len(trial.speeds),
                "tokens_per_second": trial.tokens_per_second,
                "peak_gib": (trial.peak_bytes or 0) / 2**30,
                "partial": trial.model_dump_json(),
            }
        )

    trial = run_trial(Point(**config["point"]), job, report)
    figures = {"tokens_per_second": trial.tokens_per_second} if trial.tokens_per_second is not None else {}
    tune.report({"step": len(trial.speeds), "trial": trial.model_dump_json(), **figures})


def run_trial(
    point: Point, job: Mapping[str, Any], report: Callable[[Trial], None], command: Sequence[str] = COMMAND
) -> Trial:
    """Measure a point here, in processes of its own, all of which are gone when this returns or raises.

    Args:
        point: to measure.
        job: as `measure`'s.
        report: called after each measured step with what is known so far.
        command: that becomes a worker; see `tuning.trial`.
    """
    config = point.apply(TrainingConfig.model_validate(job["config"]))
    order = {
        "config": config.model_dump(mode="json"),
        "data": job["data"],
        "steps": job["warmup_steps"] + job["steps"],
        "limit_bytes": job["limit_bytes"],
    }
    watch = TrialWatch(point, job, report)
    seconds, tail = supervise(watch, order, config, command)
    return watch.result(seconds, tail)


def supervise(
    watch: Watch, order: dict[str, Any], config: TrainingConfig, command: Sequence[str] = COMMAND
) -> tuple[float, str]:
    """Run a trial's processes until it is over; none is left when this returns or raises.

    Args:
        watch: is told what happens.
        order: for each worker; see `tuning.trial`.
        config: of the run, for the number of workers.
        command: that becomes a worker.

    Returns: the seconds that it took, and the last that its processes printed.
    """
    began = time.monotonic()
    try:
        with start(command, order, config) as workers:
            watch.follow(workers, began + watch.limit_seconds)
            return time.monotonic() - began, workers.tail()
    except RayError:
        watch.outcome, watch.reason = "died", "the node of one of its workers was lost"
        return time.monotonic() - began, ""


class Watch:
    """What is known of a running trial, whatever it measures.

    Args:
        limit_seconds: after which it counts as one that hangs.
        limit_setting: that says so, for a person.
    """

    def __init__(self, limit_seconds: float, limit_setting: str) -> None:
        self.limit_seconds, self.limit_setting = limit_seconds, limit_setting
        self.outcome, self.reason = "", ""
        self.device: str | None = None
        self.peak_bytes: int | None = None
        self.first_step_seconds: float | None = None

    def follow(self, workers: Workers, until: float) -> None:
        """Take in events until the trial is over.

        Raises:
            RayError: a node was lost.
        """
        began, done = time.monotonic(), 0
        for event in lines(workers, until):
            if event is None:
                self.outcome = "hung"
                self.reason = f"it was not done after {self.limit_seconds / 60:g} minutes, as {self.limit_setting} says"
                return
            kind = event["event"]
            if kind == "begun":
                self.device = event["device"]
            elif kind == "step":
                if self.first_step_seconds is None:
                    self.first_step_seconds = round(time.monotonic() - began, 2)
                self.peak_bytes = max(self.peak_bytes or 0, event["peak_bytes"])
                if not event["rank"]:
                    self.step(event)
                if self.outcome:
                    return
            elif kind in ("out_of_memory", "error"):
                self.outcome = "out_of_memory" if kind == "out_of_memory" else "failed"
                self.reason = event["reason"]
                return
            elif kind == "done":
                done += 1
                if done == workers.count:
                    self.outcome = "measured"
                    return
        codes = workers.exit_codes()
        code = next((code for code in codes if code), 0)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self.outcome, self.reason = "died", f"a process of the trial ended {how}"

    def step(self, event: dict[str, Any]) -> None:
        """A step of the first worker; all say the same figures, which are of all of them together. What sets `outcome`
        ends the trial."""
        raise NotImplementedError

    def said(self, tail: str) -> str:
        """The reason, with the last line of `tail` where processes ended without a word."""
        lines = tail.strip().splitlines()
        told = f"; the last it said: {lines[-1][:TAIL_CHARACTERS]}" if self.outcome == "died" and lines else ""
        return self.reason + told


class TrialWatch(Watch):
    """The speed of a point, for `run_trial`."""

    def __init__(self, point: Point, job: Mapping[str, Any], report: Callable[[Trial], None]) -> None:
        super().__init__(job["trial_seconds"], "tuning.trial_minutes")
        self.point, self.job, self.report = point, job, report
        self.speeds: list[float] = []
        self.seconds: list[float] = []
        self.loss: float | None = None

    def step(self, event: dict[str, Any]) -> None:
        """Count it, if it is none of the warm-up, and report what is known so far."""
        self.loss = event["loss"]
        if event["step"] <= self.job["warmup_steps"]:
            return
        self.speeds.append(event["tokens_per_second"])
        self.seconds.append(event["seconds"])
        if LEAST_STEPS <= len(self.speeds) < self.job["steps"]:
            self.outcome = "slow"  # that is what it is if it is ended now
            self.report(self.result(0.0, ""))
            self.outcome = ""

    def result(self, seconds: float, tail: str) -> Trial:
        """The record."""
        figured = self.outcome in ("measured", "slow")
        return Trial.model_validate(
            {
                "point": point_fields(self.point),
                "outcome": self.outcome,
                "tokens_per_second": round(statistics.median(self.speeds), 2) if figured else None,
                "noise": round(noise(self.speeds), 5) if figured else None,
                "step_seconds": [round(value, 5) for value in self.seconds],
                "speeds": [round(value, 2) for value in self.speeds],
                "peak_bytes": self.peak_bytes,
                "first_step_seconds": self.first_step_seconds,
                "seconds": round(seconds, 1),
                "loss": None if self.loss is None or math.isnan(self.loss) else self.loss,
                "device": self.device,
                "host": socket.gethostname(),
                "date": now(),
                "reason": self.said(tail),
            }
        )


def now() -> str:
    """The time, for a record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def noise(values: list[float]) -> float:
    """Standard error of the median as a share of it, by the median absolute deviation; 0 of fewer than three.

    √(π/2) · 1.4826 · MAD / √n, which is exact for many values that are normally distributed.
    """
    if len(values) < 3:
        return 0.0
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return math.sqrt(math.pi / 2) * 1.4826 * deviation / math.sqrt(len(values)) / middle
