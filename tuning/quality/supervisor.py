"""What Ray Tune runs on a node for a candidate: its training in processes of their own, and the losses they say."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune

from training.config import TrainingConfig
from tuning.processes import COMMAND, ROOT
from tuning.quality.candidates import Candidate, Curve, Evaluation, mean_loss, new_curve, steps_of
from tuning.supervisor import Watch, now, supervise


def measure(config: dict[str, Any], job: dict[str, Any]) -> None:
    """A trial of Ray Tune: report the losses after each evaluation, and at the end the `trial` as a whole.

    Args:
        config: `gpu_type` and `point`, the candidate.
        job: what all have in common; see `tuning.quality.search.make_job`.
    """
    os.chdir(ROOT)  # as of `tuning.supervisor.measure`
    curve = run_candidate(Candidate(**config["point"]), job, lambda curve: tune.report(report_of(curve, "partial")))
    tune.report(report_of(curve, "trial"))


def report_of(curve: Curve, kind: str) -> dict[str, Any]:
    """What Tune is told of a curve so far: numbers, which it shows, and all of it under `kind`."""
    figures: dict[str, Any] = {"evaluation": len(curve.evaluations), kind: curve.model_dump_json()}
    if curve.evaluations:
        last = curve.evaluations[-1]
        figures |= {"held_out_loss": last.loss, "rows": last.rows}
        figures |= {f"held_out_loss_{tag}": loss for tag, loss in last.languages.items()}
    return figures


def run_candidate(
    candidate: Candidate,
    job: Mapping[str, Any],
    report: Callable[[Curve], None],
    command: Sequence[str] = COMMAND,
) -> Curve:
    """Train a candidate here, in processes of its own, all of which are gone when this returns or raises.

    Args:
        candidate: to train.
        job: as `measure`'s.
        report: called after each evaluation but the last with what is known so far.
        command: that becomes a worker; see `tuning.trial`.
    """
    config = candidate.apply(TrainingConfig.model_validate(job["config"]))
    steps, every = steps_of(candidate, job["rows"], job["evaluations"])
    order = {
        "config": config.model_dump(mode="json"),
        "data": job["data"],
        "steps": steps,
        "every": every,
        "limit_bytes": job["limit_bytes"],
    }
    watch = CurveWatch(candidate, job, report)
    seconds, tail = supervise(watch, order, config, command)
    return watch.result(seconds, tail)


class CurveWatch(Watch):
    """The held-out losses of a candidate, for `run_candidate`."""

    def __init__(self, candidate: Candidate, job: Mapping[str, Any], report: Callable[[Curve], None]) -> None:
        super().__init__(job["trial_seconds"], "tuning.quality.minutes")
        self.candidate, self.job, self.report = candidate, job, report
        self.evaluations: list[Evaluation] = []

    def step(self, event: dict[str, Any]) -> None:
        """An evaluation."""
        if not math.isfinite(event["loss"]):
            self.outcome, self.reason = "failed", f"the held-out loss is {event['loss']} after step {event['step']}"
            return
        found = {name: event[name] for name in ("step", "rows", "languages", "trained")}
        self.evaluations.append(Evaluation(**found, loss=mean_loss(event["loss"], event["languages"])))
        if len(self.evaluations) < self.job["evaluations"]:
            self.outcome = "stopped"  # that is what it is if it is ended now
            self.report(self.result(0.0, ""))
            self.outcome = ""

    def result(self, seconds: float, tail: str) -> Curve:
        """The record."""
        return new_curve(
            self.candidate,
            outcome=self.outcome,
            evaluations=self.evaluations,
            seconds=round(seconds, 1),
            peak_bytes=self.peak_bytes,
            device=self.device,
            host=socket.gethostname(),
            date=now(),
            reason=self.said(tail),
        )
