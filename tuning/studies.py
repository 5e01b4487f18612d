"""The studies of all GPU types as one search of Ray Tune, and the rule that ends slow trials, within each type."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from tuning.supervisor import LEAST_STEPS

METRIC = "tokens_per_second"
LOOK_SECONDS = 5.0
"""between two looks at which nodes are there"""


class Asked(Protocol):
    """A study, of points that are dataclasses."""

    @property
    def over(self) -> str | None:
        """Why it is finished; None while it is not."""

    def ask(self) -> Any:
        """The next point, which counts as running from now on; None where none may begin now."""

    def record(self, point: Any, text: str, seconds: float) -> Any:
        """The record of a trial, by what it reported of itself; `seconds` where it says no time."""

    def failure(self, point: Any, outcome: str, reason: str, seconds: float) -> Any:
        """The record of a trial that reported nothing."""

    def tell(self, trial: Any) -> None:
        """Take in the record of a point that runs."""

    def give_back(self, point: Any) -> None:
        """The point was not measured after all."""


class Studies(Searcher):
    """Asks the studies in turn, so that all GPU types are busy at once, and tells them what came out.

    Args:
        studies: by GPU type.
        told: called with the name of a study and each trial that it was told.
    """

    def __init__(self, studies: Mapping[str, Asked], told: Callable[[str, Any], None]) -> None:
        super().__init__(metric=None, mode=None)
        self.studies, self.told = dict(studies), told
        self.lost: set[str] = set()
        """types whose nodes are gone"""
        self.stopped: set[str] = set()
        """ids of trials that were ended early"""
        self.errors: dict[str, tuple[str, str]] = {}
        """by trial id, what an error of Tune's own comes to: outcome and reason"""
        self._points: dict[str, tuple[str, Any, float]] = {}
        self._turn: list[str] = list(studies)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration; FINISHED when all studies are over, None while none may begin."""
        for name in list(self._turn):
            if name in self.lost:
                continue
            point = self.studies[name].ask()
            if point is not None:
                self._turn.remove(name)
                self._turn.append(name)
                self._points[trial_id] = (name, point, time.monotonic())
                return {"gpu_type": name, "point": asdict(point)}
        left = [name for name, study in self.studies.items() if study.over is None and name not in self.lost]
        return None if left else str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Have the study take in what a trial reported last, or that it came to no end."""
        name, point, began = self._points.pop(trial_id)
        study, last = self.studies[name], result or {}
        if name in self.lost and "trial" not in last:
            study.give_back(point)
            return
        seconds = round(time.monotonic() - began, 1)
        if "trial" in last:
            trial = study.record(point, last["trial"], seconds)
        elif trial_id in self.stopped and "partial" in last:
            trial = study.record(point, last["partial"], seconds)
        else:
            outcome, reason = self.errors.get(trial_id, ("died", "its node or Ray's process on it was lost"))
            trial = study.failure(point, outcome, reason, seconds)
        study.tell(trial)
        self.told(name, trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journals are what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


class Watchful(FIFOScheduler):
    """A scheduler of Tune's that ends trials which wait for lost nodes, and tells why a trial failed.

    Args:
        studies: that learn what happened.
        there: GPU types that the cluster has now.
        grace_seconds: how long a type may be gone.
        clock: seconds.
        settings: of the next class among the bases of a scheduler that is made with this one.
    """

    def __init__(
        self,
        studies: Studies,
        *,
        there: Callable[[], set[str]],
        grace_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.studies, self.there, self.grace_seconds, self.clock = studies, there, grace_seconds, clock
        self._looked = clock()
        self._seen = dict.fromkeys(studies.studies, self._looked)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Tell the studies whether the code failed or the process was lost."""
        error = trial.get_pickled_error()
        if isinstance(error, RayTaskError):
            self.studies.errors[trial.trial_id] = ("failed", str(error).strip().splitlines()[-1])

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """As FIFO's; trials that wait for a type which has been gone for too long are ended."""
        self._look(tune_controller)
        return super().choose_trial_to_run(tune_controller)

    def _look(self, tune_controller: Any) -> None:
        now = self.clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._seen |= dict.fromkeys(self.there() & set(self._seen), now)
        gone = {name for name, seen in self._seen.items() if now - seen > self.grace_seconds}
        for name in gone - self.studies.lost:
            self.studies.lost.add(name)
            for trial in tune_controller.get_trials():
                if trial.config["gpu_type"] == name and not trial.is_finished():
                    tune_controller.stop_trial(trial)


class MedianOfType(Watchful):
    """Ray Tune's median stopping rule, apart for each GPU type.

    Args:
        studies: as Watchful's.
        stop_slow: apply the rule.
        others: as Watchful's.
    """

    def __init__(self, studies: Studies, *, stop_slow: bool, **others: Any) -> None:
        super().__init__(studies, **others)
        self.stop_slow = stop_slow
        self._rules: dict[str, MedianStoppingRule] = {}

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Tune's decision, by the trials of the same type alone; the last report of a trial is none to decide on."""
        if not self.stop_slow or METRIC not in result or "partial" not in result:
            return str(TrialScheduler.CONTINUE)
        decision = str(self._rule(trial).on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.studies.stopped.add(trial.trial_id)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Count the trial among those that others are compared with, if it has a speed."""
        if METRIC in result:
            self._rule(trial).on_trial_complete(tune_controller, trial, result)

    def _rule(self, trial: TuneTrial) -> MedianStoppingRule:
        return self._rules.setdefault(
            trial.config["gpu_type"],
            MedianStoppingRule(
                time_attr="step",
                metric=METRIC,
                mode="max",
                grace_period=LEAST_STEPS,
                min_samples_required=3,
                min_time_slice=math.inf,  # else trials are paused, which they cannot be
            ),
        )
