"""A search on one GPU type: what was measured, what is ruled out, what is measured next, and what is best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuning.asking import BudgetedStudy
from tuning.config import TuningConfig
from tuning.journal import Journal, Trial, point_fields
from tuning.searchers import Known, searcher
from tuning.space import Point, Space


@dataclass(frozen=True)
class Choice:
    """The point that a study recommends, and why."""

    trial: Trial
    why: str


class Study(BudgetedStudy[Point, Trial]):
    """The search on one GPU type, which asks and is told.

    Args:
        name: of the GPU type.
        space: its points.
        expected: tokens a second of each point by arithmetic.
        settings: budgets and the searcher's name.
        journal: with the trials so far, to which others are added.
        baselines: points that are measured first where they are in the space, as what the best one is compared with.
        slots: trials that may run at once.
    """

    failures = frozenset({"failed", "died", "hung"})
    exhausted = "no point is left that could be faster"

    def __init__(
        self,
        name: str,
        space: Space,
        expected: Mapping[Point, float],
        settings: TuningConfig,
        journal: Journal[Trial],
        baselines: Sequence[Point] = (),
        slots: int = 1,
    ) -> None:
        super().__init__(name, settings, journal, slots)
        self.space, self.expected = space, expected
        self.baselines = [point for point in baselines if point in expected]
        self._search = searcher(settings.searcher, settings.seed)

    def record(self, point: Point, text: str, seconds: float) -> Trial:
        """What a trial reported of itself; `seconds` where it says no time."""
        return self._informed(Trial.model_validate_json(text), seconds)

    def failure(self, point: Point, outcome: str, reason: str, seconds: float) -> Trial:
        """The record of a trial that reported nothing."""
        return self._informed(new_trial(point, outcome=outcome, reason=reason), seconds)

    @property
    def known(self) -> Known:
        """What the searcher decides by."""
        trials = self.journal.trials
        lost = Counter(trial.where for trial in trials if trial.outcome == "died")
        gone = {point for point, times in lost.items() if times > self.settings.retries}
        without = {trial.where for trial in trials if trial.outcome in ("out_of_memory", "hung", "failed")}
        return Known(
            points=self.space.points,
            speeds={t.where: t.tokens_per_second for t in trials if t.tokens_per_second is not None},
            failed=frozenset(gone | without),
            out_of_memory=frozenset(trial.where for trial in trials if trial.outcome == "out_of_memory"),
            running=frozenset(self.running),
            expected=self.expected,
        )

    @property
    def measured(self) -> list[Trial]:
        """Trials that were measured to their end, the fastest first."""
        found = [trial for trial in self.journal.trials if trial.outcome == "measured"]
        return sorted(found, key=lambda trial: -(trial.tokens_per_second or 0))

    def choice(self) -> Choice | None:
        """The fastest point, or of those that are as fast the one with the least memory; None if none was measured."""
        return choose(self.measured, self.settings.tie)

    def _informed(self, trial: Trial, seconds: float) -> Trial:
        predicted = self.space.predicted_bytes.get(trial.where)
        return trial.model_copy(update={"predicted_bytes": predicted, "seconds": trial.seconds or seconds})

    def _next(self) -> Point | None:
        known = self.known
        for point in self.baselines:
            if known.free(point):
                return point
        return self._search(known)


def choose(measured: Sequence[Trial], tie: float) -> Choice | None:
    """Of trials with figures the fastest, or, of those as fast as that, the one with the least memory.

    Two are equally fast where their speeds differ by less than `tie`, or by less than the standard error of the
    difference.
    """
    speeds = {index: trial.tokens_per_second or 0.0 for index, trial in enumerate(measured)}
    if not speeds:
        return None
    top = max(speeds, key=lambda index: speeds[index])
    fastest = measured[top]

    def apart(index: int) -> float:
        return 1 - speeds[index] / speeds[top]

    def doubt(index: int) -> float:
        return math.hypot(fastest.noise or 0.0, measured[index].noise or 0.0)

    equal = [index for index in speeds if index == top or apart(index) <= max(tie, doubt(index))]
    least = min(equal, key=lambda index: (measured[index].peak_bytes or math.inf, -speeds[index]))
    chosen = measured[least]
    if least == top:
        others = len(equal) - 1
        same = f", with less memory than {others} as fast" if others else ""
        return Choice(chosen, f"the fastest of {len(measured)} measured points{same}")
    return Choice(
        chosen,
        f"within {apart(least):.1%} of the fastest, {fastest.where} with {speeds[top]:,.0f} tokens/s, which is a tie, "
        "and it needs less memory",
    )


def new_trial(point: Point, **fields: object) -> Trial:
    """The record of a point's trial."""
    return Trial.model_validate({"point": point_fields(point), **fields})
